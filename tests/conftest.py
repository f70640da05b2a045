"""What every test shares: a seeded global random state, put back afterwards."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Let tests draw from the global state and still give the same numbers every time."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_rng_state(state)
