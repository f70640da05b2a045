"""What type checkers see of the public surface; `make types` reads this file, nothing runs it."""

from typing import assert_type

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

import ntkops
from ntkops.results import Estimate


def operators(model: nn.Module, x: Tensor, block: Tensor) -> None:
    K = ntkops.ntk(model, x)
    J = ntkops.jacobian(model, x)
    assert_type(K.shape, torch.Size)
    assert_type(J.shape, torch.Size)
    assert_type(K.dtype, torch.dtype)
    assert_type(K @ block, Tensor)
    assert_type(J @ block, Tensor)
    assert_type(K.to_dense(), Tensor)
    assert_type(K.diagonal(), Tensor)


def estimates(K: LinearOperator) -> None:
    assert_type(ntkops.trace(K, method="stratified"), Estimate)
    assert_type(ntkops.frobenius_norm(K, method="reverse"), Estimate)
    assert_type(ntkops.alignment(K, K, method="sketch"), Estimate)
    assert_type(ntkops.logdet(K, method="slq"), Estimate)
    assert_type(float(ntkops.trace(K)), float)
    ntkops.trace(K, method="reverse")  # type: ignore[arg-type]
    ntkops.frobenius_norm(K, method="rhutch")  # type: ignore[arg-type]
    ntkops.diagonal(K, method="slq")  # type: ignore[arg-type]
