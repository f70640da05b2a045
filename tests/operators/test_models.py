"""Every product and block of every kind of model against a dense float64 Jacobian.

In float32; those of the laws' zoo are held to the same in float64 there, on every engine.
"""

import pytest
import torch

import ntkops
from tests.cases import BY_NAME, CASES, EXPECTED_RUNGS, REVERSE_ONLY, reference_jacobian
from tests.laws.zoo import ZOO

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
MODELS = [
    (case, dtype)
    for case in CASES
    for dtype in ((torch.float32,) if case.name in ZOO else (torch.float64, torch.float32))
]


def close(actual, expected, dtype):
    scale = max(1.0, float(expected.abs().max()))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


def random_block(rows, columns, dtype, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("case", "dtype"), MODELS, ids=lambda value: getattr(value, "name", str(value)))
def test_products_blocks_and_cross_kernels_match_the_dense_jacobian(case, dtype):
    model, count = case.make(), 3
    x, y = case.data(count, dtype, seed=1), case.data(2, dtype, seed=9)
    J, J2 = (reference_jacobian(case, model, case.data(n, seed=s)) for n, s in ((count, 1), (2, 9)))
    p, v = random_block(J.shape[1], 3, dtype), random_block(J.shape[0], 3, dtype)
    f = ntkops.linearize(model.to(dtype), **case.options)

    operator = ntkops.jacobian(f, x)
    assert operator.shape == J.shape
    close(operator @ p, J @ p.double(), dtype)
    close(operator.mT @ v, J.T @ v.double(), dtype)
    close(operator @ p[:, 0], J @ p[:, 0].double(), dtype)
    close(operator.to_dense(), J, dtype)

    K, lazy = J @ J.T, ntkops.ntk(f, x, max_dense_bytes=0)
    assert lazy.engine_info.mode == EXPECTED_RUNGS.get(case.name, "forward")
    close(lazy @ v, K @ v.double(), dtype)
    close(lazy.diagonal(), K.diagonal(), dtype)
    close(ntkops.ntk(f, x).to_dense(), K, dtype)
    each = torch.einsum("icjc->cij", K.reshape(count, len(K) // count, count, -1))
    close(ntkops.ntk(f, x, outputs="each").to_dense(), each, dtype)
    close(ntkops.ntk(f, x, outputs="trace").to_dense(), each.sum(0), dtype)

    cross = ntkops.ntk(f, x).cross(y)
    close(cross.to_dense(), J2 @ J.T, dtype)
    close(cross @ v, J2 @ (J.T @ v.double()), dtype)
    close(ntkops.ntk(f, y, x).mT @ v[: len(J2)], J @ (J2.T @ v[: len(J2)].double()), dtype)


def test_reverse_only_model_has_transposed_products_and_exact_blocks():
    case = REVERSE_ONLY
    model = case.make()
    J = reference_jacobian(case, model, case.data())
    operator = ntkops.jacobian(model, case.data())
    v = random_block(len(J), 2, torch.float64)
    close(operator.mT @ v, J.T @ v, torch.float64)
    assert operator.engine_info.mode == "reverse"
    K = ntkops.ntk(model, case.data())
    close(K.to_dense(), J @ J.T, torch.float64)
    close(K.diagonal(), (J @ J.T).diagonal(), torch.float64)
    with pytest.raises(ntkops.errors.DifferentiationError, match="only Jᵀv exists"):
        operator @ torch.ones(J.shape[1], dtype=torch.float64)


def test_tiles_of_a_small_workspace_give_the_same_kernel(monkeypatch):
    case = BY_NAME["conv"]
    model, x = case.make(), case.data(5)
    expected = ntkops.ntk(model, x).to_dense()
    parameters = sum(p.numel() for p in model.parameters())
    for rows in (1, 2, 4):  # less than a sample, one sample, two samples at a time
        monkeypatch.setattr(
            ntkops.engines.AutogradEngine, "workspace_bytes", lambda self, rows=rows: rows * parameters * 8
        )
        for outputs in ("all", "each", "trace"):
            K = ntkops.ntk(model, x, outputs=outputs)
            dense = K._dense_values(K._args)
            grid = expected.reshape(5, 2, 5, 2)
            wanted = {
                "all": expected,
                "each": torch.einsum("icjc->cij", grid),
                "trace": torch.einsum("icjc->ij", grid),
            }[outputs]
            torch.testing.assert_close(dense, wanted)
            accumulated = torch.zeros_like(wanted)
            for tile in K.tiles():
                accumulated[..., tile.rows, tile.cols] = tile.block
                accumulated[..., tile.cols, tile.rows] = tile.block.mT
            torch.testing.assert_close(accumulated, wanted)
            diagonal = ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=0).diagonal()
            torch.testing.assert_close(diagonal, wanted.diagonal(dim1=-2, dim2=-1))
