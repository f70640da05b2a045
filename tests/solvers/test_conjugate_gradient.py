import pytest
import torch

from ntkops.errors import DtypeError, InputError, NonFiniteError, NotConvergedError, ShapeError
from ntkops.results import SolveInfo
from ntkops.solvers import ConjugateGradient, conjugate_gradient
from ntkops.vectors import Space
from tests.solvers.systems import Counted, OddSpace, block, decaying, relative_residuals, with_spectrum

N = 40
SPACE = Space(N, torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_every_column_meets_its_tolerance_by_its_true_residual(seed):
    A, b = decaying(N, -3, seed), block(N, 5, seed)
    product = Counted(A)
    x, info = conjugate_gradient(product, b, SPACE, tolerance=1e-9)
    assert info.converged and info.reason == "converged"
    torch.testing.assert_close(info.residuals, relative_residuals(A, x, b), rtol=1e-3, atol=1e-16)
    assert bool((info.residuals <= 1e-9).all())
    assert info.products == product.columns
    assert len(info.history) == info.iterations


def test_a_hard_column_is_not_hidden_by_easy_ones():
    # One column needs all directions, nine are eigenvectors: a mean over columns would say 1e-2 at once.
    values = torch.logspace(0, -4, N, dtype=torch.float64)
    A = with_spectrum(values)
    vectors = torch.linalg.eigh(A).eigenvectors
    b = torch.cat([vectors[:, -9:], block(N, 1)], dim=1)
    x, info = conjugate_gradient(lambda V: A @ V, b, SPACE, tolerance=1e-6)
    assert bool((relative_residuals(A, x, b) <= 1e-6).all())
    assert info.converged


def test_converged_columns_leave_the_products():
    A = decaying(N, -3)
    vectors = torch.linalg.eigh(A).eigenvectors
    b = torch.cat([vectors[:, -3:], block(N, 1)], dim=1)
    product = Counted(A)
    _, info = conjugate_gradient(product, b, SPACE)
    assert product.widths[0] == 4 and product.widths[-1] == 1
    assert info.products < 1.2 * info.iterations + 10


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_matrix_and_columns_do_not_matter(scale, dtype):
    A = (decaying(N, -3) * scale).to(dtype)
    b = block(N, 3, dtype=dtype)
    b[:, 1] *= 1e15
    b[:, 2] *= 1e-15
    x, info = conjugate_gradient(lambda V: A @ V, b, Space(N, dtype), tolerance=1e-4)
    assert bool((relative_residuals(A, x, b) <= 1.05e-4).all())


def test_powers_of_two_change_nothing_but_the_scale():
    A, b = decaying(N, -3), block(N, 2)
    x, info = conjugate_gradient(lambda V: A @ V, b, SPACE)
    y, other = conjugate_gradient(lambda V: A @ V, b * 2.0**-40, SPACE)
    assert torch.equal(x * 2.0**-40, y) and other.products == info.products


def test_float32_says_that_it_stagnates_and_hands_over_what_it_has():
    n = 20  # the fewer, the sooner: 750 steps
    A = decaying(n, -6).float()
    b = block(n, 3, dtype=torch.float32)
    with pytest.raises(NotConvergedError, match="round too coarsely") as caught:
        conjugate_gradient(lambda V: A @ V, b, Space(n, torch.float32), tolerance=1e-7, max_iterations=20_000)
    x, info = caught.value.result
    assert isinstance(info, SolveInfo) and not info.converged and info.reason == "stagnated"
    true = relative_residuals(A, x, b)
    assert bool((true < 0.1).all())
    torch.testing.assert_close(info.residuals, true, rtol=0.5, atol=1e-5)


def test_running_out_of_steps_keeps_the_true_residual():
    A, b = decaying(N, -6), block(N, 2)
    with pytest.raises(NotConvergedError, match="max_iterations") as caught:
        conjugate_gradient(lambda V: A @ V, b, SPACE, max_iterations=7)
    x, info = caught.value.result
    assert info.iterations == 7 and info.reason == "max_iterations"
    torch.testing.assert_close(info.residuals, relative_residuals(A, x, b).clamp(max=1.0))
    again, info = conjugate_gradient(lambda V: A @ V, b, SPACE, max_iterations=7, raise_on_failure=False)
    assert torch.equal(x, again) and not info.converged


def test_an_indefinite_matrix_is_named():
    A = with_spectrum(torch.linspace(-1, 1, N, dtype=torch.float64))
    with pytest.raises(NotConvergedError, match="not positive definite") as caught:
        conjugate_gradient(lambda V: A @ V, block(N, 2), SPACE)
    assert caught.value.result.info.reason == "indefinite"


def test_a_preconditioner_that_is_not_positive_is_named():
    with pytest.raises(NotConvergedError, match="preconditioner is not positive"):
        conjugate_gradient(lambda V: V, block(N, 2), SPACE, preconditioner=lambda V: -V)


def test_zero_columns_and_exact_guesses_cost_no_step():
    A, b = decaying(N, -3), block(N, 2)
    b[:, 0] = 0
    x, info = conjugate_gradient(lambda V: A @ V, b, SPACE)
    assert bool((x[:, 0] == 0).all()) and float(info.residuals[0]) == 0
    _, info = conjugate_gradient(lambda V: A @ V, b, SPACE, initial=x)
    assert info.iterations == 0 and info.converged


def test_a_batch_solves_one_system_for_each_member():
    A = torch.stack([decaying(N, -3), decaying(N, -3, 1) + torch.eye(N)])
    b = torch.stack([block(N, 3), block(N, 3, 2)])
    x, info = conjugate_gradient(lambda V: A @ V, b, SPACE, tolerance=1e-8)
    assert x.shape == b.shape and info.residuals.shape == (2, 3)
    assert bool((relative_residuals(A, x, b) <= 1e-8).all())
    for member in range(2):
        alone, _ = conjugate_gradient(lambda V, m=member: A[m] @ V, b[member], SPACE, tolerance=1e-8)
        torch.testing.assert_close(x[member], alone, rtol=1e-5, atol=1e-6)


def test_a_vector_gives_a_vector():
    A, b = decaying(N, -3), block(N, 1)[:, 0]
    x, info = conjugate_gradient(lambda V: A @ V, b, SPACE)
    assert x.shape == (N,) and float((A @ x - b).norm()) <= 1e-6 * float(b.norm())


def test_only_the_space_takes_inner_products():
    A, b = decaying(N, -3), block(N, 2)
    x, info = conjugate_gradient(lambda V: A @ V, b, OddSpace(N, torch.float64))
    y, other = conjugate_gradient(lambda V: A @ V, b, SPACE)
    assert info.iterations == other.iterations
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_an_iteration_goes_on_bit_for_bit_from_its_state():
    A, b = decaying(N, -3), block(N, 3)
    kept = []
    whole, info = conjugate_gradient(
        lambda V: A @ V,
        b,
        SPACE,
        callback=lambda it: kept.append(it.state()) if it.iterations == 15 else None,
    )
    assert all(isinstance(value, torch.Tensor) for value in kept[0].values())
    resumed, again = conjugate_gradient(lambda V: A @ V, b, SPACE, state=kept[0])
    assert torch.equal(whole, resumed)
    assert (again.products, again.iterations) == (info.products, info.iterations)
    assert torch.equal(again.history, info.history)
    with pytest.raises(ShapeError, match="another system"):
        conjugate_gradient(lambda V: A @ V, b[:, :1], SPACE, state=kept[0])


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    A = decaying(N, -3)
    conjugate_gradient(lambda V: A @ V, block(N, 2), SPACE)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input_is_told():
    A, b = decaying(N, -3), block(N, 2)
    for tolerance in (0, 1, -1.0, float("nan"), True, "small"):
        with pytest.raises(InputError, match="tolerance"):
            conjugate_gradient(lambda V: A @ V, b, SPACE, tolerance=tolerance)
    with pytest.raises(InputError, match="max_iterations"):
        conjugate_gradient(lambda V: A @ V, b, SPACE, max_iterations=0)
    with pytest.raises(ShapeError, match="needs shape"):
        conjugate_gradient(lambda V: A @ V, b[:-1], SPACE)
    with pytest.raises(DtypeError, match="float32"):
        conjugate_gradient(lambda V: A @ V, b.float(), SPACE)
    with pytest.raises(ShapeError, match="not square"):
        conjugate_gradient(lambda V: A[:-1] @ V, b, SPACE)
    bad = b.clone()
    bad[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="right-hand side holds NaN or infinity in column 1"):
        conjugate_gradient(lambda V: A @ V, bad, SPACE)
    with pytest.raises(NonFiniteError, match="product"):
        conjugate_gradient(lambda V: A @ V * float("nan"), b, SPACE)


def test_steps_can_be_made_one_by_one():
    A, b = decaying(N, -1), block(N, 1)
    iteration = ConjugateGradient(lambda V: A @ V, b, SPACE)
    while iteration.running:
        iteration.step()
    assert iteration.reason == "converged"
    assert float(relative_residuals(A, iteration.solution(), b)) <= 1e-6
