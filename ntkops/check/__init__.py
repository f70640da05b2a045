"""Checks of an operator on the user's own model."""

from .operator import check_operator

__all__ = ["check_operator"]
