"""Every product and block of every kind of model against a dense float64 Jacobian."""

import pytest
import torch

import ntkops
from tests.cases import BY_NAME, CASES, EXPECTED_RUNGS, REVERSE_ONLY, reference_jacobian

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
MODELS = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def close(actual, expected, dtype):
    scale = max(1.0, float(expected.abs().max()))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


def random_block(rows, columns, dtype, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


@DTYPES
@MODELS
def test_products_match_the_dense_jacobian(case, dtype):
    model = case.make()
    J = reference_jacobian(case, model, case.data())
    operator = ntkops.jacobian(model.to(dtype), case.data(dtype=dtype), **case.options)
    assert operator.shape == J.shape
    p, v = random_block(J.shape[1], 3, dtype), random_block(J.shape[0], 3, dtype)
    close(operator @ p, J @ p.double(), dtype)
    close(operator.mT @ v, J.T @ v.double(), dtype)
    close(operator @ p[:, 0], J @ p[:, 0].double(), dtype)
    kernel = ntkops.ntk(model, case.data(dtype=dtype), max_dense_bytes=0, **case.options)
    close(kernel @ v, J @ (J.T @ v.double()), dtype)
    assert kernel.engine_info.mode == EXPECTED_RUNGS.get(case.name, "forward")


@DTYPES
@MODELS
def test_blocks_match_the_dense_jacobian(case, dtype):
    model = case.make()
    count = 3
    J = reference_jacobian(case, model, case.data())
    K = J @ J.T
    outputs = len(J) // count
    model, x = model.to(dtype), case.data(dtype=dtype)
    lazy = ntkops.ntk(model, x, **case.options)
    close(lazy.to_dense(), K, dtype)
    close(ntkops.ntk(model, x, max_dense_bytes=0, **case.options).diagonal(), K.diagonal(), dtype)
    blocks = K.reshape(count, outputs, count, outputs)
    each = torch.einsum("icjc->cij", blocks)
    close(ntkops.ntk(model, x, outputs="each", **case.options).to_dense(), each, dtype)
    close(ntkops.ntk(model, x, outputs="trace", **case.options).to_dense(), each.sum(0), dtype)
    close(ntkops.jacobian(model, x, **case.options).to_dense(), J, dtype)


@DTYPES
@MODELS
def test_cross_kernels_match(case, dtype):
    model = case.make()
    J1, J2 = (reference_jacobian(case, model, case.data(n, seed=s)) for n, s in ((3, 1), (2, 9)))
    model = model.to(dtype)
    K = ntkops.ntk(model, case.data(3, dtype, seed=1), **case.options)
    cross = K.cross(case.data(2, dtype, seed=9))
    close(cross.to_dense(), J2 @ J1.T, dtype)
    v = random_block(len(J1), 2, dtype)
    close(cross @ v, J2 @ (J1.T @ v.double()), dtype)
    both = ntkops.ntk(model, case.data(2, dtype, seed=9), case.data(3, dtype, seed=1), **case.options)
    close(both.mT @ v[: len(J2)], J1 @ (J2.T @ v[: len(J2)].double()), dtype)


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


@pytest.mark.parametrize("name", ["mlp", "gru-time", "tied"])
@pytest.mark.parametrize("batch_size, chunk_size", [(1, 1), (2, 3), (3, 64)])
def test_chunks_do_not_change_results(name, batch_size, chunk_size):
    case = BY_NAME[name]
    model, x = case.make(), case.data()
    reference = ntkops.ntk(model, x, max_dense_bytes=0, **case.options)
    chunked = ntkops.ntk(
        model, x, max_dense_bytes=0, batch_size=batch_size, chunk_size=chunk_size, **case.options
    )
    v = random_block(reference.shape[0], 5, torch.float64)
    torch.testing.assert_close(chunked @ v, reference @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.diagonal(), reference.diagonal(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "gru-time", "dict"])
def test_state_order_is_sample_major(name):
    case = BY_NAME[name]
    model, x = case.make(), case.data(4)
    K = ntkops.ntk(model, x, **case.options)
    outputs = K.num_outputs
    first = case.data(4)
    part = {k: v[1:2] for k, v in first.items()} if isinstance(first, dict) else first[1:2]
    alone = ntkops.ntk(model, part, **case.options)
    rows = slice(outputs, 2 * outputs)
    torch.testing.assert_close(K[rows, rows].to_dense(), alone.to_dense())


def test_parameters_add_up():
    case = BY_NAME["mlp"]
    model, x = case.make(), case.data()
    whole = ntkops.ntk(model, x).to_dense()
    parts = [ntkops.ntk(model, x, params=name).to_dense() for name, _ in model.named_parameters()]
    torch.testing.assert_close(sum(parts), whole)


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


def test_sample_gram_is_the_gram_of_per_sample_gradients():
    case = BY_NAME["gru-time"]
    model, x = case.make(), case.data()
    J = reference_jacobian(case, model, x).reshape(3, 12, -1)
    cotangents = random_block(3 * 2, 12, torch.float64).reshape(3, 2, 12)
    gradients = torch.einsum("iro,iop->irp", cotangents, J)
    gram = ntkops.ntk(model, x, **case.options).sample_gram(cotangents)
    torch.testing.assert_close(gram, torch.einsum("irp,jsp->irjs", gradients, gradients))
