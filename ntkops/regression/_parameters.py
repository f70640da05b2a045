"""scikit-learn's conventions for an estimator's parameters, without scikit-learn."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Self

from torch import Tensor

from ..errors import InputError, MissingDependencyError, NotFittedError
from ..results.html import facts_html

__all__ = ["Parameters", "not_fitted"]


def not_fitted(message: str) -> NotFittedError:
    """Return the error of an estimator that is not fitted: scikit-learn's as well, where that is in use."""
    theirs = getattr(sys.modules.get("sklearn.exceptions"), "NotFittedError", None)
    if theirs is None:
        return NotFittedError(message)
    both: type[NotFittedError] = type("NotFittedError", (NotFittedError, theirs), {})
    return both(message)


class Parameters:
    """Parameters that are exactly the constructor's keywords, stored under their names."""

    @classmethod
    def _names(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name, as the constructor took them.

        Args:
            deep: Ignored: no parameter is an estimator itself.

        Returns:
            Names and values.
        """
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name; a fit that was made before stays as it is.

        Args:
            **params: Names and values.

        Returns:
            The estimator itself.

        Raises:
            InputError: If a name is not a parameter.
        """
        for name in params:
            if name not in self._names():
                raise InputError(
                    f"{type(self).__name__} has no parameter {name!r}: {', '.join(self._names())}"
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags: a regressor of several targets on pairwise data.

        Raises:
            MissingDependencyError: If scikit-learn 1.6 or newer, which asks for them, is missing.
        """
        try:
            from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags
        except ImportError as error:
            raise MissingDependencyError(
                "scikit-learn's tags need scikit-learn 1.6 or newer: pip install 'scikit-learn>=1.6'"
            ) from error
        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True, multi_output=True),
            regressor_tags=RegressorTags(),
            input_tags=InputTags(pairwise=True),
        )

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` has been called."""
        return hasattr(self, "n_features_in_")

    def _repr_html_(self) -> str:
        """Show in a notebook the parameters, and what came out of `fit`."""
        facts: dict[str, Any] = {name: repr(value) for name, value in self.get_params().items()}
        for name in ("method_", "ridge_", "solve_info_"):
            found = getattr(self, name, None)
            if not isinstance(found, Tensor) or found.numel() == 1:
                facts[name] = found
        return facts_html(type(self).__name__, facts)

    def __repr__(self) -> str:
        """Show the parameters that differ from their defaults."""
        defaults = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        given = ((name, value) for name, value in self.get_params().items())
        shown = ", ".join(f"{name}={value!r}" for name, value in given if _differs(value, defaults[name]))
        return f"{type(self).__name__}({shown})"


def _differs(value: Any, default: Any) -> bool:
    return type(value) is not type(default) or value is not default and not bool(value == default)
