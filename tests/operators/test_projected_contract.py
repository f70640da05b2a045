"""linear_operator's own contract suite, for projected kernels and their features."""

import torch

import ntkops
from ntkops import projected_ntk
from ntkops.projections import Gaussian
from tests.operators import test_contract as contract

PARAMETERS = 4 * contract.HIDDEN + (contract.HIDDEN + 1) * contract.OUTPUTS
PROJECTION = Gaussian(PARAMETERS, 60, 0)
MATRIX = PROJECTION.apply(torch.eye(PARAMETERS, dtype=torch.float64))


def projected(K):
    return projected_ntk(K, PROJECTION)


def project(features: torch.Tensor) -> torch.Tensor:
    return features @ MATRIX.to(features)  # (..., P) -> (..., k)


class _Square(contract._Square):
    def create_linear_op(self):
        return projected(super().create_linear_op())

    def evaluate_linear_op(self, linear_op):
        J = contract.dense_jacobian(linear_op.representation(), self.data[1].to(linear_op.dtype))
        features = project(J[:, [0, 2]].flatten(0, 1))
        return features @ features.mT


class _SquareBatch(contract._SquareBatch):
    def create_linear_op(self):
        return projected(super().create_linear_op())

    def evaluate_linear_op(self, linear_op):
        J = contract.dense_jacobian(linear_op.representation(), self.data[1].to(linear_op.dtype))
        features = project(J.movedim(1, 0))
        return features @ features.mT


class _Features(contract._Jacobian):
    def create_linear_op(self):
        return projected(ntkops.ntk(*self.data)).left

    def evaluate_linear_op(self, linear_op):
        return project(super().evaluate_linear_op(linear_op))


class _Cross(contract._Cross):
    def create_linear_op(self):
        return projected(super().create_linear_op())

    def evaluate_linear_op(self, linear_op):
        params, dtype = linear_op.representation(), linear_op.dtype
        samples = contract.make_inputs(self.dtype, seed=8)[:4], self.data[1]
        left, right = (project(contract.dense_jacobian(params, x.to(dtype)).flatten(0, 1)) for x in samples)
        return left @ right.mT


# What they are made of is held to the suite in both dtypes: one is enough for these.
for _number, _case in enumerate((_Square, _SquareBatch, _Features, _Cross)):
    _case.__test__ = False
    _class = contract._concrete(_case, (torch.float32, torch.float64)[_number % 2])
    _class.__module__ = __name__
    globals()[_class.__name__] = _class

del _class, _case, _number
