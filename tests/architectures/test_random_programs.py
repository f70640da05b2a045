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
from .programs import Program, draw_program

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


FOUND = {
    "complex views of odd rows": Program(
        steps=(("checkpointed", 0, False), ("complex numbers", 2, False)), samples=2, outputs=1, seed=51
    ),
    "differentiable once": Program(steps=(("own function once", 1, False),), samples=3, outputs=1, seed=31),
    "never sorted back, the first in order": Program(
        steps=(("never sorted back", 0, True),), samples=2, outputs=1, seed=20, hidden=False
    ),
    "a batch that uses no parameter": Program(
        steps=(("own function without forward mode", 0, True), ("two experts", 1, True)),
        samples=2,
        outputs=2,
        seed=20,
    ),
    "rows of none": Program(
        steps=(("ragged", 0, False), ("routed words", 1, True)),
        samples=1,
        outputs=3,
        seed=38,
        hidden=False,
        frozen=(1,),
    ),
}


@pytest.mark.parametrize("engine", ["autograd", "auto"])
@pytest.mark.parametrize("name", FOUND)
def test_programs_that_were_found(name, engine):
    examine(FOUND[name], engine)
