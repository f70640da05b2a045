"""The command line: ``ntkops <command>``, or ``python -m ntkops <command>``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, report
from .errors import NtkopsError

__all__ = ["main"]

_BAD_INPUT = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after ``python -m ntkops``; None for those of this process.

    Returns:
        0 if all went well, 2 if the input was wrong (one line on standard error says what), 130 after an
        interruption from the keyboard.

    Raises:
        NtkopsError: Instead of exit code 2, if ``--traceback`` was given.
    """
    parser = argparse.ArgumentParser(prog="ntkops", description="Neural tangent kernels of PyTorch models.")
    parser.add_argument("--version", action="version", version=f"ntkops {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    report.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except NtkopsError as error:
        if options.traceback:
            raise
        print(f"ntkops: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("ntkops: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
