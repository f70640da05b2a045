"""How many files and hand-overs between files four everyday calls take: a measure of the code, not of time.

Run it with ``python benchmarks/trips.py``; ``--list fit`` shows the files of a trip in the order in which
they are entered, and ``--limits`` ends with 1 where a trip takes more than it may.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import ntkops

__all__ = ["LIMITS", "Trip", "measure"]

ROOT = str(Path(ntkops.__file__).parent) + os.sep
LIMITS = {  # most files, most hand-overs: what is reached so far, to be lowered whenever less is
    "construct": (26, 81),
    "product": (21, 105),
    "trace": (50, 325),
    "fit": (54, 587),
}


@dataclass
class Trip:
    """Calls of functions of the package, seen while the block runs.

    Attributes:
        calls: File and qualified name of each call (or resumption of a generator), in order.
        depth: Calls inside one another in the deepest of them.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    depth: int = 0
    _open: int = 0

    def __enter__(self) -> Trip:
        """Begin to watch."""
        sys.setprofile(self._see)
        return self

    def __exit__(self, *problem: object) -> None:
        """End."""
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, arg: Any) -> None:
        file = frame.f_code.co_filename
        if not file.startswith(ROOT):
            return
        if event == "call":
            self.calls.append((file.removeprefix(ROOT), frame.f_code.co_qualname))
            self._open += 1
            self.depth = max(self.depth, self._open)
        elif event == "return":
            self._open = max(0, self._open - 1)

    @property
    def files(self) -> list[str]:
        """Files in the order in which they are first entered."""
        return list(dict.fromkeys(file for file, _ in self.calls))

    @property
    def hand_overs(self) -> int:
        """Calls whose file is not that of the call before."""
        files = [file for file, _ in self.calls]
        return sum(one != other for one, other in zip(files, files[1:], strict=False))

    def __str__(self) -> str:
        """Return all counts in one line."""
        rooms = {file.split(os.sep)[0] for file in self.files}
        return (
            f"files {len(self.files):3d}  packages {len(rooms):2d}  functions {len(set(self.calls)):4d}  "
            f"calls {len(self.calls):6d}  hand-overs {self.hand_overs:5d}  depth {self.depth:3d}"
        )


def _trips() -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    """Yield the name of each trip, what makes its subject, and the trip itself."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, v, y = (torch.randn(*shape, generator=generator) for shape in ((20, 6), (60,), (20, 3)))

    def kernel() -> ntkops.NTKOperator:
        return ntkops.ntk(model, x)

    yield "construct", lambda: model, lambda network: ntkops.ntk(network, x)
    # By automatic differentiation; the others go as engine="auto" does.
    yield "product", lambda: ntkops.ntk(model, x, engine="autograd"), lambda K: K @ v
    yield "trace", kernel, ntkops.trace
    yield "fit", kernel, lambda K: ntkops.KernelRidge(1e-3).fit(K, y)


def measure() -> dict[str, Trip]:
    """Return the trips by name, each from a fresh subject."""
    found: dict[str, Trip] = {}
    for name, make, go in _trips():
        go(make())  # what a process imports or keeps once is no part of the trip
        subject = make()
        with Trip() as trip:
            go(subject)
        found[name] = trip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each trip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", choices=list(LIMITS), help="show the files of one trip")
    parser.add_argument("--limits", action="store_true", help="end with 1 where a trip is above its limit")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trips = measure()
    within = True
    for name, trip in trips.items():
        files, hand_overs = LIMITS[name]
        print(f"{name:10s} {trip}  (at most {files} files, {hand_overs} hand-overs)")
        if name == options.list:
            print("".join(f"    {file}\n" for file in trip.files), end="")
        within &= len(trip.files) <= files and trip.hand_overs <= hand_overs
    return 0 if within or not options.limits else 1


if __name__ == "__main__":
    sys.exit(main())
