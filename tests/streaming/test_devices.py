"""Batches on the CPU for a model elsewhere: moved one by one, one ahead on CUDA."""

import pytest
import torch

import ntkops
from ntkops.model.stream import moved_ahead
from tests.streaming.sources import Counted, made, samples, uneven

N = 41
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_elsewhere_each_batch_is_moved_as_it_is_asked_for():
    asked = []

    class Piece:
        def __init__(self, number):
            self.number = number

        def map(self, change):
            return self.number

    def pieces():
        for number in range(3):
            asked.append(number)
            yield Piece(number)

    moved = moved_ahead(pieces(), torch.device("cpu"))
    assert next(moved) == 0
    assert asked == [0]
    assert list(moved) == [1, 2]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["mlp", "conv", "mixed"])
def test_a_stream_on_the_cpu_follows_its_model(name):
    model, shape = made(name)
    x = samples(N, *shape)
    held = ntkops.ntk(model, x)
    source = Counted(x, uneven(N))
    K = ntkops.ntk(model.to("cuda"), source)
    source.clear()
    found = ntkops.trace(K, method="exact").value
    assert source.samples == N
    torch.testing.assert_close(found, ntkops.trace(held, method="exact").value, rtol=1e-10, atol=0)
    v = samples(K.shape[-1], 2, seed=3)
    torch.testing.assert_close((K @ v.cuda()).cpu(), held @ v, rtol=1e-9, atol=1e-9)
    norms = [ntkops.frobenius_norm(one, method="exact").value for one in (K, held)]
    torch.testing.assert_close(*norms, rtol=1e-10, atol=0)


@pytest.mark.gpu
@needs_cuda
def test_one_batch_is_read_ahead_and_two_are_held():
    read = []

    class Watched:
        def __iter__(self):
            for number in range(6):
                read.append(number)
                yield torch.full((4, 3), float(number))

    model = torch.nn.Linear(3, 2).cuda()
    inputs = ntkops.linearize(model).inputs(Watched())
    read.clear()
    for number, (_, _, batch) in enumerate(inputs.batches(None)):
        assert read[-1] == min(number + 1, 5)
        (tensor,) = batch.tensors
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), torch.full((4, 3), float(number)))
