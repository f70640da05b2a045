"""Every public call leaves all as it was."""

from tests.left_alone import every_call_leaves_all_alone

__all__ = ["every_call_leaves_all_alone"]
