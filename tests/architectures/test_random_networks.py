"""Networks that nobody thought of: every engine against dense Jacobians in float64.

`make fuzz` runs the same tests on as many networks as are asked for. A network that ntkops refuses is not a
wrong answer, but every one of this grammar has a kernel: a refusal fails. Only a network that is sensitive
(see `Reference`) may be refused, or have a layer rule replaced; each such case is counted as an event in the
statistics. The adjoint identity holds for all that are not refused.
"""

import logging
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import ntkops
from ntkops.errors import DifferentiationError, NtkopsWarning

from .grammar import Network, networks
from .profiles import RUN
from .reference import Reference, untouched

pytestmark = pytest.mark.long

ENGINES = ("autograd", "layerwise", "auto")
CHOICES = ("all", "each", "trace", "one", "some")


@contextmanager
def rules_hold(reference):
    """A layer rule that differs from automatic differentiation is replaced by it: a bug all the same."""
    complaints = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: complaints.append(record.getMessage())
    logger = logging.getLogger("ntkops.engines.trust")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if reference.is_zero:  # said aloud, as it should be
                warnings.simplefilter("ignore", NtkopsWarning)
            yield
    except DifferentiationError:
        # Rounding alone may part J from Jᵀ there; such a network is refused, which is no wrong answer.
        if not reference.is_sensitive_after_all():
            raise
        event("sensitive: refused")
    finally:
        logger.removeHandler(handler)
    assert not complaints or reference.is_sensitive, complaints
    if complaints:
        event("sensitive: a layer rule was replaced")


def check_adjoint(dtype, v, p, pushed, pulled):
    """Hold <v, J p> = <Jᵀ v, p> to a thousand rounding units of the lowest dtype of a network."""
    v, p, pushed, pulled = v.double(), p.double(), pushed.double(), pulled.double()
    size = float(v.norm() * pushed.norm() + pulled.norm() * p.norm())
    mismatch = abs(float((v * pushed).sum() - (pulled * p).sum()))
    assert mismatch <= 1e3 * torch.finfo(dtype).eps * size + 1e-14, (mismatch, size)


