"""What holds for every operator, stated once: for each engine, dtype and kind, on each network of the zoo."""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import ntkops
from ntkops.errors import StaleOperatorError
from tests.pairs import pairs

from .kinds import KINDS, N, Problem, Subject
from .reference import close, jacobian, kernel, normal
from .zoo import ZOO

ENGINES = {
    "autograd": "autograd",
    "auto": "auto",
    # routes of kernels, diagonals and products
    "gram": ntkops.Layerwise("gram", "gram", "factors"),
    "gradient": ntkops.Layerwise(
        kernel_route="gradient", diagonal_route="gradient", product_route="gradient"
    ),
}
ALWAYS = ("square", "cross of equally many")
IN_FULL = ("products are dense", "a dense matrix is dense")
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.05}
Law = Callable[[Problem, Callable[[Problem], Subject], float], None]
LAWS: dict[str, Law] = {}
OF_ANY_OPERATOR: set[str] = set()  # laws for which it does not matter what the operator was asked before


def law(function: Law) -> Law:
    LAWS[function.__name__.replace("_", " ")] = function
    return function


def law_of_any_operator(function: Law) -> Law:
    OF_ANY_OPERATOR.add(function.__name__.replace("_", " "))
    return law(function)


@functools.lru_cache(maxsize=12)  # every engine and dtype of one kind
def shared(kind: str, problem: Problem) -> Subject:
    """Return one operator for several laws."""
    return KINDS[kind](problem)


def vectors(subject: Subject, count: int = 2, seed: int = 5, rows: bool = False):
    """Return columns that an operator, or its transpose, can be multiplied with."""
    expected = subject.expected
    length = expected.shape[-2] if rows else expected.shape[-1]
    return normal(*expected.shape[:-2], length, count, seed=seed, dtype=subject.operator.dtype)


def holds(subject: Subject, tolerance: float, what: str = "") -> None:
    """Compare one product with the dense matrix."""
    v = vectors(subject)
    close(subject.operator @ v, subject.expected @ v.double(), tolerance, what)


@law
def products_are_dense(problem, make, tolerance):
    """At once, again when a cache pays, and when a dense block would, which takes up to five products."""
    for knobs, times in (({"max_dense_bytes": 0}, 2), ({}, 5)):
        subject = make(problem.with_knobs(**knobs))
        v, u = vectors(subject), vectors(subject, rows=True)
        if not knobs:
            close(subject.operator.mT @ u, subject.expected.mT @ u.double(), tolerance, "transposed first")
        for number in range(times):
            found = subject.operator @ v
            close(found, subject.expected @ v.double(), tolerance, f"product {number + 1} with {knobs}")
        close(
            subject.operator.mT @ u, subject.expected.mT @ u.double(), tolerance, f"transposed with {knobs}"
        )


@law
def a_dense_matrix_is_dense(problem, make, tolerance):
    subject = make(problem)
    close(subject.operator.to_dense(), subject.expected, tolerance)
    holds(subject, tolerance, "a product afterwards")


@law_of_any_operator
def a_diagonal_is_dense(problem, make, tolerance):
    subject = make(problem)
    if subject.expected.shape[-1] == subject.expected.shape[-2]:
        expected = subject.expected.diagonal(dim1=-2, dim2=-1)
        scale = float(subject.expected.norm())  # a cross kernel's diagonal may be small by cancellation
        close(subject.operator.diagonal(), expected, tolerance, scale=scale)


@law_of_any_operator
def tiles_are_dense(problem, make, tolerance):
    """Tiles of three rows and two columns, made one by one, are the matrix; so are single rows."""
    subject = make(problem)
    n, m = subject.expected.shape[-2:]
    scale = float(subject.expected.norm())
    for rows, columns in (
        (slice(0, 3), slice(1, 3)),
        (slice(min(3, n - 1), n), slice(0, 2)),
        (slice(2, 3), slice(0, m)),
    ):
        tile = subject.operator[..., rows, columns].to_dense()
        close(tile, subject.expected[..., rows, columns], tolerance, f"{rows} {columns}", scale)


@law_of_any_operator
def a_transpose_is_adjoint(problem, make, tolerance):
    """Exactly but for rounding, however far both are from the numbers of float64."""
    subject = make(problem)
    u, v = vectors(subject, 1, 6, rows=True), vectors(subject, 1)
    pushed, pulled = (subject.operator @ v).double(), (subject.operator.mT @ u).double()
    size = float(u.norm() * pushed.norm() + pulled.norm() * v.norm())
    assert abs(float((u * pushed).sum() - (pulled * v).sum())) <= tolerance * size


@law_of_any_operator
def products_are_linear(problem, make, tolerance):
    subject = make(problem)
    a, b = vectors(subject, 1), vectors(subject, 1, 6)
    found = (subject.operator @ (2 * a - b)).double()
    expected = 2 * (subject.operator @ a).double() - (subject.operator @ b).double()
    close(found, expected, tolerance, scale=float(subject.expected.norm() * a.norm()))


