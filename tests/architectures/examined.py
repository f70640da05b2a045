"""Every quantity of a random program against its dense Jacobian, and what it may be refused for.

As a program it looks for what fails and prints it, with the smallest program that fails in the same way:

    python -m tests.architectures.examined --count 300 --engine autograd --first 0
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import time
import warnings
from collections.abc import Iterator

import torch

import ntkops
from ntkops.errors import CoupledSamplesError, DifferentiationError, ModelMutationError, NtkopsError
from tests.laws.reference import jacobian, kernel, normal

from .programs import COUPLED, ONE_WAY, WRITING, Program, draw_program, shorter

__all__ = ["Wrong", "examine"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


class Wrong(AssertionError):
    """A number that is not what it must be, a refusal of what is right, or an exception that is not ours."""


def _allowed(program: Program, quantity: str) -> tuple[type[NtkopsError], ...]:
    """Return what a quantity of a program may be refused with; most of them with nothing."""
    allowed: tuple[type[NtkopsError], ...] = ()
    if program.kinds & set(COUPLED) and program.samples > 1:
        allowed += (CoupledSamplesError,)
    if program.kinds & set(ONE_WAY) and quantity in ("J p", "K v", "K v again", "cross v"):
        allowed += (DifferentiationError,)
    return allowed


def _reference(program: Program, dtype: torch.dtype, seed: int) -> torch.Tensor:
    data = program.data(dtype, seed)
    doubled = [leaf.double().clone() if leaf.is_floating_point() else leaf for leaf in data]
    return jacobian(program.build(dtype).double(), tuple(doubled))


def examine(
    program: Program, engine: str, dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] | None = None
) -> None:
    """Compare every quantity of one engine, in batches of one, of some and of all samples.

    Raises:
        Wrong: At the first that differs or is refused without need.
    """
    if program.kinds & set(WRITING):
        return _must_be_refused(program, engine, dtype)
    J, J2 = _reference(program, dtype, 1), _reference(program, dtype, 2)
    n, o = program.samples, program.outputs
    model, x, x2 = program.build(dtype), tuple(program.data(dtype)), tuple(program.data(dtype, 2))
    tolerance = TOLERANCES[dtype]
    size_of_K, cross_size = float(J.norm() ** 2), float(J.norm() * J2.norm())
    v, p, w = normal(n * o, 2, seed=5), normal(J.shape[1], 2, seed=6), normal(n, 2, o, seed=7)
    low_v, low_p, low_w = v.to(dtype), p.to(dtype), w.to(dtype)
    g = torch.einsum("nop,nro->nrp", J.unflatten(0, (n, o)), w)

    def quantities(size: int) -> Iterator[tuple[str, object, torch.Tensor, float]]:
        options = {"engine": engine, "batch_size": size}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if not J.any() else "error", ntkops.NtkopsWarning)
            K = ntkops.ntk(model, x, max_dense_bytes=0, **options)
            whole = J @ J.T
            yield "J' v", lambda: K.left.mT @ low_v, J.T @ v, float(J.norm() * v.norm())
            yield "J p", lambda: K.left @ low_p, J @ p, float(J.norm() * p.norm())
            for number in range(3):
                name = "K v again" if number else "K v"
                yield name, lambda: K @ low_v, whole @ v, size_of_K * float(v.norm())
            yield (
                "gram",
                lambda: K.sample_gram(low_w),
                torch.einsum("nrp,msp->nrms", g, g),
                float(g.norm() ** 2),
            )
            yield "diagonal", lambda: K.diagonal(), whole.diagonal(), size_of_K
            total = whole.trace()
            yield "trace", lambda: _exact_trace(K), total, size_of_K
            yield "cross v", lambda: K.cross(x2) @ low_v, J2 @ (J.T @ v), cross_size * float(v.norm())
            choice = ("all", "each", "trace")[(program.seed + size) % 3]
            M = ntkops.ntk(model, x, outputs=choice, **options)
            yield f"dense {choice}", lambda: M.to_dense(), kernel(J, J, o, choice), size_of_K
            expected = kernel(J2, J, o, choice)
            yield f"dense cross {choice}", lambda: M.cross(x2).to_dense(), expected, cross_size

    for size in dict.fromkeys(sizes or (1, 2 + program.seed % 2, n)):
        quantity, found = "making K", False
        steps = quantities(size)
        while True:
            try:
                made = next(steps, None)
                if made is None:
                    break
                quantity, compute, expected, scale = made
                result = compute()
            except NtkopsError as error:
                if not isinstance(error, _allowed(program, quantity)):
                    raise Wrong(f"{quantity} in batches of {size}: refused: {_named(error)}") from error
                if quantity == "making K":
                    break
                continue
            except Exception as error:
                raise Wrong(f"{quantity} in batches of {size}: foreign error: {_named(error)}") from error
            found = True
            error = float((result.double() - expected).norm())
            if result.shape != expected.shape or not error <= tolerance * scale + 1e-12:
                raise Wrong(f"{quantity} in batches of {size}: off by {error / max(scale, 1e-300):.2g}")
        # Products of automatic differentiation in one batch are right, whatever depends on whatever.
        if found and program.is_coupled and not (engine == "autograd" and size == n):
            raise Wrong(f"a kernel in batches of {size}: samples are coupled, unnoticed")


def _must_be_refused(program: Program, engine: str, dtype: torch.dtype) -> None:
    """Hold that a model which writes to its buffers or inputs is refused, and left as it was."""
    model, x = program.build(dtype), tuple(program.data(dtype))
    before = [tensor.clone() for tensor in (*model.state_dict().values(), *x)]
    try:
        ntkops.ntk(model, x, engine=engine)
    except ModelMutationError:
        if not all(map(torch.equal, before, (*model.state_dict().values(), *x))):
            raise Wrong("making K in batches of 0: it changed the model or its inputs") from None
    except Exception as error:
        raise Wrong(f"making K in batches of 0: foreign error: {_named(error)}") from error
    else:
        raise Wrong("making K in batches of 0: a model that writes is not refused")


def _exact_trace(K: ntkops.NTKOperator) -> torch.Tensor:
    return torch.tensor(float(ntkops.trace(K, method="exact")), dtype=torch.float64)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def _kind(error: Wrong) -> str:
    """Return what is the same in failures of one kind: no numbers, sizes or quantities."""
    text = str(error)
    text = "silently wrong" if ": off by" in text else re.sub(r"^.*? in batches of \d+: ", "", text)
    return re.sub(r"[\d.]+", "#", re.sub(r"'[^']*'|\(.*", "", text))[:110]


def _failure(program: Program, engine: str, dtype: torch.dtype) -> Wrong | None:
    try:
        examine(program, engine, dtype)
    except Wrong as error:
        return error
    return None


def main() -> None:
    """Examine programs one seed after the other and sum up what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--whole", action="store_true", help="do not look for the smallest program")
    given = parser.parse_args()
    dtype = torch.float32 if given.float32 else torch.float64
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    start = time.process_time()
    for seed in range(given.first, given.first + given.count):
        program = draw_program(random.Random(seed))
        error = _failure(program, given.engine, dtype)
        if error is None:
            continue
        kind = _kind(error)
        print(f"seed {seed}: {error}\n    {program}", flush=True)
        if not kinds[kind] and not given.whole:
            small = shorter(
                program, lambda p, kind=kind: (e := _failure(p, given.engine, dtype)) and _kind(e) == kind
            )
            print(f"    smallest: {small}", flush=True)
        kinds[kind].append(str(seed))
    failed = sum(map(len, kinds.values()))
    print(f"{failed} of {given.count} programs failed, {time.process_time() - start:.0f} s of CPU time")
    for kind, seeds in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):5d}  {kind}  (seeds {', '.join(seeds[:8])})")


if __name__ == "__main__":
    main()
