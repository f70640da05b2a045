"""Programs that nobody thought of: both engines against dense Jacobians, row by row.

What a program does to samples may depend on data, and the first samples need not show it. A number is
right, or refused for a reason that this program has: see `examined`.
"""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .examined import examine
from .profiles import PROGRAMS
from .programs import ONE_WAY, draw_program

pytestmark = pytest.mark.long

# Layers are judged on the first samples as yet, and coupling among later ones is not looked for.
# No J p is offered in place of a wrong one; complex parameters stand at odd places of a vector.
KNOWN = set() if "FUZZ_LAYERS" in os.environ else {*ONE_WAY, "complex numbers"}
LAYERS = pytest.mark.skipif("FUZZ_LAYERS" not in os.environ, reason="FUZZ_LAYERS=1 runs what fails today")
DRAWN = st.randoms(use_true_random=False).map(draw_program)


@PROGRAMS
@given(DRAWN)
def test_automatic_differentiation(program):
    if not program.is_coupled and not program.kinds & KNOWN:
        examine(program, "autograd")


@LAYERS
@PROGRAMS
@given(DRAWN)
def test_layer_structure(program):
    examine(program, "auto")


@LAYERS
@PROGRAMS
@given(DRAWN, st.sampled_from(["autograd", "auto"]))
def test_float32(program, engine):
    examine(program, engine, torch.float32)
