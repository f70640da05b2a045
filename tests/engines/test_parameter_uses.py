"""Ways in which models use their parameters: both engines against one classic backward pass a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntkops

ROWS, STEPS, IMAGES = (4,), (5, 4), (2, 6, 6)
Function = Callable[[nn.ParameterList, Tensor], Tensor]


def _attention(p: nn.ParameterList, x: Tensor, **options: object) -> Tensor:
    y = x.transpose(0, 1)
    given = {"in_proj_weight": None, "in_proj_bias": None, "bias_k": None, "bias_v": None}
    given |= {"out_proj_bias": None, "add_zero_attn": False, "need_weights": False} | options
    return F.multi_head_attention_forward(y, y, y, 4, 2, dropout_p=0.0, **given)[0].transpose(0, 1)


def _inner_step(p: nn.ParameterList, x: Tensor) -> Tensor:
    step = torch.func.grad(lambda w, row: (row @ w).square().sum())
    return torch.vmap(lambda row: step(p[0], row))(x).flatten(1)


# name: function, shape of a sample, shapes of the parameters
USES: dict[str, tuple[Function, tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    # products
    "on the left": (lambda p, x: (p[0] @ x.mT).mT, ROWS, ((5, 4),)),
    "on the left of sequences": (lambda p, x: p[0] @ x, STEPS, ((6, 5),)),
    "samples on the last axis": (
        lambda p, x: torch.tanh(p[0] @ x.permute(1, 2, 0)).permute(2, 0, 1),
        STEPS,
        ((2, 4),),
    ),
    "samples on a middle axis": (lambda p, x: (x.transpose(0, 1) @ p[0]).transpose(0, 1), STEPS, ((4, 2),)),
    "samples folded into rows": (
        lambda p, x: (x.reshape(-1, 4) @ p[0]).reshape(len(x), -1),
        STEPS,
        ((4, 2),),
    ),
    "samples folded, time first": (
        lambda p, x: (x.transpose(0, 1).reshape(-1, 4) @ p[0]).reshape(5, len(x), 2).transpose(0, 1),
        STEPS,
        ((4, 2),),
    ),
    "weight without output axis": (lambda p, x: F.linear(x, p[0]), ROWS, ((4,),)),
    "mv": (lambda p, x: x.mv(p[0]), ROWS, ((4,),)),
    "dot": (lambda p, x: torch.stack([torch.dot(row, p[0]) for row in x]), ROWS, ((4,),)),
    "inner": (lambda p, x: torch.inner(x, p[0]), ROWS, ((5, 4),)),
    "tensordot": (lambda p, x: torch.tensordot(x, p[0], 1), ROWS, ((4, 2, 3),)),
    "multi_dot": (lambda p, x: torch.linalg.multi_dot([x, p[0], p[1]]), ROWS, ((4, 5), (5, 2))),
    "product of weights first": (lambda p, x: x @ (p[0] @ p[1]), ROWS, ((4, 5), (5, 2))),
    "outer": (lambda p, x: x @ torch.outer(p[1], p[0]), ROWS, ((3,), (4,))),
    "addmm": (lambda p, x: torch.addmm(p[0], x, p[1], beta=0.5, alpha=2), ROWS, ((5,), (4, 5))),
    "addmv": (lambda p, x: torch.addmv(p[0], x, p[1]), ROWS, ((1,), (4,))),
    "bmm": (lambda p, x: torch.bmm(x, p[0].expand(len(x), 4, 2)), STEPS, ((4, 2),)),
    "matmul with a leading one": (lambda p, x: x @ p[0], STEPS, ((1, 4, 2),)),
    "a weight for each position": (lambda p, x: torch.einsum("btc,tcd->btd", x, p[0]), STEPS, ((5, 4, 2),)),
    "the same by bmm": (
        lambda p, x: torch.bmm(x.transpose(0, 1), p[0]).transpose(0, 1),
        STEPS,
        ((5, 4, 2),),
    ),
    "the same by matmul": (lambda p, x: (x.unsqueeze(2) @ p[0]).squeeze(2), STEPS, ((5, 4, 2),)),
    "einsum": (lambda p, x: torch.einsum("btc,dc->bdt", x, p[0]), STEPS, ((2, 4),)),
    "bilinear": (lambda p, x: F.bilinear(x, x.tanh(), p[0], p[1]), ROWS, ((2, 4, 4), (2,))),
    # one parameter in two roles
    "weight and bias of a linear layer": (lambda p, x: F.linear(x, p[0], p[0][0]), ROWS, ((4, 4),)),
    "weight and bias of a convolution": (
        lambda p, x: F.conv1d(x.mT, p[0], p[0][:, 0, 0]),
        STEPS,
        ((4, 4, 1),),
    ),
    "scale and shift of a layer norm": (lambda p, x: F.layer_norm(x, (4,), p[0], p[0]), STEPS, ((4,),)),
    "scale and shift of a group norm": (lambda p, x: F.group_norm(x.mT, 2, p[0], p[0]), STEPS, ((4,),)),
    "scale and shift of a batch norm": (
        lambda p, x: F.batch_norm(x.mT, torch.zeros(4).to(x), torch.ones(4).to(x), p[0], p[0]),
        STEPS,
        ((4,),),
    ),
    "scale and shift of an instance norm": (
        lambda p, x: F.instance_norm(x.mT, weight=p[0], bias=p[0]),
        STEPS,
        ((4,),),
    ),
    "factor and summand": (lambda p, x: x * p[0] + p[0], ROWS, ((4,),)),
    "queries, values and output": (
        lambda p, x: _attention(
            p, x, out_proj_weight=p[0], use_separate_proj_weight=True,
            q_proj_weight=p[0], k_proj_weight=p[1], v_proj_weight=p[0],
        ),
        STEPS,
        ((4, 4), (4, 4)),
    ),
    "keys and values of their own": (
        lambda p, x: _attention(
            p, x, in_proj_weight=p[0], in_proj_bias=p[1], bias_k=p[2], bias_v=p[3], add_zero_attn=True,
            out_proj_weight=p[4], out_proj_bias=p[5],
        ),
        STEPS,
        ((12, 4), (12,), (1, 1, 4), (1, 1, 4), (4, 4), (4,)),
    ),
    "looked up and multiplied": (
        lambda p, x: F.embedding(x.abs().long() % 4, p[0]).sum(1) @ p[0],
        ROWS,
        ((4, 4),),
    ),
    "weight and its transpose": (lambda p, x: torch.tanh(x @ p[0]) @ p[0].T, ROWS, ((4, 5),)),
    # a parameter that is changed first
    "flipped beside itself": (lambda p, x: x @ p[0].flip(0) + x @ p[0], ROWS, ((4, 5),)),
    "rolled": (lambda p, x: torch.tanh(x @ p[0]) @ p[0].roll(1, 0), ROWS, ((4, 4),)),
    "tiled": (lambda p, x: x @ p[0].tile(2, 1), ROWS, ((2, 3),)),
    "repeated": (lambda p, x: x @ p[0].repeat_interleave(2, 0), ROWS, ((2, 3),)),
    "joined": (lambda p, x: x @ torch.cat([p[0], p[1]]), ROWS, ((2, 3), (2, 3))),
    "stacked": (lambda p, x: F.linear(x, torch.stack([p[0], p[1]])), ROWS, ((4,), (4,))),
    "triangle": (lambda p, x: x @ p[0].tril(), ROWS, ((4, 4),)),
    "softmax of it": (lambda p, x: x @ p[0].softmax(0), ROWS, ((4, 4),)),
    "normalised": (lambda p, x: F.linear(x, F.normalize(p[0], dim=1)), ROWS, ((5, 4),)),
    "masked": (lambda p, x: F.linear(x, p[0] * (torch.arange(20).view(5, 4) % 2)), ROWS, ((5, 4),)),
    "orthogonal": (lambda p, x: x @ torch.linalg.matrix_exp(p[0] - p[0].T), ROWS, ((4, 4),)),
    "a view of a flat one": (lambda p, x: F.linear(x, p[0].view(5, 4)), ROWS, ((20,),)),
    "as_strided": (lambda p, x: F.linear(x, p[0].as_strided((5, 4), (3, 1))), ROWS, ((20,),)),
    "unfolded": (lambda p, x: F.linear(x, p[0].unfold(0, 4, 1)), ROWS, ((7,),)),
    "sum of two": (lambda p, x: F.linear(x, p[0] + 0.1 * p[1]), ROWS, ((4, 4), (4, 4))),
    "times a number": (lambda p, x: F.linear(x, p[0] * p[1]), ROWS, ((4, 4), ())),
    "columns in a loop": (
        lambda p, x: torch.stack([torch.tanh(x @ p[0][:, i : i + 2]) for i in range(3)], 1),
        ROWS,
        ((4, 4),),
    ),
    "rows by number": (lambda p, x: x @ p[0][[0, 3, 3]].T, ROWS, ((7, 4),)),
    "rows by value": (lambda p, x: x + p[0][(x[:, 0] > 0).long() + 2], ROWS, ((7, 4),)),
    "entries by value": (
        lambda p, x: torch.take_along_dim(p[0].expand(len(x), 4, 4), x.argsort(-1)[:, None], 1).flatten(1),
        ROWS,
        ((4, 4),),
    ),
    "running sums": (lambda p, x: x * p[0].cumsum(0), ROWS, ((4,),)),
    "sorted": (lambda p, x: x * p[0].sort().values, ROWS, ((4,),)),
    "eigenvalues": (lambda p, x: x * torch.linalg.eigvalsh(p[0] + p[0].T), ROWS, ((4, 4),)),
    "singular values": (lambda p, x: x * torch.linalg.svdvals(p[0]), ROWS, ((4, 4),)),
    "a solve": (
        lambda p, x: torch.linalg.solve(p[0] + 5 * torch.eye(4).to(x), x.mT).mT,
        ROWS,
        ((4, 4),),
    ),
    "in Fourier space": (
        lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(p[0]), n=4),
        ROWS,
        ((4,),),
    ),
    # entry by entry
    "bias of all": (lambda p, x: x + p[0], STEPS, ((1, 1, 4),)),
    "bias over time": (lambda p, x: torch.tanh(x + p[0]), STEPS, ((5, 1),)),
    "exponent": (lambda p, x: x.abs() ** p[0].abs(), ROWS, ((),)),
    "temperature": (lambda p, x: (x @ p[1] / p[0].exp()).softmax(-1), ROWS, ((), (4, 4))),
    "where": (lambda p, x: torch.where(p[0] > 0, x * p[0], x), ROWS, ((4,),)),
    "maximum": (lambda p, x: torch.maximum(x, p[0]), ROWS, ((4,),)),
    "in place on the result": (
        lambda p, x: F.linear(x, p[0]).add_(p[1]).mul_(2).tanh_(),
        ROWS,
        ((4, 4), (4,)),
    ),
    # convolutions and look-ups
    "convolution as a band": (
        lambda p, x: F.conv1d(x[:, None], p[0].view(1, 1, 3), padding=1).squeeze(1),
        ROWS,
        ((3,),),
    ),
    "one kernel for all channels": (
        lambda p, x: F.conv2d(x, p[0].expand(2, 1, 3, 3), groups=2),
        IMAGES,
        ((1, 1, 3, 3),),
    ),
    "samples in groups of channels": (
        lambda p, x: F.conv2d(
            x.reshape(1, -1, 6, 6), p[0].repeat(len(x), 1, 1, 1), groups=2 * len(x)
        ).reshape(len(x), 2, 4, 4),
        IMAGES,
        ((2, 1, 3, 3),),
    ),
    "a convolution twice": (
        lambda p, x: F.conv2d(torch.tanh(F.conv2d(x, p[0], padding=1)), p[0], padding="same"),
        IMAGES,
        ((2, 2, 3, 3),),
    ),
    "a convolution and its transpose": (
        lambda p, x: F.conv_transpose2d(torch.tanh(F.conv2d(x, p[0])), p[0]),
        IMAGES,
        ((3, 2, 3, 3),),
    ),
    "unfold and a product": (lambda p, x: p[0] @ F.unfold(x, 3), IMAGES, ((3, 18),)),
    "positions": (lambda p, x: x * F.embedding(torch.arange(5), p[0]), STEPS, ((5, 4),)),
    "one row for all": (lambda p, x: x + F.embedding(torch.full((len(x),), 2), p[0]), ROWS, ((7, 4),)),
    "rows chosen by values": (lambda p, x: F.embedding(x.argmax(-1), p[0]) * x, ROWS, ((7, 4),)),
    "product of rows": (
        lambda p, x: F.embedding(x.abs().sum(-1).long() % 7, p[0]).prod(1),
        STEPS,
        ((7, 4),),
    ),
    # distances and attention
    "centres": (lambda p, x: (-((x[:, None] - p[0]) ** 2).sum(-1)).exp(), ROWS, ((6, 4),)),
    "learnt queries": (
        lambda p, x: F.scaled_dot_product_attention(p[0].expand(len(x), 2, 4), x, x),
        STEPS,
        ((2, 4),),
    ),
    "learnt keys and values": (
        lambda p, x: F.scaled_dot_product_attention(
            x, p[0].expand(len(x), 6, 4), p[1].expand(len(x), 6, 4)
        ),
        STEPS,
        ((6, 4), (6, 4)),
    ),
    "attention bias": (
        lambda p, x: F.scaled_dot_product_attention(x, x, x, attn_mask=p[0]),
        STEPS,
        ((5, 5),),
    ),
    "a token before the others": (
        lambda p, x: torch.tanh(torch.cat([p[0].expand(len(x), -1, -1), x], 1) @ p[1])[:, 0],
        STEPS,
        ((1, 1, 4), (4, 4)),
    ),
    "a fast weight": (
        lambda p, x: torch.stack([(p[0] + torch.outer(row, row)) @ row for row in x]),
        ROWS,
        ((4, 4),),
    ),
    "a step of gradient descent inside": (_inner_step, ROWS, ((4, 2),)),
}  # fmt: skip


class Uses(nn.Module):
    """One use of parameters that are given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function, _, shapes = USES[name]
        generator = torch.Generator().manual_seed(1)
        self.p = nn.ParameterList(
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.p, x)


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    parameters, rows = list(model.parameters()), []
    for entry in model(x).flatten():
        gradients = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        rows.append(torch.cat([(p * 0 if g is None else g).flatten() for p, g in pairs]).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("name", USES)
def test_uses_of_parameters(name: str) -> None:
    """By rules for three samples and for one of them, and by automatic differentiation."""
    model = Uses(name)
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, *USES[name][1], generator=generator, dtype=torch.float64) for n in (3, 2))
    whole, other = dense_jacobian(model, x), dense_jacobian(model, y)
    for count, engine in ((1, "layerwise"), (3, "layerwise"), (3, "autograd")):
        linearization = ntkops.linearize(model)  # what is known of one sample is not believed of three
        J = whole.unflatten(0, (3, -1))[:count].flatten(0, 1)
        K = ntkops.ntk(linearization, x[:count], engine=engine)
        lazy = ntkops.ntk(linearization, x[:count], engine=engine, max_dense_bytes=0)
        V = torch.randn(len(J), 2, generator=generator, dtype=torch.float64)
        size = float(J.norm())
        for what, found, wanted, scale in (
            ("dense", K.to_dense(), J @ J.T, size**2),
            ("diagonal", K.diagonal(), J.square().sum(1), size**2),
            ("product", lazy @ V, J @ (J.T @ V), size**2 * float(V.norm())),
            ("pulled", lazy.left.mT @ V, J.T @ V, size * float(V.norm())),
            ("cross", K.cross(y).to_dense(), other @ J.T, size * float(other.norm())),
        ):
            assert float((found - wanted).norm()) <= 1e-12 * scale, (what, engine, count)
