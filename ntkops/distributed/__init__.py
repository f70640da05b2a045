"""Operators over samples that are spread over the ranks of a process group."""

from .group import Ranks
from .kernel import ShardedJacobianOperator, ShardedKernelOperator
from .space import ShardedSpace

__all__ = ["Ranks", "ShardedJacobianOperator", "ShardedKernelOperator", "ShardedSpace"]
