"""Probes drawn sample by sample against the paper's Hutch++: error and time on two networks of the paper.

Run ``python benchmarks/stratified.py``; ``--repetitions`` and ``--no-digits`` make it shorter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ntkops

COLUMNS = 2
PAPER_PASSES = (60, 120, 180, 240, 360, 480, 600, 800)


def perceptron() -> tuple[nn.Module, Tensor]:
    """Return the paper's MLP, ReLU after the last layer too, and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs in (100, *[64] * 14):
            layers += [nn.Linear(inputs, 64), nn.ReLU()]
        return nn.Sequential(*layers), torch.randn(50, 100)


def digits(epochs: int = 30) -> tuple[nn.Module, Tensor, nn.Module]:
    """Return a trained digits classifier 64-256-10, 256 test images, and the classifier before training."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, start = (nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)) for _ in range(2))
        start.load_state_dict(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(epochs):
            for part in torch.randperm(1500).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    return model, x[1500:1756], start


def measure(
    estimate: Callable[[torch.Generator], ntkops.Estimate], truth: float, repetitions: int
) -> tuple[float, float, float, float]:
    """Return median error, median milliseconds, median passes and the share of intervals that cover."""
    errors, times, passes, inside = [], [], [], 0
    for seed in range(repetitions):
        started = time.perf_counter()
        result = estimate(torch.Generator().manual_seed(seed))
        times.append(1e3 * (time.perf_counter() - started))
        errors.append(abs(float(result) / truth - 1))
        passes.append(float(result.passes))
        inside += float(result.interval[0]) <= truth <= float(result.interval[1])
    median = statistics.median
    return median(errors), median(times), median(passes), inside / repetitions


def show(label: str, numbers: tuple[float, float, float, float]) -> None:
    """Print one line."""
    error, milliseconds, passes, covered = numbers
    print(
        f"{label:44} error {error:8.2e}  {milliseconds:9.2f} ms  {passes:6.0f} passes  covered {covered:.2f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=41)
    parser.add_argument("--paper-repetitions", type=int, default=21)
    parser.add_argument("--no-digits", action="store_true")
    arguments = parser.parse_args()
    quantities = {
        "trace": ntkops.trace,
        "norm": ntkops.frobenius_norm,
        "effective rank": ntkops.effective_rank,
    }
    model, x = perceptron()
    kernel, plain = (
        ntkops.ntk(model, x, max_dense_bytes=0),
        ntkops.ntk(model, x, engine="autograd", max_dense_bytes=0),
    )
    for name, quantity in quantities.items():
        truth = float(quantity(kernel, method="exact"))

        def ours(
            generator: torch.Generator, quantity: Callable[..., ntkops.Estimate] = quantity
        ) -> ntkops.Estimate:
            return quantity(kernel, method="stratified", num_passes=COLUMNS, generator=generator)

        found = measure(ours, truth, arguments.repetitions)
        show(f"MLP {name}, stratified", found)
        for passes in PAPER_PASSES:

            def paper(
                generator: torch.Generator,
                quantity: Callable[..., ntkops.Estimate] = quantity,
                passes: int = passes,
            ) -> ntkops.Estimate:
                return quantity(plain, method="hutch++", num_passes=passes, generator=generator)

            numbers = measure(paper, truth, arguments.paper_repetitions)
            show(f"MLP {name}, Hutch++ by autograd", numbers)
            if numbers[0] <= found[0]:
                print(f"    {numbers[1] / found[1]:.1f} times the time at the same error")
                break
    if arguments.no_digits:
        return
    trained, images, start = digits()
    kernel, other = (ntkops.ntk(m, images, max_dense_bytes=0) for m in (trained, start))
    for name, quantity in quantities.items():
        truth = float(quantity(kernel, method="exact"))
        show(
            f"digits {name}, stratified",
            measure(
                lambda g, q=quantity: q(kernel, method="stratified", num_passes=COLUMNS, generator=g),
                truth,
                arguments.repetitions,
            ),
        )
    truth = float(ntkops.alignment(kernel, other, method="exact"))
    show(
        "digits alignment, stratified",
        measure(
            lambda g: ntkops.alignment(
                kernel, other, method="stratified", num_passes=2 * COLUMNS, generator=g
            ),
            truth,
            arguments.repetitions,
        ),
    )


if __name__ == "__main__":
    main()
