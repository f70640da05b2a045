"""Multi-head attention in terms of matrix products, so that its projections are ordinary uses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["multi_head_attention"]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Do what `torch.nn.functional.multi_head_attention_forward` does, for its usual arguments.

    Returns:
        Output ``(L, N, E)`` and attention weights or None; NotImplemented for appended keys, static
        keys, dropout, unbatched inputs, and a causal hint without a mask.
    """
    unusual = any(t is not None for t in (bias_k, bias_v, static_k, static_v)) or add_zero_attn
    if unusual or query.dim() != 3 or (training and dropout_p > 0) or (is_causal and attn_mask is None):
        return NotImplemented
    if use_separate_proj_weight:
        own = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), own, biases, strict=True)]  # type: ignore[arg-type]
    elif query is key and key is value:
        projected = list(F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1))  # type: ignore[arg-type]
    else:
        assert in_proj_weight is not None
        slices = in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), slices, biases, strict=True)]
    q, k, v = (_heads(x, num_heads) for x in projected)  # (N, heads, L, d)
    mask = _mask(attn_mask, key_padding_mask, q)
    weights: Tensor | None = None
    if need_weights:  # only then are scores a result; else torch's own product need not write them down
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        attention = (scores if mask is None else scores + mask).softmax(-1)
        mixed = attention @ v
        weights = attention.mean(1) if average_attn_weights else attention
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
    joined = mixed.permute(2, 0, 1, 3).flatten(2)  # (L, N, E)
    return F.linear(joined, out_proj_weight, out_proj_bias), weights


def _heads(x: Tensor, count: int) -> Tensor:
    """Turn ``(L, N, E)`` into ``(N, heads, L, E / heads)``."""
    return x.unflatten(-1, (count, -1)).permute(1, 2, 0, 3)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return what is added to the scores, broadcast to ``(N, heads, L, S)``."""
    total: Tensor | None = None
    if attn_mask is not None:
        total = _additive(attn_mask, q.dtype)
        total = total if total.dim() == 2 else total.unflatten(0, q.shape[:2])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to scores: -∞ where a boolean one is true, which says "not this key"."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    return mask.to(dtype)
