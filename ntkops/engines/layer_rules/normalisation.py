"""Normalisations: the gradient of the scale is Σ_s g_s ∘ x̂_s, that of the shift Σ_s g_s."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...model.record import Call, Entry
from .base import Kind, Layout, Rule

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Normalisation(Rule):
    """y = γ ∘ x̂ + β: gradients as small as the parameters are, and written down."""

    def kind(self, role: str) -> Kind:
        """Written down."""
        return "direct"

    def _normalized(self, call: Call) -> Tensor:
        """Return x̂, of the shape of the input."""
        raise NotImplementedError


class _Trailing(_Normalisation):
    """Normalised over the last axes, whose shape the parameters have."""

    def _normalized_axes(self, call: Call) -> int:
        """Return how many of the last axes are normalised over."""
        return len(call.arguments["normalized_shape"])

    def sample_axes(self, call: Call) -> range:
        """Every axis over which nothing is normalised."""
        return range(len(call.shape) - self._normalized_axes(call))

    def activation(self, call: Call, layout: Layout, count: int) -> Tensor:
        """The normalised input, ``(B, S, d)``."""
        return self._flat(call, layout.expose(self._normalized(call), count), 0)

    def _flat(self, call: Call, exposed: Tensor, lead: int) -> Tensor:
        """Turn ``(B, *lead, k, rest..., *normalized)`` into ``(B, *lead, S, d)``."""
        axes = self._normalized_axes(call)
        return exposed.flatten(-axes).flatten(1 + lead, -2)

    def direct(
        self, call: Call, role: str, activation: object, layout: Layout, count: int, gradients: Tensor
    ) -> Tensor:
        """Output gradients, times the normalised input for the scale, summed over positions."""
        flat = self._flat(call, layout.expose(gradients, count, 1), 1)  # (B, K, S, d)
        if role == "bias":
            return flat.sum(2)
        assert isinstance(activation, Tensor)
        return (flat * activation.unsqueeze(1)).sum(2)


class LayerNorm(_Trailing):
    """`torch.nn.functional.layer_norm`."""

    entry = Entry("layer_norm", ("input", "normalized_shape", "weight", "bias", "eps"), ("weight", "bias"))
    functions = (F.layer_norm,)

    def _normalized(self, call: Call) -> Tensor:
        given = call.arguments
        return F.layer_norm(given["input"], given["normalized_shape"], eps=given.get("eps", 1e-5))


class RMSNorm(_Trailing):
    """`torch.nn.functional.rms_norm`."""

    entry = Entry("rms_norm", ("input", "normalized_shape", "weight", "eps"), ("weight",))
    functions = (F.rms_norm,)

    def _normalized(self, call: Call) -> Tensor:
        given = call.arguments
        return F.rms_norm(given["input"], given["normalized_shape"], eps=given.get("eps"))


class _Channels(_Normalisation):
    """Normalised, then scaled a channel (axis 1), with the samples on axis 0."""

    def sample_axes(self, call: Call) -> range:
        """The first axis."""
        return range(1)

    def activation(self, call: Call, layout: Layout, count: int) -> Tensor:
        """The normalised input, ``(B, k, d, positions)``."""
        return layout.expose(self._normalized(call), count).unsqueeze(-1).flatten(3)

    def direct(
        self, call: Call, role: str, activation: object, layout: Layout, count: int, gradients: Tensor
    ) -> Tensor:
        """Output gradients, times the normalised input for the scale, summed over positions."""
        exposed = layout.expose(gradients, count, 1).unsqueeze(-1).flatten(4)  # (B, K, k, d, positions)
        if role == "weight":
            assert isinstance(activation, Tensor)
            exposed = exposed * activation.unsqueeze(1)
        return exposed.sum((2, 4))


class GroupNorm(_Channels):
    """`torch.nn.functional.group_norm`."""

    entry = Entry("group_norm", ("input", "num_groups", "weight", "bias", "eps"), ("weight", "bias"))
    functions = (F.group_norm,)

    def _normalized(self, call: Call) -> Tensor:
        given = call.arguments
        return F.group_norm(given["input"], given["num_groups"], eps=given.get("eps", 1e-5))


class InstanceNorm(_Channels):
    """`torch.nn.functional.instance_norm`."""

    entry = Entry(
        "instance_norm",
        (
            "input",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "use_input_stats",
            "momentum",
            "eps",
        ),
        ("weight", "bias"),
    )
    functions = (F.instance_norm,)

    def supports(self, call: Call) -> bool:
        """Statistics of the input, or stored ones; never stored ones that the call would update."""
        stored = call.arguments.get("running_mean") is not None
        return not (stored and bool(call.arguments.get("use_input_stats", True)))

    def _normalized(self, call: Call) -> Tensor:
        given = call.arguments
        return F.instance_norm(
            given["input"],
            given.get("running_mean"),
            given.get("running_var"),
            use_input_stats=bool(given.get("use_input_stats", True)),
            eps=given.get("eps", 1e-5),
        )


class BatchNorm(_Channels):
    """`torch.nn.functional.batch_norm` with stored statistics."""

    entry = Entry(
        "batch_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        ("weight", "bias"),
    )
    functions = (F.batch_norm,)

    def supports(self, call: Call) -> bool:
        """Statistics of the batch would couple samples."""
        return not call.arguments.get("training") and call.arguments.get("running_mean") is not None

    def _normalized(self, call: Call) -> Tensor:
        given = call.arguments
        return F.batch_norm(
            given["input"], given["running_mean"], given["running_var"], eps=given.get("eps", 1e-5)
        )
