"""Networks on which random search found something, smallest form, kept for good."""

import pytest
import torch

import ntkops

from .grammar import Network
from .reference import Reference
from .test_random_networks import rules_hold

FOUND = {
    # Behind a norm of one feature the gradient is zero but for rounding, which was taken for a wrong rule.
    "gradient of rounding": Network(
        ("sequence", 2, 1), (("encoder layer", False, False),), head=0, samples=1
    ),
    "two norms of one feature": Network(
        ("sequence", 1, 1),
        (("encoder layer", False, False), ("encoder layer", True, False), ("flatten",), ("unfold", 1)),
        head=0,
        seed=50,
    ),
    # A checkpointed block with fused attention has to run again under the same attention kernel.
    "checkpointed attention": Network(
        ("sequence", 3, 2),
        (("swap",), ("checkpointed", (("encoder layer", True, False),)), ("swap",)),
        head=3,
    ),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("engine", ["autograd", "layerwise"])
def test_networks_that_were_found(name, engine):
    network = FOUND[name]
    model, x = network.build(), network.data()
    reference = Reference(model, x)
    with rules_hold(reference):
        K = ntkops.ntk(model, x, engine=engine)
    reference.check(name, K.to_dense(), reference.J @ reference.J.T)
    if engine == "layerwise" and name != "checkpointed attention":
        assert len(K.engine_info.covered) == len(list(model.parameters()))
    v = torch.ones(K.shape[0], dtype=torch.float64)
    reference.check(name, K @ v, reference.J @ (reference.J.T @ v))
