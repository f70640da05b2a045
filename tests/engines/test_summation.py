"""Long sums lose nothing in float32, whatever the shapes of their products."""

import pytest
import torch

from ntkops.engines.summation import COLUMNS, Total, Workspace, long_product


def matrix(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) + 0.3  # sums grow, as those of a trace do


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows, length", [(2, 3), (8, COLUMNS), (80, COLUMNS), (8, 2**20), (33, 100_001)])
def test_long_products(rows, length):
    left, right = matrix(rows, length), matrix(rows, length, seed=1).mT
    exact = left.double() @ right.double()
    assert error(long_product(left, right), exact) < 1.5e-7
    out = torch.empty(rows, rows)
    assert long_product(left, right, out) is out
    assert error(out, exact) < 1.5e-7
    torch.testing.assert_close(long_product(left.double(), right.double()), exact)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("length", [50, 3 * COLUMNS + 1, 40 * COLUMNS])
def test_totals_add_every_product_once(symmetric, length):
    left = matrix(2, 1, 12, length)
    right = left if symmetric else matrix(2, 1, 9, length, seed=1)
    shown = torch.tril if symmetric else torch.clone
    exact = left[:, 0].double() @ right[:, 0].double().mT + 1
    for single in (True, False):
        target = torch.ones(2, 12, right.shape[2])
        total = Total(target, 12, symmetric, length, Workspace())
        if single:
            total.add_each(left, right)
        else:
            for number in range(2):
                total.add(number, left[number, 0], right[number, 0])
        total.finish()
        for number in range(2):
            assert error(shown(target[number]), shown(exact[number])) < 1.5e-7
