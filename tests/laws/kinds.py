"""Every kind of operator, once: how it is made, and what it must be, dense and in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from linear_operator.operators import BlockDiagLinearOperator, LinearOperator
from torch import Tensor, nn

import ntkops

from .reference import call, jacobian, kernel
from .zoo import ZOO

__all__ = ["CHOSEN", "KINDS", "Problem", "Subject"]

N = 4  # samples; more than the first three, after which nothing may be taken for granted
CHOSEN: dict[str, Any] = {"each": "each", "trace": "trace", "one": -1, "some outputs": [1, 0]}


@dataclass(frozen=True)
class Subject:
    """An operator and what it must be; `symmetric` ones are semidefinite, too."""

    operator: LinearOperator
    expected: Tensor
    symmetric: bool = True


@dataclass(frozen=True)
class Problem:
    """A network of the zoo in a dtype, with the engine and the choices under which operators are made.

    Attributes:
        name: Of the network.
        dtype: Of the network.
        engine: Of the operators.
        knobs: Further arguments of `ntkops.ntk`.
        order: Numbers of the samples, in their order.
        part: None for all parameters, 0 or 1 for every other one.
    """

    name: str = "mixed"
    dtype: torch.dtype = torch.float64
    engine: Any = "auto"
    knobs: tuple[tuple[str, Any], ...] = ()
    order: tuple[int, ...] = tuple(range(N))
    part: int | None = None

    def with_knobs(self, **knobs: Any) -> Problem:
        """Return the same problem with other choices."""
        return replace(self, knobs=tuple(knobs.items()))

    @property
    def model(self) -> nn.Module:
        """The network, made anew."""
        return ZOO[self.name].make(self.dtype)

    def data(self, count: int = N, seed: int = 1) -> Any:
        """Return samples, in the order of this problem where they are its own."""
        x = ZOO[self.name].data(count, self.dtype, seed)
        return _take(x, self.order) if seed == 1 else x

    def J(self, count: int = N, seed: int = 1) -> Tensor:
        """Return the dense Jacobian of exactly these numbers in float64."""
        J = _dense(self.name, self.dtype, count, seed)
        if seed == 1:
            J = J.unflatten(0, (count, -1))[list(self.order)].flatten(0, 1)
        return J if self.part is None else J[:, _columns(self.name, self.part)]

    @property
    def width(self) -> int:
        """Outputs of a sample."""
        return len(_dense(self.name, self.dtype, N, 1)) // N

    def point(self, batch_dim: int | None = 0) -> ntkops.Linearization:
        """Return the network linearised: one for all laws, so that what is known of it must hold for all."""
        return _point(self.name, self.dtype, self.part, batch_dim)

    def options(self) -> dict[str, Any]:
        """Return the arguments of `ntkops.ntk` beside the linearisation, the samples and the outputs."""
        return {**dict(self.knobs), "engine": self.engine}

    def ntk(self, outputs: Any = "all") -> ntkops.NTKOperator:
        """Return the kernel of the problem's samples."""
        if outputs == -1:
            outputs = self.width - 1
        return ntkops.ntk(self.point(), self.data(), outputs=outputs, **self.options())

    def expected(self, outputs: Any = "all") -> Tensor:
        """Return what `ntk` must be."""
        return kernel(self.J(), self.J(), self.width, outputs)


@functools.cache
def _dense(name: str, dtype: torch.dtype, count: int, seed: int) -> Tensor:
    case = ZOO[name]
    x = _cast(case.data(count, dtype, seed))
    return jacobian(case.make(dtype).double(), x, case.state)


@functools.cache
def _point(name: str, dtype: torch.dtype, part: int | None, batch_dim: int | None) -> ntkops.Linearization:
    params = None if part is None else _names(name)[part::2]
    return ntkops.linearize(ZOO[name].make(dtype), params=params, batch_dim=batch_dim, **ZOO[name].options)


