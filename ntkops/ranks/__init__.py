"""The ranks of a process group, and vectors that are spread over them."""

from .group import Ranks
from .space import ShardedSpace

__all__ = ["Ranks", "ShardedSpace"]
