"""Networks on which random search found something, smallest form, kept for good."""

import pytest
import torch

import ntkops
from ntkops.errors import DifferentiationError

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
    # Behind a norm of one feature J and Jᵀ part by rounding alone, which is no reason to refuse.
    "rounding between J and its transpose": Network(
        ("tokens", 4, 3, 3, False, True),
        (("rms norm", False), ("transposed convolution", 2, 1, 1, 1, True), ("gain is bias",)),
        head=0,
        samples=1,
    ),
    # All that is covered is what the output does not use: products then had no factors at all.
    "nothing to cover": Network(("features", 1), (("raw", "row and column"),), head=0, samples=1),
    "nothing to cover before the head": Network(
        ("features", 1), (("raw", "row and column"),), head=2, samples=1
    ),
    # torch's backward pass of batch and instance norms is wrong there for a batch of one sample.
    "norm in front of a transpose": Network(
        ("image", 2, 2, 2), (("instance norm",), ("patches",)), head=0, samples=1
    ),
    # A step of one rounding unit does not pass through the cell: rounding is looked for farther away, too.
    "rounding behind a damping cell": Network(
        ("tokens", 1, 2, 1, False, False),
        (("cells", "gru", 1, True, False), ("layer norm", True, False), ("activation", "gelu")),
        head=0,
        samples=1,
        seed=24,
    ),
    # What a first norm reads are the samples: these have to move, too.
    "rounding of samples": Network(
        ("sequence", 1, 1),
        (("encoder layer", True, False), ("cells", "rnn", 1, False, False)),
        head=0,
        samples=1,
    ),
    # An adapter that is zero at the end took the whole output for a linear function of its low rank.
    "fresh adapter at the end": Network(
        ("features", 4),
        (("adapter", 4, 2, True), ("activation", "tanh"), ("adapter", 4, 2, True)),
        head=0,
    ),
    "zero head beside a way around it": Network(
        ("features", 4),
        (("linear", 4, True), ("activation", "tanh"), ("adapter", 4, 1, False)),
        head=0,
        zeroed=(2, 3, 4),
    ),
    # torch takes samples for cotangents where a layer with this activation is vmapped twice.
    "prelu with as many samples as outputs": Network(
        ("features", 3), (("dense", 4, "prelu", False), ("linear", 3, True)), head=0
    ),
    # At zero its slope is another one in torch's forward mode and in its second backward pass.
    "prelu at zero": Network(
        ("features", 1),
        (
            ("dense", 1, "elu in place", True),
            ("halted", (("activation", "elu in place"),), "gate"),
            ("activation", "prelu"),
        ),
        head=1,
        samples=1,
        zeroed=(6,),
    ),
    # What stands for it must stand for it where the block runs again.
    "checkpointed prelu": Network(
        ("sequence", 1, 1), (("checkpointed", (("activation", "prelu"),)),), head=0, samples=1
    ),
    # A checkpointed block with fused attention has to run again under the same attention kernel.
    "checkpointed attention": Network(
        ("sequence", 3, 2),
        (("swap",), ("checkpointed", (("encoder layer", True, False),)), ("swap",)),
        head=3,
    ),
    # So has a recurrent layer: of one unit all saved tensors have one shape, and wrong ones were taken.
    "checkpointed recurrent layer": Network(
        ("sequence", 1, 1),
        (("checkpointed", (("recurrent", "GRU", 1, 1, False, False, "sequence"),)),),
        head=0,
        samples=1,
    ),
    "checkpointed cells": Network(
        ("sequence", 2, 1), (("checkpointed", (("cells", "lstm", 1, True, True),)),), samples=1
    ),
}

# J is less than the rounding of what the model computes: a kernel of zeros.
UNMOVED = {
    "norm of one feature with a gain": Network(
        ("features", 1), (("layer norm", True, False),), head=0, frozen=(1,), samples=1
    ),
    "three norms": Network(
        ("image", 1, 3, 2),
        (("group norm", 1), ("layer norm", False, False), ("layer norm", False, False)),
        head=0,
        samples=1,
        seed=1,
    ),
}

# J is all but rounding, and no less than what other parameters do: refused.
REFUSED = {
    "norm of two features at the end": Network(
        ("tokens", 1, 2, 1, True, True),
        (("batch norm",), ("batch norm",), ("layer norm", False, False)),
        head=0,
        frozen=(0,),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_networks_that_were_found(name):
    network = FOUND[name]
    model, x = network.build(), network.data()
    reference = Reference(model, x)
    v = torch.ones(len(reference.J), dtype=torch.float64)
    for engine in ("autograd", "layerwise"):
        with rules_hold(reference):
            K = ntkops.ntk(model, x, engine=engine)
        reference.check(f"{name}, {engine}", K.to_dense(), reference.J @ reference.J.T)
        reference.check(f"{name}, {engine}", K @ v, reference.J @ (reference.J.T @ v))
    assert bool(K.engine_info.covered) is (name != "nothing to cover")
    selected = [p for p in model.parameters() if p.requires_grad]
    # In the last two a gradient is rounding alone: no row of it can be told from another's.
    left = ("checkpointed", "nothing", "prelu", "two norms of one", "rounding behind a damping")
    assert (len(K.engine_info.covered) == len(selected)) is not name.startswith(left)


@pytest.mark.parametrize("engine", ["autograd", "layerwise"])
@pytest.mark.parametrize("name", UNMOVED)
def test_parameters_that_do_not_move_the_output_have_a_kernel_of_zeros(name, engine):
    dtype = torch.float32 if name == "three norms" else torch.float64
    model, x = UNMOVED[name].build(dtype), UNMOVED[name].data(dtype)
    K = ntkops.ntk(model, x, engine=engine)
    rounding = (1e3 * torch.finfo(dtype).eps * float(model(x).detach().norm())) ** 2
    assert float(K.to_dense().norm()) <= rounding
    assert float((K @ torch.ones(K.shape[0], dtype=dtype)).norm()) <= rounding * K.shape[0]


@pytest.mark.parametrize("engine", ["autograd", "layerwise"])
@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_are_all_but_rounding_are_refused(name, engine):
    model, x = REFUSED[name].build(torch.float64), REFUSED[name].data(torch.float64)
    with pytest.raises(DifferentiationError, match="rounding alone parts them"):
        _ = ntkops.ntk(model, x, engine=engine).engine_info
    assert Reference(model, x).is_sensitive_after_all()