def _names(name: str) -> list[str]:
    return [n for n, p in ZOO[name].make().named_parameters() if p.requires_grad]


def _columns(name: str, part: int) -> Tensor:
    sizes = [p.numel() for p in ZOO[name].make().parameters() if p.requires_grad]
    return torch.cat(torch.arange(sum(sizes)).split(sizes)[part::2])


def _map(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {key: _map(function, value) for key, value in x.items()}
    return tuple(_map(function, value) for value in x)


def _take(x: Any, numbers: Any) -> Any:
    return _map(lambda leaf: leaf[list(numbers)], x)


def _cast(x: Any) -> Any:
    return _map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, x)


# -- the table: from a problem to an operator with what it must be

KINDS: dict[str, Callable[[Problem], Subject]] = {}


def kind(function: Callable[[Problem], Subject]) -> Callable[[Problem], Subject]:
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def _chosen(outputs: Any) -> Callable[[Problem], Subject]:
    return lambda problem: Subject(problem.ntk(outputs), problem.expected(outputs))


KINDS["square"] = _chosen("all")
KINDS |= {name: _chosen(outputs) for name, outputs in CHOSEN.items()}


def _cross(problem: Problem, count: int, outputs: Any = "all") -> Subject:
    crossed = problem.ntk(outputs).cross(problem.data(count, seed=2))
    return Subject(crossed, kernel(problem.J(count, 2), problem.J(), problem.width, outputs), False)


@kind
def each_sample(problem: Problem) -> Subject:
    """The kernels of single samples."""
    J = problem.J().unflatten(0, (N, -1))
    return Subject(problem.ntk({"samples": "each"}), J @ J.mT)


@kind
def summed_samples(problem: Problem) -> Subject:
    J = problem.J().unflatten(0, (N, -1))
    return Subject(problem.ntk({"samples": "trace"}), (J @ J.mT).sum(0))


@kind
def stacked(problem: Problem) -> Subject:
    """Two sets of samples one below the other, the second weighted."""
    options = problem.options()
    parts = {
        "a": ntkops.jacobian(problem.point(), problem.data(), **options),
        "b": ntkops.jacobian(problem.point(), problem.data(3, seed=2), **options),
    }
    J = ntkops.stack(parts, {"a": 1.0, "b": 4.0})
    rows = torch.cat([problem.J(), 2 * problem.J(3, 2)])
    return Subject(J @ J.mT, rows @ rows.mT)


@kind
def coupled(problem: Problem) -> Subject:
    """All samples as one whole, whose rows they are."""
    K = ntkops.ntk(problem.point(None), problem.data(), **problem.options())
    return Subject(K, problem.expected())


@kind
def cross_of_coupled_samples(problem: Problem) -> Subject:
    """A whole of other samples, and of another number of them."""
    K = ntkops.ntk(problem.point(None), problem.data(), outputs="each", **problem.options())
    expected = kernel(problem.J(3, 2), problem.J(), problem.width, "each")
    return Subject(K.cross(problem.data(3, seed=2)), expected, False)


@kind
def cross(problem: Problem) -> Subject:
    return _cross(problem, 3)


@kind
def cross_of_equally_many(problem: Problem) -> Subject:
    return _cross(problem, N)


@kind
def traced_cross_of_equally_many(problem: Problem) -> Subject:
    return _cross(problem, N, "trace")


@kind
def second_samples(problem: Problem) -> Subject:
    """Both sets of samples given at once, the second as its own batch."""
    x2 = problem.data(N, seed=2)
    K = ntkops.ntk(problem.point(), problem.data(), x2, outputs="each", **problem.options())
    return Subject(K, kernel(problem.J(), problem.J(N, 2), problem.width, "each"), False)


@kind
def transposed_cross(problem: Problem) -> Subject:
    made = _cross(problem, 3)
    return Subject(made.operator.mT, made.expected.mT, False)