@law_of_any_operator
def kernels_are_symmetric_and_semidefinite(problem, make, tolerance):
    subject = make(problem)
    if not subject.symmetric:
        return
    u, v = vectors(subject, 2, 6), vectors(subject)
    left, right = subject.operator @ u, subject.operator @ v
    size = float(subject.expected.norm() * u.norm() * v.norm())
    assert abs(float((v * left).sum() - (u * right).sum())) <= tolerance * size
    assert float((v * right).sum(-2).min()) >= -tolerance * size
    assert float(torch.linalg.eigvalsh(subject.operator.to_dense().double()).min()) >= -tolerance * size


@law
def sizes_of_batches_and_chunks_do_not_matter(problem, make, tolerance):
    for batch_size, chunk_size in ((1, "auto"), (3, 1)):
        knobs = {"batch_size": batch_size, "chunk_size": chunk_size}
        holds(make(problem.with_knobs(**knobs, max_dense_bytes=0)), tolerance, str(knobs))
        subject = make(problem.with_knobs(**knobs))
        close(subject.operator.to_dense(), subject.expected, tolerance, f"dense, {knobs}")


@law
def samples_may_be_permuted(problem, make, tolerance):
    subject = make(replace(problem, order=(2, 3, 1, 0)))
    holds(subject, tolerance)
    close(subject.operator.to_dense(), subject.expected, tolerance)


@law
def kernels_of_some_parameters_are_dense(problem, make, tolerance):
    """Those of two halves are what the whole is the sum of, by the reference."""
    for part in (0, 1):
        subject = make(replace(problem, part=part))
        holds(subject, tolerance, f"part {part}")
        close(subject.operator.to_dense(), subject.expected, tolerance, f"part {part}")


@law
def an_operator_survives_pickling(problem, make, tolerance):
    subject = make(problem)
    if problem.name != "mixed" or not isinstance(subject.operator, ntkops.NTKOperator):
        holds(replace(subject, operator=pickle.loads(pickle.dumps(subject.operator))), tolerance)
        return
    for before in (lambda K: None, lambda K: K.to_dense(), lambda K: K @ vectors(subject)):
        before(subject.operator)
        holds(replace(subject, operator=pickle.loads(pickle.dumps(subject.operator))), tolerance)


@law
def an_operator_may_change_its_dtype(problem, make, tolerance):
    subject = make(problem)
    for dtype in (torch.float32, torch.float64):
        moved = replace(subject, operator=subject.operator.to(dtype))
        assert (moved.operator @ vectors(moved)).dtype == dtype
        holds(moved, max(tolerance, TOLERANCES[torch.float32]), str(dtype))


