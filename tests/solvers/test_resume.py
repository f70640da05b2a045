"""An iteration that is gone on from its file has the bits of one that was never interrupted."""

import pytest
import torch

import ntkops
from ntkops.solvers import conjugate_gradient, nystrom_preconditioner, products_are_steady
from ntkops.vectors import Space
from tests.pairs import pairs

N = 60


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def system(request):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(N, 40, generator=generator, dtype=torch.float64)
    K = (root @ root.T).to(request.param)
    return K, torch.randn(N, 2, generator=generator, dtype=torch.float64).to(request.param)


def solve(system, path, *, seed=3, tolerance=1e-5, ridge=1.0, stop=None, every=3, rank=5):
    K, rhs = system
    space = Space(N, K.dtype)
    generator = torch.Generator().manual_seed(seed)
    made = nystrom_preconditioner(lambda V: K @ V, ridge, space, rank, generator=generator)

    def interrupt(iteration):
        if iteration.iterations == stop:
            raise KeyboardInterrupt

    return conjugate_gradient(
        lambda V: K @ V + ridge * V,
        rhs,
        space,
        preconditioner=made,
        tolerance=tolerance,
        checkpoint=path,
        checkpoint_every=every,
        callback=interrupt,
    )


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_interrupted_and_resumed_has_the_same_bits(system, tmp_path, stop):
    x, info = solve(system, None)
    with pytest.raises(KeyboardInterrupt):
        solve(system, tmp_path / "state", stop=stop)
    assert (tmp_path / "state").exists() == (stop >= 3)
    y, again = solve(system, tmp_path / "state")
    assert torch.equal(x, y)
    assert torch.equal(info.history, again.history) and torch.equal(info.residuals, again.residuals)
    assert (info.iterations, info.products) == (again.iterations, again.products)


def test_a_finished_file_gives_the_solution_without_a_step(system, tmp_path):
    x, info = solve(system, tmp_path / "state")
    y, again = solve(system, tmp_path / "state")
    assert torch.equal(x, y) and again.iterations == info.iterations


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 4}, "preconditioner is another one"),
        ({"tolerance": 1e-4}, "tolerance"),
        ({"ridge": 2.0}, "products have other bits"),
    ],
)
def test_a_file_of_another_system_is_refused(system, tmp_path, change, text):
    solve(system, tmp_path / "state")
    with pytest.raises(ntkops.errors.CheckpointError, match=text):
        solve(system, tmp_path / "state", **change)


def test_another_right_hand_side_is_refused(system, tmp_path):
    solve(system, tmp_path / "state")
    with pytest.raises(ntkops.errors.CheckpointError, match="right-hand side is another one"):
        solve((system[0], system[1] + 1), tmp_path / "state")


def test_another_number_of_threads_is_refused(system, tmp_path):
    before = torch.get_num_threads()
    solve(system, tmp_path / "state")
    try:
        torch.set_num_threads(before + 1)
        with pytest.raises(ntkops.errors.CheckpointError, match="number of threads"):
            solve(system, tmp_path / "state")
    finally:
        torch.set_num_threads(before)


def test_a_damaged_file_is_refused(system, tmp_path):
    solve(system, tmp_path / "state")
    data = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(data[: len(data) // 2])
    with pytest.raises(ntkops.errors.CheckpointError, match="cut short"):
        solve(system, tmp_path / "state")


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_the_interval_is_a_number_of_steps(system, tmp_path, every):
    with pytest.raises(ntkops.errors.InputError, match="checkpoint_every"):
        solve(system, tmp_path / "state", every=every)


def test_a_folder_that_is_missing_is_named(system, tmp_path):
    with pytest.raises(ntkops.errors.CheckpointError, match="could not be written|no folder|missing"):
        solve(system, tmp_path / "missing" / "state")


@pytest.mark.parametrize("engine, outputs, limit", pairs(["auto", "autograd"], [1, 8], [0, "auto"]))
def test_products_of_kernels_go_one_way(tmp_path, engine, outputs, limit):
    """A kernel goes over to factors or a dense block as it is used: not within an iteration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, outputs))
        x, rhs = torch.randn(16, 5), torch.randn(16 * outputs, 2)

    def run(path, stop=None, before=0):
        K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=limit)  # as in a new process
        for _ in range(before):
            K @ rhs

        def interrupt(iteration):
            if iteration.iterations == stop:
                raise KeyboardInterrupt

        return conjugate_gradient(
            lambda V: K @ V + V,
            rhs,
            K.space,
            tolerance=1e-4,
            checkpoint=path,
            checkpoint_every=1,
            callback=interrupt,
        )

    whole = run(None)
    for stop in (1, 4):
        path = tmp_path / f"state{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(path, stop)
        again = run(path, before=2 * (stop == 4))  # what was multiplied before is no matter either
        assert torch.equal(whole.solution, again.solution)
        assert torch.equal(whole.info.history, again.info.history)


def test_products_outside_an_iteration_are_as_they_were():
    assert not products_are_steady()
    seen = []

    def multiply(V):
        seen.append(products_are_steady())
        return 2 * V

    conjugate_gradient(multiply, torch.ones(3), Space(3, torch.float32))
    assert all(seen) and not products_are_steady()
