"""What every test shares: a seeded global random state, put back afterwards."""

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_collection_finish() -> None:
    """Leave modules and tests, which are there to stay, out of what the garbage collector looks through."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Let tests draw from the global state and still give the same numbers every time."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_rng_state(state)
