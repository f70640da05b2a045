import pytest
import torch

from ntkops.errors import InputError, NonFiniteError, NotConvergedError
from ntkops.solvers import lsmr
from ntkops.vectors import Space
from tests.solvers.systems import block, relative_residuals

N, P = 80, 120
J = block(N, P, 3) * torch.logspace(0, -2, P, dtype=torch.float64)
ROWS, COLUMNS = Space(N, torch.float64), Space(P, torch.float64)


def solve(b, **options):
    return lsmr(lambda V: J @ V, lambda V: J.mT @ V, b, ROWS, COLUMNS, **options)


@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_it_solves_the_dual_system(ridge):
    b = block(N, 3)
    b[:, 1] = 0
    b[:, 2] *= 1e9
    x, info = solve(b, ridge=ridge, tolerance=1e-8)
    kept = [0, 2]
    true = relative_residuals(J @ J.mT + ridge * torch.eye(N), x[:, kept], b[:, kept])
    assert info.converged and bool((true <= 1.001e-8).all())
    torch.testing.assert_close(info.residuals[kept], true, rtol=1e-2, atol=1e-12)
    assert float(x[:, 1].abs().max()) == 0
    # w = Jᵀ x is ridge regression.
    primal = torch.linalg.solve(J.mT @ J + ridge * torch.eye(P), J.mT @ b)
    torch.testing.assert_close(J.mT @ x[:, 0], primal[:, 0], rtol=1e-5, atol=1e-6)


def test_a_vector_gives_a_vector():
    x, _ = solve(block(N, 1)[:, 0], ridge=1e-2)
    assert x.shape == (N,)


def test_what_fails_hands_over_what_there_is():
    with pytest.raises(NotConvergedError, match="max_iterations") as caught:
        solve(block(N, 1), ridge=1e-6, max_iterations=2)
    assert caught.value.result.solution.shape == (N, 1)


def test_bad_input_is_told():
    for ridge in (0.0, -1, float("nan"), True):
        with pytest.raises(InputError, match="ridge"):
            solve(block(N, 1), ridge=ridge)
    with pytest.raises(NonFiniteError):
        solve(block(N, 1) * float("nan"), ridge=1.0)
