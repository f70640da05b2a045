"""Every quantity of a random program against its dense Jacobian, and what it may be refused for.

As a program it looks for what fails and prints it, with the smallest program that fails in the same way:

    python -m tests.architectures.examined --count 300 --engine autograd --first 0
"""

from __future__ import annotations

import argparse
import collections
import functools
import random
import re
import time
import warnings
from collections.abc import Callable

import torch

import ntkops
from ntkops.errors import CoupledSamplesError, DifferentiationError, ModelMutationError, NtkopsError
from tests.laws.reference import jacobian, kernel, normal

from .programs import COUPLED, ONE_WAY, WRITING, Program, draw_program, shorter

__all__ = ["Wrong", "examine"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


_Quantity = tuple[str, bool, Callable[[ntkops.NTKOperator], torch.Tensor], torch.Tensor, float]


class Wrong(AssertionError):
    """A number that is not what it must be, a refusal of what is right, or an exception that is not ours."""


def _allowed(program: Program, quantity: str) -> tuple[type[NtkopsError], ...]:
    """Return what a quantity of a program may be refused with; most of them with nothing."""
    allowed: tuple[type[NtkopsError], ...] = ()
    if program.kinds & set(COUPLED):  # of one sample too: twice the same shows it
        allowed += (CoupledSamplesError,)
    if program.kinds & set(ONE_WAY) and quantity in ("J p", "K v", "K v again", "cross v"):
        allowed += (DifferentiationError,)
    return allowed


def _reference(program: Program, dtype: torch.dtype, seed: int) -> torch.Tensor:
    data = program.data(dtype, seed)
    doubled = [leaf.double().clone() if leaf.is_floating_point() else leaf for leaf in data]
    return jacobian(program.build(dtype).double(), tuple(doubled))


def examine(
    program: Program, engine: str, dtype: torch.dtype = torch.float64, *, thorough: bool = False
) -> None:
    """Compare every quantity of one engine, in batches of one, of some and of all samples in turn.

    With ``thorough`` every quantity is compared in batches of each size.

    Raises:
        Wrong: At the first that differs or is refused without need.
    """
    if program.kinds & set(WRITING):
        return _must_be_refused(program, engine, dtype)
    J, J2 = _reference(program, dtype, 1), _reference(program, dtype, 2)
    n, coupled, crossed = program.samples, program.is_coupled(), program.is_coupled(2)
    sizes = tuple(dict.fromkeys((1, min(2 + program.seed % 2, n), n)))
    quantities = _quantities(program, dtype, J, J2)
    operators = {
        (size, lazy): functools.cache(functools.partial(_operator, program, engine, dtype, size, lazy, J))
        for size in sizes
        for lazy in (True, False)
    }
    for number, (quantity, lazy, compute, expected, scale) in enumerate(quantities):
        for size in sizes if thorough else (sizes[(number // 2 + program.seed) % len(sizes)],):
            where = f"{quantity} in batches of {size}"
            try:
                result = compute(operators[size, lazy]())
            except NtkopsError as error:
                if not isinstance(error, _allowed(program, quantity)):
                    raise Wrong(f"{where}: refused: {_named(error)}") from error
                continue
            except Exception as error:
                raise Wrong(f"{where}: foreign error: {_named(error)}") from error
            # In one batch of all samples nothing is cut: a number may be right, whatever depends on whatever.
            others = crossed and "cross" in quantity
            if (coupled or others) and size < n:
                if any(program.is_coupled(seed, size) for seed in (1, 2)[: 1 + others]):
                    raise Wrong(f"{where}: samples are coupled, unnoticed")
                continue  # nothing shows it: those that are coupled do not meet in a batch
            error = float((result.double() - expected).norm())
            if result.shape != expected.shape or not error <= TOLERANCES[dtype] * scale + 1e-12:
                raise Wrong(f"{where}: off by {error / max(scale, 1e-300):.2g}")


def _choice(program: Program) -> str:
    return ("all", "each", "trace")[program.seed % 3]


def _operator(
    program: Program, engine: str, dtype: torch.dtype, size: int, lazy: bool, J: torch.Tensor
) -> ntkops.NTKOperator:
    """Return K for products, which never becomes dense, or a kernel to be made dense."""
    with warnings.catch_warnings():
        if not J.any():
            warnings.simplefilter("ignore", ntkops.NtkopsWarning)  # a kernel of zeros is said aloud
        return ntkops.ntk(
            program.build(dtype),
            tuple(program.data(dtype)),
            outputs="all" if lazy else _choice(program),
            engine=engine,
            batch_size=size,
            max_dense_bytes=0 if lazy else "auto",
        )


def _quantities(program: Program, dtype: torch.dtype, J: torch.Tensor, J2: torch.Tensor) -> list[_Quantity]:
    """Return name, kind of operator, what is computed, what it must be, and what its error is relative to."""
    n, o, choice = program.samples, program.outputs, _choice(program)
    v, p, w = normal(n * o, 2, seed=5), normal(J.shape[1], 2, seed=6), normal(n, 2, o, seed=7)
    low_v, low_p, low_w, x2 = v.to(dtype), p.to(dtype), w.to(dtype), tuple(program.data(dtype, 2))
    g = torch.einsum("nop,nro->nrp", J.unflatten(0, (n, o)), w)
    K, size, cross = J @ J.T, float(J.norm() ** 2), float(J.norm() * J2.norm())
    gram = torch.einsum("nrp,msp->nrms", g, g)

    def again(operator: ntkops.NTKOperator) -> torch.Tensor:
        for _ in range(3):
            operator @ low_v
        return operator @ low_v

    return [
        ("Jt v", True, lambda A: A.left.mT @ low_v, J.T @ v, float(J.norm() * v.norm())),
        ("J p", True, lambda A: A.left @ low_p, J @ p, float(J.norm() * p.norm())),
        ("K v", True, lambda A: A @ low_v, K @ v, size * float(v.norm())),
        ("K v again", True, again, K @ v, size * float(v.norm())),
        ("cross v", True, lambda A: A.cross(x2) @ low_v, J2 @ (J.T @ v), cross * float(v.norm())),
        ("gram", True, lambda A: A.sample_gram(low_w), gram, float(g.norm() ** 2)),
        ("diagonal", True, lambda A: A.diagonal(), K.diagonal(), size),
        ("trace", True, _exact_trace, K.trace(), size),
        ("dense", False, lambda A: A.to_dense(), kernel(J, J, o, choice), size),
        ("dense cross", False, lambda A: A.cross(x2).to_dense(), kernel(J2, J, o, choice), cross),
    ]


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


def _failure(program: Program, engine: str, dtype: torch.dtype, thorough: bool) -> Wrong | None:
    try:
        examine(program, engine, dtype, thorough=thorough)
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
    parser.add_argument("--thorough", action="store_true", help="every quantity in batches of every size")
    parser.add_argument("--smallest", action="store_true", help="look for the smallest program of each kind")
    given = parser.parse_args()
    dtype = torch.float32 if given.float32 else torch.float64
    failure = functools.partial(_failure, engine=given.engine, dtype=dtype, thorough=given.thorough)
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    start = time.process_time()
    for seed in range(given.first, given.first + given.count):
        program = draw_program(random.Random(seed))
        error = failure(program)
        if error is None:
            continue
        kind = _kind(error)
        print(f"seed {seed}: {error}\n    {program}", flush=True)
        if given.smallest and not kinds[kind]:
            small = shorter(program, lambda p, kind=kind: (e := failure(p)) is not None and _kind(e) == kind)
            print(f"    smallest: {small}", flush=True)
        kinds[kind].append(str(seed))
    failed = sum(map(len, kinds.values()))
    print(f"{failed} of {given.count} programs failed, {time.process_time() - start:.0f} s of CPU time")
    for kind, seeds in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):5d}  {kind}  (seeds {', '.join(seeds[:8])})")


if __name__ == "__main__":
    main()