def _table():
    """Return every law and kind: once with engines and dtypes in turn, and more in the long run.

    There products and dense matrices are compared for every engine in float64 and one in each lower dtype;
    the other laws meet two engines in float64 and one in a lower dtype, in turn: over all laws a kind meets
    every engine and dtype, and over all kinds a law does. The kinds of `ALWAYS` are compared for every engine
    in the usual run as well.
    """
    combinations = list(itertools.product(ENGINES, TOLERANCES))
    for shift, kind in enumerate(KINDS):  # so that a law meets another combination with each kind
        turn = itertools.cycle([combinations[(number * 5 + shift) % 12] for number in range(12)])
        low = itertools.cycle(ENGINES)
        for name in LAWS:
            usual, every = {next(turn)}, {(engine, torch.float64) for engine in ENGINES}
            lower = [(next(low), torch.float32), (next(low), torch.bfloat16)]
            if name in IN_FULL:
                usual |= every if kind in ALWAYS else set()
                more = every | set(lower)
            else:
                place = shift + list(LAWS).index(name)
                two = itertools.islice(itertools.cycle(ENGINES), place % 4, place % 4 + 3, 2)
                more = {(engine, torch.float64) for engine in two}
                more.add(lower[place // 4 % 2])
            for engine, dtype in combinations:
                if (engine, dtype) in usual | more:
                    marks = [] if (engine, dtype) in usual else [pytest.mark.long]
                    label = f"{kind}-{name}-{engine}-{str(dtype)[6:]}"
                    yield pytest.param(name, kind, engine, dtype, id=label, marks=marks)


# linear_operator slices its block diagonals through a sparse matrix, which torch remarks on once.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("name", "kind", "engine", "dtype"), list(_table()))
def test_law(name, kind, engine, dtype):
    make = functools.partial(shared, kind) if name in OF_ANY_OPERATOR else KINDS[kind]
    LAWS[name](Problem(engine=ENGINES[engine], dtype=dtype), make, TOLERANCES[dtype])


# -- every network of the zoo, and what belongs to kernels alone

EVERY_ENGINE = pytest.mark.parametrize("engine", ENGINES)


# By automatic differentiation, by rules, and by one of the routes of rules in turn.
NETWORKS = [
    (name, engine)
    for number, name in enumerate(ZOO)
    for engine in ("autograd", "auto", ("gram", "gradient")[number % 2])
]


@pytest.mark.parametrize(("name", "engine"), NETWORKS)
def test_every_network(name, engine):
    """K of all outputs, each, the trace, a diagonal, an exact trace, a cross kernel and its transpose, J."""
    problem = Problem(name, engine=ENGINES[engine])
    K = problem.ntk()
    if engine != "autograd":  # a rule given up for automatic differentiation was wrong all the same
        trainable = {n for n, p in problem.model.named_parameters() if p.requires_grad}
        assert set(K.engine_info.covered) == trainable, K.engine_info.reasons
    crossed = KINDS["cross of equally many"](problem)
    whole = problem.expected()
    close(K.diagonal(), whole.diagonal(), 1e-10, "diagonal")
    assert float(ntkops.trace(K, method="exact")) == pytest.approx(float(whole.trace()), rel=1e-10)
    holds(Subject(K, whole), 1e-10, "product")
    close(K.to_dense(), whole, 1e-10, "dense")
    holds(crossed, 1e-10, "cross kernel")
    holds(Subject(crossed.operator.mT, crossed.expected.mT), 1e-10, "transposed cross kernel")
    close(crossed.operator.to_dense(), crossed.expected, 1e-10, "dense cross kernel")
    for outputs in ("each", "trace"):
        close(problem.ntk(outputs).to_dense(), problem.expected(outputs), 1e-10, outputs)
    J, v = problem.J(), vectors(Subject(K, whole))
    p = normal(J.shape[1], 2, seed=8)
    close(K.left @ p, J @ p, 1e-10, "J p")
    close(K.left.mT @ v, J.T @ v, 1e-10, "Jᵀ v")


@EVERY_ENGINE
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_per_sample_gram_matrices(engine, dtype):
    problem = Problem(engine=ENGINES[engine], dtype=dtype)
    K, J = problem.ntk(), problem.J().unflatten(0, (N, problem.width))
    v = normal(N, 2, problem.width, seed=3, dtype=K.dtype)
    g = torch.einsum("nop,nro->nrp", J, v.double())
    close(K.sample_gram(v), torch.einsum("nrp,msp->nrms", g, g), TOLERANCES[dtype])


@pytest.mark.parametrize(
    "name, kind, engine",
    pairs(["mlp", "conv", "mixed"], ["all", "trace", "cross"], ["autograd", "auto"]),
    ids=str,
)
def test_derivatives(name, kind, engine):
    """Those of a nonlinear function of K v by the parameters, against the dense Jacobian's."""
    model, case = Problem(name).model, ZOO[name]
    x, x2 = Problem(name).data(), Problem(name).data(N, seed=2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    K = ntkops.ntk(model, x, outputs=kind if kind != "cross" else "all", engine=engine, differentiable=True)
    J = jacobian(model, x, case.state, graph=True)
    expected = kernel(J, J, len(J) // N, "trace" if kind == "trace" else "all")
    if kind == "cross":
        K, expected = K.cross(x2), jacobian(model, x2, case.state, graph=True) @ J.T
    v = normal(expected.shape[-1], 2, seed=5)
    found, wanted = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(((M @ v) ** 3).sum(), parameters, materialize_grads=True)
            ]
        )
        for M in (K, expected)
    )
    close(found, wanted, 1e-9)


@EVERY_ENGINE
@pytest.mark.parametrize("name", ["mlp", "mixed"])
def test_a_kernel_is_that_of_the_numbers_it_was_made_with(name, engine):
    """It keeps them when the model moves on; a new kernel of the same model has the new ones."""
    problem, case = Problem(name, engine=ENGINES[engine]), ZOO[name]
    model, x = problem.model, problem.data()
    K = ntkops.ntk(model, x, engine=problem.engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    holds(Subject(K, problem.expected()), 1e-10)
    J = jacobian(model, x, case.state)
    again = ntkops.ntk(model, x, engine=problem.engine)
    holds(Subject(again, J @ J.T), 1e-10)
    close(again.to_dense(), J @ J.T, 1e-10)


@EVERY_ENGINE
def test_samples_that_were_changed_are_refused(engine):
    problem = Problem("mlp", engine=ENGINES[engine])
    x = problem.data()
    K = ntkops.ntk(problem.model, x, engine=problem.engine)
    crossed = K.cross(problem.data(N, seed=2))
    x.add_(1.0)
    for stale in (K, crossed):
        with pytest.raises(StaleOperatorError):
            stale @ normal(stale.shape[-1], 1, seed=5)
        with pytest.raises(StaleOperatorError):
            stale.to_dense()


@pytest.mark.parametrize("kind", ["square", "cross", "each", "trace", "some outputs"])
def test_passes_are_as_announced(kind):
    K = KINDS[kind](Problem(engine="autograd").with_knobs(max_dense_bytes=0)).operator
    v = normal(*K.shape[:-2], K.shape[-1], 3, seed=5)
    with ntkops.count_passes() as counted:
        K @ v
    assert counted.total == 3 * K.passes_per_column
