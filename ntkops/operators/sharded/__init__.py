"""Operators over samples that are spread over the ranks of a process group."""

from .kernel import ShardedJacobianOperator, ShardedKernelOperator

__all__ = ["ShardedJacobianOperator", "ShardedKernelOperator"]
