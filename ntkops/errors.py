"""Every exception that ntkops raises, each with what is wrong, where, and the way out.

All of them derive from `NtkopsError`, and each also derives from the built-in exception that
a caller would expect (`ValueError`, `TypeError`, `KeyError`, `MemoryError`, ...), so that both
``except ntkops.NtkopsError`` and ordinary handling work. None of those that guard memory or
accuracy derives from `RuntimeError`: linear_operator catches `RuntimeError` in places and goes on
with a dense fallback, which is what these exceptions are there to prevent.
"""

from __future__ import annotations

__all__ = [
    # base
    "NtkopsError",
    "NtkopsWarning",
    # the model and its parameters
    "UnsupportedModelError",
    "StochasticModelError",
    "CoupledSamplesError",
    "ModelMutationError",
    "ParameterSelectionError",
    "UnknownParameterError",
    "ParameterShapeError",
    "StaleOperatorError",
    # data and outputs
    "InputError",
    "OutputError",
    "NonDeterministicDataError",
    "NonFiniteError",
    "DtypeError",
    "DeviceError",
    "ShapeError",
    "OutOfRangeError",
    # engines and operators
    "DifferentiationError",
    "DenseMemoryError",
    "OutOfMemoryError",
    "BackwardLimitError",
    "SingularKernelError",
    "UnsupportedOperationError",
    # optional packages
    "MissingDependencyError",
    # many processes
    "ShardingError",
    "RankFailedError",
    # files
    "CheckpointError",
    # checks
    "OperatorCheckError",
    # estimators and solvers
    "EstimateError",
    "ZeroKernelError",
    "NotConvergedError",
    "NotFittedError",
    "NotConvergedWarning",
    "RoundingWarning",
    "TiedPartsWarning",
    # projections
    "InterpolationWarning",
]


class NtkopsError(Exception):
    """Base class of every exception that ntkops raises on purpose."""


class NtkopsWarning(UserWarning):
    """Base class of every warning that ntkops issues."""


class UnsupportedModelError(NtkopsError, TypeError):
    """The model is of a kind that cannot be linearised (TorchScript, DataParallel, FSDP, ...)."""


class StochasticModelError(NtkopsError, ValueError):
    """A module draws random numbers in its forward pass, so that J and Jᵀ would disagree."""


class CoupledSamplesError(NtkopsError, ValueError):
    """The output of one sample depends on another sample, so that K has no sample structure."""


class ModelMutationError(NtkopsError, ValueError):
    """The forward pass changes a parameter, a buffer or an input in place."""


class ParameterSelectionError(NtkopsError, ValueError):
    """The parameter selection is empty, ambiguous, or of a kind that is not understood."""


class UnknownParameterError(ParameterSelectionError, KeyError):
    """A parameter name or pattern matches nothing in the model."""

    def __str__(self) -> str:
        """Return the message itself: `KeyError` would show its quoted representation."""
        return str(self.args[0]) if self.args else ""


class ParameterShapeError(NtkopsError, ValueError):
    """A replacement tensor does not have the shape of the parameter that it stands for."""


class StaleOperatorError(NtkopsError, ValueError):
    """Something that the operator holds by reference has changed since it was made."""


class InputError(NtkopsError, ValueError):
    """The inputs are empty, of unequal length, one-shot, or of a kind that is not understood."""


class OutputError(NtkopsError, TypeError):
    """The model's output is not a floating-point tensor with one row per sample."""


class NonDeterministicDataError(InputError):
    """Two passes over a re-iterable of batches gave different data."""


class NonFiniteError(NtkopsError, ValueError):
    """A parameter, an input, an output or a product holds NaN or infinity."""


class DtypeError(NtkopsError, TypeError):
    """Two things that meet in one product have different dtypes."""


class DeviceError(NtkopsError, ValueError):
    """Two things that meet in one product live on different devices."""


class ShapeError(NtkopsError, ValueError):
    """A vector, block or index does not fit the shape of the operator."""


class OutOfRangeError(NtkopsError, IndexError):
    """An index lies outside the operator."""


class DifferentiationError(NtkopsError, TypeError):
    """No mode of differentiation can form the requested product."""


class DenseMemoryError(NtkopsError, MemoryError):
    """A dense result would exceed ``max_dense_bytes``; raised before anything is allocated."""


class OutOfMemoryError(NtkopsError, MemoryError):
    """Memory ran out even with one sample and one column at a time, or with sizes that the user chose."""


class BackwardLimitError(NtkopsError, ValueError):
    """An exact result would take more than ``max_backwards`` backward passes; raised before any work."""


class SingularKernelError(NtkopsError, ValueError):
    """A kernel without a ridge is numerically singular, so that it has no inverse or Cholesky factor."""


class UnsupportedOperationError(NtkopsError, TypeError):
    """The operation has no lazy form here, or two meanings; the message names the way out."""


class MissingDependencyError(NtkopsError, ImportError):
    """A package of an optional extra is needed and not installed; the message names the extra."""


class ShardingError(NtkopsError, ValueError):
    """The ranks of a process group bring models, outputs or options that do not belong to one operator."""


class RankFailedError(NtkopsError, ConnectionError):
    """Another rank raised, ran out of memory or died, so that this one cannot go on."""


class CheckpointError(NtkopsError, ValueError):
    """A file of results is missing, damaged, foreign, or belongs to another computation."""


class OperatorCheckError(NtkopsError, AssertionError):
    """An operator lacks a property that it has to have; see `ntkops.check_operator`."""


class EstimateError(NtkopsError, TypeError):
    """Two estimates were combined, or an estimate was used where an exact number is needed."""


class ZeroKernelError(NtkopsError, ValueError):
    """A ratio (alignment, effective rank) is undefined because the kernel is zero."""


class NotFittedError(InputError, AttributeError):
    """An estimator was asked for what only a fit gives."""


class NotConvergedError(NtkopsError, ArithmeticError):
    """An iteration ended before its tolerance was met.

    Args:
        message: What was asked, what was reached, and what to change.
        result: The partial result, kept so that no work is lost.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class NotConvergedWarning(NtkopsWarning):
    """An estimate ended at its pass limit before its tolerance was met."""


class RoundingWarning(NtkopsWarning):
    """The rounding of a kernel or of its products may decide digits of the answer that are asked for."""


class TiedPartsWarning(NtkopsWarning):
    """A tied parameter is in two parts of a partition by its names, and counts for the first."""


class InterpolationWarning(NtkopsWarning):
    """Regression on about as many projected features as training rows: the error peaks there."""
