"""What is wrong is refused by name, before any product."""

import math

import pytest
import torch

import ntkops
from ntkops.errors import DtypeError, InputError, NonFiniteError, ShapeError, StaleOperatorError

from .reference import network, spectrum


@pytest.fixture(scope="module")
def setting():
    generator = torch.Generator().manual_seed(4)
    model = network()
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return model, x, ntkops.ntk(model, x), torch.randn(5, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"times": []}, InputError, "one number or more"),
        ({"times": [-1.0]}, InputError, "0 or more"),
        ({"times": [math.nan]}, InputError, "none is NaN"),
        ({"times": [2.0, 1.0]}, InputError, "greater than the one before"),
        ({"times": [1.0, 1.0]}, InputError, "greater than the one before"),
        ({"times": "soon"}, InputError, "pass numbers"),
        ({"times": [[1.0]]}, InputError, "shape"),
        ({"lr": 0.0}, InputError, "lr=0.0"),
        ({"lr": math.inf}, InputError, "lr=inf"),
        ({"weight_decay": -0.1}, InputError, "weight_decay=-0.1"),
        ({"tol": 0.0}, InputError, "tol=0.0"),
        ({"max_products": 0}, InputError, "max_products=0"),
        ({"method": "ode"}, InputError, "method='ode'"),
        ({"offset": "netwrok"}, InputError, "offset='netwrok'"),
        ({"offset": torch.ones(3).double()}, ShapeError, "offset of shape"),
        ({"offset": torch.ones(2)}, DtypeError, "offset"),
        ({"offset": torch.tensor([math.nan, 0.0]).double()}, NonFiniteError, "offset"),
        ({"Y": torch.zeros(5).long()}, InputError, "one-hot"),
        ({"Y": torch.ones(4, 2).double()}, ShapeError, "do not fit"),
        ({"Y": torch.ones(5, 2)}, DtypeError, "labels"),
        ({"Y": torch.full((5, 2), math.inf).double()}, NonFiniteError, "label"),
    ],
)
def test_options_are_refused_before_any_product(setting, options, error, words):
    _, _, K, Y = setting
    given = {"Y": Y, "times": [1.0], **options}
    with ntkops.count_passes() as tally, pytest.raises(error, match=words):
        ntkops.gradient_flow(K, given.pop("Y"), given.pop("times"), **given)
    assert tally.total == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": [1.5]}, "whole numbers"),
        ({"steps": [math.inf]}, "whole numbers"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_steps_are_refused_before_any_product(setting, options, words):
    _, _, K, Y = setting
    given = {"steps": [1], "lr": 0.1, **options}
    with ntkops.count_passes() as tally, pytest.raises(InputError, match=words):
        ntkops.gradient_descent(K, Y, given.pop("steps"), **given)
    assert tally.total == 0


@pytest.mark.parametrize("method", ["eigh", "krylov"])
def test_kernels_that_are_not_semidefinite_are_refused(method):
    K = spectrum(torch.tensor([1.0, 0.5, -0.1, 0.2], dtype=torch.float64))
    with pytest.raises(InputError, match="not positive semidefinite"):
        ntkops.gradient_flow(K, torch.ones(4).double(), [1.0], method=method)


def test_lazy_kernels_are_not_made_dense(setting):
    model, x, _, Y = setting
    K = ntkops.ntk(model, x, max_dense_bytes=0)
    assert ntkops.gradient_flow(K, Y, [1.0]).info.method == "krylov"
    with pytest.raises(InputError, match="method='eigh' needs the dense kernel"):
        ntkops.gradient_flow(K, Y, [1.0], method="eigh")


def test_cross_kernels_and_offsets_that_do_not_belong_are_refused(setting):
    model, x, K, Y = setting
    named = ntkops.gradient_flow(K, Y, [1.0], offset="network")
    given = ntkops.gradient_flow(K, Y, [1.0], offset=model(x).detach())
    cross = K.cross(x[:2])
    with pytest.raises(InputError, match="offset=f_new"):
        given.predict(cross)
    with pytest.raises(InputError, match="training was not"):
        named.predict(cross, offset=model(x[:2]).detach())
    with pytest.raises(ShapeError, match="the offset has shape"):
        given.predict(cross, offset=model(x).detach())
    with pytest.raises(ShapeError, match="cross kernel"):
        named.predict(ntkops.ntk(model, x[:2], x[:3]))
    with pytest.raises(StaleOperatorError):
        named.predict(ntkops.ntk(network(seed=9), x[:2], x))
    with pytest.raises(DtypeError):
        named.predict(cross.to_dense().float())
    with pytest.raises(ShapeError, match="the diagonal"):
        named.test_bound(torch.ones(2, 3))
    with pytest.raises(InputError, match="no negative entries"):
        named.test_bound(-torch.ones(4))
    with pytest.raises(InputError, match="none of the times"):
        named.weights(3.0)
    with pytest.raises(ShapeError, match="square kernel"):
        ntkops.gradient_flow(cross, Y, [1.0])
