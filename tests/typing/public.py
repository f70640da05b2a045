"""What type checkers see of the public surface; `make types` reads this file, nothing runs it."""

from typing import assert_type

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

import ntkops
from ntkops.regression import PosteriorCovariance
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


def accepted(model: nn.Module, x: Tensor, array: np.ndarray) -> None:
    ntkops.ntk(model, x, outputs={"time": "trace", "class": "each"}, engine="autograd", group="world")
    ntkops.ntk(model, x, outputs="sum")  # type: ignore[arg-type]
    ntkops.ntk(model, x, engine="fast")  # type: ignore[arg-type]
    ntkops.ntk(model, x, group="all")  # type: ignore[arg-type]
    K = ntkops.ntk(model, x)
    ntkops.gradient_flow(K, [0.0, 1.0], [0, 1, 10], loss="mse", offset="network")
    ntkops.gradient_flow(K, array, array, loss="hinge")  # type: ignore[arg-type]
    ntkops.ggn(model, x, "mse", array)
    fit = ntkops.KernelRidge("evidence", offset=1.0).fit(K, x, sample_weight=array)
    assert_type(fit.predict(K), Tensor)
    assert_type(fit.predict(K, prior=K, return_std=True), tuple[Tensor, Tensor])
    assert_type(fit.predict(K, prior=K, return_cov=True), tuple[Tensor, PosteriorCovariance])


def estimates(K: LinearOperator) -> None:
    assert_type(ntkops.trace(K, method="stratified"), Estimate)
    assert_type(ntkops.frobenius_norm(K, method="reverse"), Estimate)
    assert_type(ntkops.alignment(K, K, method="sketch"), Estimate)
    assert_type(ntkops.logdet(K, method="slq"), Estimate)
    assert_type(float(ntkops.trace(K)), float)
    ntkops.trace(K, method="reverse")  # type: ignore[arg-type]
    ntkops.frobenius_norm(K, method="rhutch")  # type: ignore[arg-type]
    ntkops.diagonal(K, method="slq")  # type: ignore[arg-type]