def block(rows, columns, dtype=torch.float64, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


def contract(choice, left, right, width):
    """Return the kernel of a choice of outputs from two dense Jacobians."""
    whole = (left @ right.T).reshape(len(left) // width, width, len(right) // width, width)
    if choice == "all":
        return whole.flatten(2).flatten(0, 1)
    if choice == "each":
        return torch.einsum("icjc->cij", whole)
    if choice == "trace":
        return torch.einsum("icjc->ij", whole)
    if choice == "one":
        return whole[:, -1, :, -1]
    return whole[:, [width - 1, 0]][:, :, :, [width - 1, 0]].flatten(2).flatten(0, 1)


def outputs_of(choice, width):
    return {"one": width - 1, "some": [width - 1, 0]}.get(choice, choice)


def make(network, dtype=torch.float64):
    model, x = network.build(dtype), network.data(dtype)
    reference = Reference(model, x, low=network.is_rounded or dtype != torch.float64)
    if reference.is_sensitive:
        event("sensitive")
    return model, x, reference, len(reference.J) // len(x)


@RUN
@given(networks(), st.sampled_from(CHOICES))
def test_kernels_diagonals_and_traces(network: Network, choice: str) -> None:
    model, x, reference, width = make(network)
    with untouched(model, x), rules_hold(reference):
        for engine in ENGINES:
            K = ntkops.ntk(model, x, outputs=outputs_of(choice, width), engine=engine)
            expected = contract(choice, reference.J, reference.J, width)
            diagonal = expected.diagonal(dim1=-2, dim2=-1)
            whole = reference.size**2
            reference.check(f"{engine} diagonal", K.diagonal(), diagonal, whole=whole)
            reference.check(f"{engine} dense", K.to_dense(), expected, whole=whole)
            if choice == "all":
                total = ntkops.trace(K, method="exact")
                reference.check(
                    f"{engine} trace", torch.tensor(float(total), dtype=torch.float64), diagonal.sum()
                )


@RUN
@given(networks(), st.sampled_from(["auto", 0]))
def test_products_and_adjoints(network: Network, max_dense_bytes: str | int) -> None:
    model, x, reference, width = make(network)
    J = reference.J
    v, p = block(len(J), 3), block(J.shape[1], 3, seed=5)
    with untouched(model, x), rules_hold(reference):
        for engine in ENGINES:
            K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=max_dense_bytes)
            pushed, pulled = K.left @ p, K.left.mT @ v
            size, length = reference.size, float(v.norm())
            reference.check(f"{engine} J p", pushed, J @ p, whole=size * float(p.norm()))
            reference.check(f"{engine} Jᵀ v", pulled, J.T @ v, whole=size * length)
            reference.check(f"{engine} K v", K @ v, J @ (J.T @ v), scale=size**2 * length)
            reference.check(f"{engine} K v[0]", K @ v[:, 0], J @ (J.T @ v[:, 0]), whole=size**2 * length)
            lowest = torch.float32 if network.is_rounded else torch.float64
            check_adjoint(lowest, v, p, pushed, pulled)


@RUN
@given(networks(), st.sampled_from(CHOICES), st.sampled_from(ENGINES))
def test_float32(network: Network, choice: str, engine: str) -> None:
    model, x, reference, width = make(network, torch.float32)
    J = reference.J
    with untouched(model, x), rules_hold(reference):
        K = ntkops.ntk(model, x, outputs=outputs_of(choice, width), engine=engine)
        expected = contract(choice, J, J, width)
        found = K.to_dense()
        assert found.dtype == torch.float32
        whole = reference.size**2
        reference.check("dense", found, expected, whole=whole)
        reference.check("diagonal", K.diagonal(), expected.diagonal(dim1=-2, dim2=-1), whole=whole)
        J32 = ntkops.jacobian(model, x, engine=engine)
        v, p = block(len(J), 2, torch.float32), block(J.shape[1], 2, torch.float32, seed=5)
        pushed, pulled = J32 @ p, J32.mT @ v
        reference.check("J p", pushed, J @ p.double(), scale=reference.size * float(p.norm()))
        reference.check("Jᵀ v", pulled, J.T @ v.double(), scale=reference.size * float(v.norm()))
        check_adjoint(torch.float32, v, p, pushed, pulled)


@RUN
@given(
    networks(),
    st.sampled_from(CHOICES),
    st.sampled_from(ENGINES),
    st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from(["auto", 1, 2]),
            "chunk_size": st.sampled_from(["auto", 1, 2]),
            "max_dense_bytes": st.sampled_from(["auto", 0]),
        }
    ),
)
def test_cross_kernels_batches_and_slices(network: Network, choice: str, engine: str, knobs: dict) -> None:
    model, x, reference, width = make(network)
    other = network.data(samples=2, seed=9)
    elsewhere = Reference(model, other, low=network.is_rounded)
    reference.lost = max(reference.lost, elsewhere.lost)
    J, J2 = reference.J, elsewhere.J
    with untouched(model, x, other), rules_hold(reference):
        K = ntkops.ntk(model, x, outputs=outputs_of(choice, width), engine=engine, **knobs)
        crossed = K.cross(other)
        expected, square = contract(choice, J2, J, width), contract(choice, J, J, width)
        size = reference.size * elsewhere.size
        v = block(square.shape[-1], 3)
        scale = float(v.norm())
        reference.check("cross v", crossed @ v, expected @ v, scale * size)
        u = block(expected.shape[-2], 2, seed=6)
        reference.check("crossᵀ u", crossed.mT @ u, expected.mT @ u, float(u.norm()) * size)
        reference.check("K v", K @ v, square @ v, scale * reference.size**2)
        reference.check("rows", K[..., :2, :] @ v, square[..., :2, :] @ v, scale * reference.size**2)
        if knobs["max_dense_bytes"] == "auto":
            reference.check("cross", crossed.to_dense(), expected, size)
