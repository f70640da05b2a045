"""Programs that nobody thought of: both engines against dense Jacobians, row by row.

What a program does to samples may depend on data, and the first samples need not show it. A number is
right, or refused for a reason that this program has: see `examined`.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .examined import examine
from .profiles import PROGRAMS
from .programs import draw_program

pytestmark = pytest.mark.long

DRAWN = st.randoms(use_true_random=False).map(draw_program)


@PROGRAMS
@given(DRAWN)
def test_automatic_differentiation(program):
    examine(program, "autograd")


@PROGRAMS
@given(DRAWN)
def test_layer_structure(program):
    examine(program, "auto")


@PROGRAMS
@given(DRAWN, st.sampled_from(["autograd", "auto"]))
def test_float32(program, engine):
    examine(program, engine, torch.float32)
