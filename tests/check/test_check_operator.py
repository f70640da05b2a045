"""`check_operator` passes what is right, and names what is wrong."""

import pytest
import torch
from linear_operator.operators import LinearOperator

import ntkops
from ntkops.check import check_operator
from ntkops.errors import InputError, OperatorCheckError
from tests.cases import CASES


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# In turn: what is checked of a model hardly depends on its dtype, and each dtype meets half of the models.
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number].name)
def test_every_model_of_the_table_passes(number):
    case, dtype = CASES[number], (torch.float32, torch.float64)[number % 2]
    K = ntkops.ntk(case.make(dtype), case.data(4, dtype), **case.options)
    report = check_operator(K, generator=seeded())
    assert report.passed, str(report)
    assert report["true derivative"].passed is not False
    report.raise_if_failed()


@pytest.mark.parametrize("outputs", ["each", "trace", 1])
def test_views_of_a_kernel_and_jacobians_pass(outputs):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    K = ntkops.ntk(model, x, outputs=outputs)
    for operator in (
        K,
        K.left,
        K.left.mT,
        K.cross(torch.randn(2, 3)),
        K[..., :3, 1:],
        ntkops.jacobian(model, x),
    ):
        report = check_operator(operator, generator=seeded())
        assert report.passed, str(report)


class Broken(LinearOperator):
    """A matrix whose products are not what they should be."""

    def __init__(self, matrix, fault=None):
        super().__init__(matrix, fault=fault)
        self.matrix, self.fault = matrix, fault

    def _size(self):
        return self.matrix.shape

    def _matmul(self, rhs):
        product = self.matrix @ rhs
        if self.fault == "linearity":
            return product + 1
        if self.fault == "repeatability":
            return product + 1e-3 * torch.rand(())
        if self.fault == "finite values":
            return product / 0
        return product

    def _transpose_nonbatch(self):
        return self if self.fault == "adjoint" else Broken(self.matrix.mT, self.fault)


@pytest.mark.parametrize("fault", ["adjoint", "linearity", "repeatability", "finite values"])
def test_a_broken_operator_is_found(fault):
    matrix = torch.randn(6, 6, generator=seeded(1), dtype=torch.float64)
    report = check_operator(Broken(matrix, fault), generator=seeded())
    assert not report.passed
    assert report[fault].passed is False
    assert "FAILS" in str(report)
    with pytest.raises(OperatorCheckError, match=fault):
        report.raise_if_failed()
    assert check_operator(Broken(matrix), generator=seeded()).passed


class DetachedNorm(torch.nn.Module):
    """Weights divided by a norm that is kept out of the derivative, as DoRA does it."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 4)
        self.third = torch.nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        weight = self.second.weight / self.second.weight.norm().detach()
        return self.third(torch.tanh(hidden @ weight.T + self.second.bias))


def test_what_is_not_the_derivative_is_traced_to_its_module():
    torch.manual_seed(0)
    report = check_operator(ntkops.ntk(DetachedNorm(), torch.randn(5, 3)), generator=seeded())
    (failure,) = report.failures
    assert failure.name == "true derivative"
    assert "second.weight (modules 'second')" in failure.detail
    assert report["adjoint of J"].passed and report["symmetry"].passed


class Inexact(torch.autograd.Function):
    """Forward-mode and reverse-mode derivatives of two different functions."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.cos() + 1e-5)

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * x.cos()


def test_forward_and_reverse_mode_that_disagree_a_little_are_found_in_float64():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 4)

        def forward(self, x):
            return Inexact.apply(self.layer(x))

    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    try:
        report = check_operator(ntkops.ntk(Model().double(), x, engine="autograd"), generator=seeded())
    except ntkops.errors.DifferentiationError as error:  # found before there is an operator
        assert "disagree" in str(error)
    else:
        assert report["adjoint of J"].passed is False


def test_a_model_that_computes_in_lower_precision_is_judged_by_it():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).float().softmax(-1).double()

    torch.manual_seed(0)
    K = ntkops.ntk(Mixed().double(), torch.randn(4, 3, dtype=torch.float64))
    report = check_operator(K, generator=seeded())
    assert report.passed, str(report)
    assert report["adjoint"].bound == pytest.approx(1e3 * torch.finfo(torch.float32).eps)


def test_the_report_is_data_and_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    report = check_operator(torch.eye(3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert report.to_dict()["passed"] is True
    assert [check.name for check in report][:2] == ["finite values", "repeatability"]
    with pytest.raises(KeyError, match="no check 'speed'"):
        report["speed"]
    for wrong in (3, torch.ones(3), None):
        with pytest.raises(InputError):
            check_operator(wrong)
    with pytest.raises(InputError, match="columns=1"):
        check_operator(torch.eye(3), columns=1)
