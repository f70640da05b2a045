"""Operators that another version has pickled."""

import pickle

import pytest
import torch

import ntkops
from ntkops.errors import UnsupportedOperationError


def test_what_another_version_has_pickled_is_refused_by_name():
    K = ntkops.ntk(torch.nn.Linear(3, 2), torch.randn(4, 3))
    again = pickle.loads(pickle.dumps(K))
    assert again._core.max_dense_bytes > 0
    del vars(again._core)["limit"]
    with pytest.raises(UnsupportedOperationError, match="another version of ntkops"):
        pickle.loads(pickle.dumps(again))
