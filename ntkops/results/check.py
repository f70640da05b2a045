"""What `ntkops.check_operator` found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import OperatorCheckError

__all__ = ["Check", "CheckReport"]


@dataclass(frozen=True)
class Check:
    """One property of an operator, and how well it holds.

    Attributes:
        name: Name of the property.
        passed: Whether it holds; None where it does not apply.
        error: How far it is from holding, relative to the size of what is compared; None where it does not
            apply.
        bound: Largest error that passes.
        detail: What was compared; where it fails, the module or parameter at fault and the way out.
    """

    name: str
    passed: bool | None
    error: float | None
    bound: float
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """The properties of one operator.

    Attributes:
        subject: What was checked.
        checks: One entry for each property.
        seconds: Wall-clock time.
    """

    subject: str
    checks: tuple[Check, ...]
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Show whether all passed, and a line for each check."""
        lines = [f"CheckReport of {self.subject}: {'passed' if self.passed else 'FAILED'}"]
        for check in self.checks:
            error = "" if check.error is None else f", error {check.error:.1e} of at most {check.bound:.1e}"
            state = {True: "passed", False: "FAILED", None: "not done"}[check.passed]
            lines.append(f"  {check.name}: {state}{error}{'' if check.passed else f': {check.detail}'}")
        return "\n".join(lines)

    @property
    def passed(self) -> bool:
        """Whether every property that applies holds."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The properties that do not hold."""
        return tuple(check for check in self.checks if check.passed is False)

    def __getitem__(self, name: str) -> Check:
        """Return the entry of a property."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {', '.join(check.name for check in self.checks)}")

    def __iter__(self) -> Iterator[Check]:
        """Go through the properties."""
        return iter(self.checks)

    def raise_if_failed(self) -> None:
        """Raise if a property does not hold.

        Raises:
            OperatorCheckError: Naming the properties that fail, with what is at fault.
        """
        if not self.passed:
            failed = "; ".join(f"{check.name}: {check.detail}" for check in self.failures)
            raise OperatorCheckError(f"{self.subject} fails {len(self.failures)} checks: {failed}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, ready for JSON."""
        return {
            "subject": self.subject,
            "passed": self.passed,
            "checks": [vars(check) for check in self.checks],
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        """Show a table, one line for each property."""
        words = {True: "ok", False: "FAILS", None: "-"}
        width = max(len(check.name) for check in self.checks)
        lines = [self.subject]
        for check in self.checks:
            error = "" if check.error is None else f"{check.error:8.1e} <= {check.bound:.0e}"
            lines.append(
                f"  {check.name:<{width}}  {words[check.passed]:<5}  {error:<19}  {check.detail}".rstrip()
            )
        return "\n".join(lines)