@kind
def sliced(problem: Problem) -> Subject:
    return Subject(problem.ntk()[1:-1, 2:], problem.expected()[1:-1, 2:], False)


@kind
def same_rows_and_columns(problem: Problem) -> Subject:
    K, expected = problem.ntk(), problem.expected()
    numbers = torch.tensor([5, 0, 3, 6, 1])
    return Subject(K.submatrix(numbers, numbers), expected[numbers][:, numbers])


@kind
def sum_of_kernels(problem: Problem) -> Subject:
    return Subject(problem.ntk() + problem.ntk(), 2 * problem.expected())


@kind
def sum_with_a_cross_kernel(problem: Problem) -> Subject:
    crossed = _cross(problem, N)
    return Subject(problem.ntk() + crossed.operator, problem.expected() + crossed.expected, False)


@kind
def multiple(problem: Problem) -> Subject:
    return Subject(2.5 * problem.ntk(), 2.5 * problem.expected())


@kind
def ridge(problem: Problem) -> Subject:
    expected = problem.expected()
    return Subject(problem.ntk().add_jitter(0.25), expected + 0.25 * torch.eye(len(expected)))


@kind
def block_diagonal(problem: Problem) -> Subject:
    """All kernels of single outputs in one matrix."""
    return Subject(BlockDiagLinearOperator(problem.ntk("each")), torch.block_diag(*problem.expected("each")))


@kind
def gram_of_a_jacobian(problem: Problem) -> Subject:
    J = ntkops.jacobian(problem.point(), problem.data(), **problem.options())
    return Subject(J @ J.mT, problem.expected())


@kind
def projected(problem: Problem) -> Subject:
    K, J = problem.ntk(), problem.J()
    projection = ntkops.projections.Gaussian(J.shape[1], 6, 3)
    features = projection.apply(J)
    return Subject(ntkops.projected_ntk(K, projection), features @ features.mT)


@kind
def nystrom(problem: Problem) -> Subject:
    """Two inducing samples with the traced kernel, which then has an inverse."""
    expected = problem.expected("trace")
    cross, small = expected[:, [2, 0]], expected[[2, 0]][:, [2, 0]]
    return Subject(ntkops.nystrom_ntk(problem.ntk("trace"), [2, 0]), cross @ small.inverse() @ cross.mT)


@kind
def in_batches(problem: Problem) -> Subject:
    """The samples as a user's batches of unequal length, read again in every pass."""
    x = problem.data()
    batches = [_take(x, range(3)), _take(x, range(3, N))]
    K = ntkops.ntk(problem.point(), batches, **problem.options())
    return Subject(K, problem.expected())


@kind
def cross_in_batches(problem: Problem) -> Subject:
    """New samples in batches against equally many held in memory."""
    x = problem.data(N, seed=2)
    crossed = problem.ntk().cross([_take(x, range(1)), _take(x, range(1, N))])
    return Subject(crossed, kernel(problem.J(N, 2), problem.J(), problem.width), False)


def _gauss_newton(problem: Problem) -> tuple[ntkops.GGNOperator, Tensor]:
    """Return the matrix of the cross-entropy, and its factor S by the formula, in float64."""
    case = ZOO[problem.name]
    with torch.no_grad():
        states = case.state(call(case.make(problem.dtype).double(), _cast(problem.data())))
    shares = states.flatten(0, -2).softmax(-1)
    S = torch.block_diag(*(torch.diag(p.sqrt()) - torch.outer(p, p.sqrt()) for p in shares))
    return ntkops.ggn(problem.point(), problem.data(), **problem.options()), S


@kind
def gauss_newton(problem: Problem) -> Subject:
    G, S = _gauss_newton(problem)
    J = problem.J()
    return Subject(G, J.mT @ S @ S.mT @ J)


@kind
def gauss_newton_in_function_space(problem: Problem) -> Subject:
    G, S = _gauss_newton(problem)
    return Subject(G.function_space, S.mT @ problem.expected() @ S)
