"""linear_operator's own contract suite, for every operator."""

import functools
import unittest

import torch
from linear_operator.test.linear_operator_test_case import (
    LinearOperatorTestCase,
    RectangularLinearOperatorTestCase,
)

import ntkops

SAMPLES, FEATURES, HIDDEN, OUTPUTS = 5, 3, 12, 3


def make_model(dtype: torch.dtype) -> torch.nn.Sequential:
    generator = torch.Generator().manual_seed(11)
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS)
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.7
    return model.to(dtype)


@functools.cache
def linearized(dtype: torch.dtype) -> ntkops.Linearization:
    """Return one for all operators, which are many: what is found out about a model is kept there."""
    return ntkops.linearize(make_model(dtype))


def make_inputs(dtype: torch.dtype, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64).to(dtype)


def dense_jacobian(params, x: torch.Tensor) -> torch.Tensor:
    """(N, O, P) by the chain rule written out, differentiable in the parameters."""
    first, bias, head, _ = params
    hidden, eye = torch.tanh(x @ first.mT + bias), torch.eye(OUTPUTS).to(head)
    slopes = head * (1 - hidden.square()).unsqueeze(1)  # (N, O, H)
    by_first, by_head = slopes.unsqueeze(-1) * x[:, None, None], eye.unsqueeze(-1) * hidden[:, None, None]
    return torch.cat([by_first.flatten(2), slopes, by_head.flatten(2), eye.expand(len(x), -1, -1)], dim=2)


class _Dtype(unittest.TestCase):
    dtype = torch.float32
    seed = 3

    def setUp(self):
        self.previous = torch.get_default_dtype(), torch.get_rng_state()
        torch.set_default_dtype(self.dtype)
        torch.manual_seed(self.seed)  # the suite draws its right-hand sides from the global state

    def tearDown(self):
        dtype, state = self.previous
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)

    @property
    def data(self):
        return linearized(self.dtype), make_inputs(self.dtype)


class _Square(_Dtype, LinearOperatorTestCase):
    should_call_cg = False
    should_call_lanczos = False
    should_call_lanczos_diagonalization = False

    def create_linear_op(self):
        return ntkops.ntk(*self.data, outputs=[0, 2])

    def evaluate_linear_op(self, linear_op):
        J = dense_jacobian(linear_op.representation(), self.data[1].to(linear_op.dtype))
        J = J[:, [0, 2]].flatten(0, 1)
        return J @ J.mT


class _SquareBatch(_Square):
    should_test_sample = False

    def create_linear_op(self):
        return ntkops.ntk(*self.data, outputs="each")

    def evaluate_linear_op(self, linear_op):
        J = dense_jacobian(linear_op.representation(), self.data[1].to(linear_op.dtype)).movedim(1, 0)
        return J @ J.mT


class _Traced(_Square):
    def create_linear_op(self):
        return ntkops.ntk(*self.data, outputs="trace")

    def evaluate_linear_op(self, linear_op):
        J = dense_jacobian(linear_op.representation(), self.data[1].to(linear_op.dtype)).flatten(1)
        return J @ J.mT


class _Jacobian(_Dtype, RectangularLinearOperatorTestCase):
    def create_linear_op(self):
        return ntkops.jacobian(*self.data)

    def evaluate_linear_op(self, linear_op):
        return dense_jacobian(linear_op.representation(), self.data[1].to(linear_op.dtype)).flatten(0, 1)


class _JacobianTransposed(_Jacobian):
    def create_linear_op(self):
        return ntkops.jacobian(*self.data).mT

    def evaluate_linear_op(self, linear_op):
        return super().evaluate_linear_op(linear_op).mT


class _Cross(_Dtype, RectangularLinearOperatorTestCase):
    def create_linear_op(self):
        return ntkops.ntk(*self.data).cross(make_inputs(self.dtype, seed=8)[:4])

    def evaluate_linear_op(self, linear_op):
        params, dtype = linear_op.representation(), linear_op.dtype
        left = dense_jacobian(params, make_inputs(self.dtype, seed=8)[:4].to(dtype)).flatten(0, 1)
        return left @ dense_jacobian(params, self.data[1].to(dtype)).flatten(0, 1).mT


class _CrossBatch(_Dtype, RectangularLinearOperatorTestCase):
    def create_linear_op(self):
        return ntkops.ntk(*self.data, x2=make_inputs(self.dtype, seed=8)[:4], outputs="each")

    def evaluate_linear_op(self, linear_op):
        params, dtype = linear_op.representation(), linear_op.dtype
        left = dense_jacobian(params, self.data[1].to(dtype)).movedim(1, 0)
        return left @ dense_jacobian(params, make_inputs(self.dtype, seed=8)[:4].to(dtype)).movedim(1, 0).mT


def _concrete(case: type, dtype: torch.dtype) -> type:
    name = f"Test{case.__name__.strip('_')}{'Double' if dtype == torch.float64 else 'Float'}"
    return type(name, (case,), {"dtype": dtype, "__test__": True, "__module__": __name__})


# Square and rectangular ones in both dtypes, what differs from them by its axes alone in one of them in turn:
# every law of every kind in every dtype stands in tests/laws.
_BOTH = (torch.float32, torch.float64)
for _case, _dtypes in (
    (_Square, _BOTH),
    (_Cross, _BOTH),
    (_SquareBatch, _BOTH[:1]),
    (_Traced, _BOTH[1:]),
    (_Jacobian, _BOTH[1:]),
    (_JacobianTransposed, _BOTH[:1]),
    (_CrossBatch, _BOTH[1:]),
):
    _case.__test__ = False
    for _dtype in _dtypes:
        _class = _concrete(_case, _dtype)
        globals()[_class.__name__] = _class

del _class, _case, _dtype, _dtypes  # pytest would collect the last class a second time under this name
