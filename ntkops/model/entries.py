"""Which entries of parameters the kernel is of: masks and indices over single weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import ArrayLike
from ..errors import OutOfRangeError, ParameterSelectionError, ParameterShapeError
from .selection import select_parameters

__all__ = ["Entries"]


class Entries:
    r"""Single weights, for ``params=``: the kernel is of these entries, :math:`J_S J_S^\top`.

    All other entries, and all other parameters, are held where they are. P is the number of entries: columns
    of J, gradients and projections are of this size.

    Args:
        entries: Name of a parameter to a boolean mask of its shape, or to the positions of entries in the
            flattened parameter, counted from 0 or, negative, from the end. Positions are in the order of the
            columns of J; a mask's are ascending.

    Raises:
        ParameterSelectionError: If it is no mapping, or holds neither masks nor integers.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> largest = model.weight.abs() > 0.3
        >>> J = ntkops.jacobian(model, x, params=ntkops.Entries({"weight": largest, "bias": [1]}))
        >>> J.shape == (10, int(largest.sum()) + 1)
        True
    """

    def __init__(self, entries: Mapping[str, ArrayLike]) -> None:
        if not isinstance(entries, Mapping) or not entries:
            raise ParameterSelectionError(
                "Entries needs a dict from names of parameters to masks or positions, {'0.weight': mask}"
            )
        self.entries: dict[str, Tensor] = {}
        for name, given in entries.items():
            if not isinstance(name, str):
                raise ParameterSelectionError(f"Entries: {name!r} is no name of a parameter")
            self.entries[name] = _indices(name, given)

    def resolve(self, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Find the parameters, and the positions in each.

        Args:
            named: Every parameter by name, aliases of tied ones included.

        Returns:
            Parameters and positions by canonical name, in the model's order.

        Raises:
            UnknownParameterError: If there is no parameter of a name.
            ParameterSelectionError: If a parameter is named twice, or no entry is selected.
            ParameterShapeError: If a mask does not have its parameter's shape.
            OutOfRangeError: If a position lies outside its parameter.
        """
        found: dict[str, Tensor] = {}
        for name, index in self.entries.items():
            selected = select_parameters(named, [name])
            if len(selected) > 1:
                raise ParameterSelectionError(
                    f"Entries: {name!r} is a pattern of {len(selected)} parameters; name one"
                )
            ((canonical, parameter),) = selected.items()
            if canonical in found:
                raise ParameterSelectionError(
                    f"Entries: {name!r} is another name of {canonical!r}; give it once"
                )
            found[canonical] = _positions(name, index, parameter)
        if not any(len(index) for index in found.values()):
            raise ParameterSelectionError("Entries selects no entry, so that the kernel is empty")
        chosen = {name: index for name, index in found.items() if len(index)}
        parameters = select_parameters(named, list(chosen))
        return parameters, {name: chosen[name] for name in parameters}

    def __repr__(self) -> str:
        """Show the names."""
        return f"Entries({', '.join(self.entries)})"


def _indices(name: str, given: Any) -> Tensor:
    try:
        index = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterSelectionError(f"Entries[{name!r}] is a {type(given).__name__}: {_WANTED}") from error
    if index.dtype == torch.bool:
        return index.detach().clone()
    if index.numel() == 0:
        return index.new_zeros(0, dtype=torch.long)
    if index.is_floating_point() or index.is_complex() or index.dim() > 1:
        raise ParameterSelectionError(
            f"Entries[{name!r}] is of {index.dtype} and shape {tuple(index.shape)}: {_WANTED}"
        )
    return index.detach().reshape(-1).long().cpu().clone()


_WANTED = "pass a boolean mask of the parameter's shape, or a list of positions in the flattened parameter"


def _positions(name: str, index: Tensor, parameter: Tensor) -> Tensor:
    size = parameter.numel()
    if index.dtype == torch.bool:
        if index.shape != parameter.shape:
            raise ParameterShapeError(
                f"Entries[{name!r}] is a mask of shape {tuple(index.shape)}, the parameter has "
                f"{tuple(parameter.shape)}"
            )
        return index.flatten().nonzero().flatten().to(parameter.device)
    outside = (index < -size) | (index >= size)
    if bool(outside.any()):
        raise OutOfRangeError(
            f"Entries[{name!r}]: position {int(index[outside][0])} is out of range, the parameter has {size} "
            "entries"
        )
    index = torch.where(index < 0, index + size, index)
    if len(torch.unique(index)) < len(index):
        raise ParameterSelectionError(f"Entries[{name!r}] holds a position twice")
    return index.to(parameter.device)
