"""The ranks of a process group: what goes from one of them to another.

Everything that goes from one rank to another goes through `Ranks`: sums, agreement on errors, and objects.
It stands on `torch.distributed` alone. All ranks make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, RankFailedError

__all__ = ["Ranks"]

Result = TypeVar("Result")


class Ranks:
    """The processes of a group, of which this is one.

    Args:
        group: A `torch.distributed.ProcessGroup`, or "world" for the default group.

    Attributes:
        rank: Number of this process in the group.
        count: Number of processes.
        payload: Bytes of blocks that this rank has given to sums so far.

    Raises:
        InputError: If torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = "world") -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "group= needs torch.distributed: start the script with torchrun, and call "
                'torch.distributed.init_process_group("gloo") ("nccl" for GPUs) before ntkops.ntk'
            )
        if isinstance(group, str) and group == "world":
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise InputError(
                f"group={group!r}: pass a torch.distributed.ProcessGroup of which this process is a member, "
                "or 'world'"
            )
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.count: int = dist.get_world_size(group)
        self.payload = 0
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return itself: a group is not copied."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse: a process group is no data."""
        raise InputError("an operator over a process group cannot be pickled; make it again on every rank")

    def __repr__(self) -> str:
        """Show which of how many this is."""
        return f"Ranks(rank={self.rank}, count={self.count})"

    # sums

    def sum_(self, block: Tensor) -> Tensor:
        """Add the blocks of all ranks, in place; the result has the same bits on each.

        Args:
            block: Any shape, the same on all ranks.

        Returns:
            The block.
        """
        self.payload += block.nbytes
        return self._reduced(block, dist.ReduceOp.SUM, "a sum over ranks")

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of small tensors over all ranks."""
        return self._reduced(values.clone(), dist.ReduceOp.SUM, "a sum over ranks")

    def largest(self, value: float) -> float:
        """Return the largest of one number from each rank."""
        found = torch.tensor([float(value)], dtype=torch.float64)
        return float(self._reduced(found, dist.ReduceOp.MAX, "a maximum over ranks"))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        found = torch.tensor([int(flag)])
        return bool(self._reduced(found, dist.ReduceOp.MAX, "the agreement of ranks"))

    def _reduced(self, block: Tensor, operation: Any, what: str) -> Tensor:
        """Reduce a block over ranks, in place; gloo takes it on the CPU, nccl on this rank's GPU."""
        with self._watched(what):
            if self._device is None and block.is_contiguous() and block.device.type == "cpu":
                dist.all_reduce(block, operation, group=self.group)
                return block
            moved = block.to(self._device or "cpu").contiguous()
            dist.all_reduce(moved, operation, group=self.group)
            return moved if moved is block else block.copy_(moved)

    # objects and blocks

    def share(self, item: Any) -> list[Any]:
        """Return what every rank gives: anything that can be pickled, small, in the order of ranks."""
        found: list[Any] = [None] * self.count
        with self._watched("an exchange of ranks"):
            dist.all_gather_object(found, item, group=self.group)
        return found

    def gather(self, block: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the blocks of all ranks, one below the other.

        Args:
            block: ``(*batch, lengths[rank], k)``.
            lengths: Rows of each rank's block.

        Returns:
            ``(*batch, sum(lengths), k)``.
        """
        most = max(lengths)  # all_gather takes blocks of one shape
        padded = torch.nn.functional.pad(block, (0, 0, 0, most - block.shape[-2]))
        sent = padded.to(self._device or "cpu").contiguous()
        found = [torch.empty_like(sent) for _ in lengths]
        with self._watched("an exchange of blocks"):
            dist.all_gather(found, sent, group=self.group)
        parts = [part[..., :length, :] for part, length in zip(found, lengths, strict=True)]
        return torch.cat(parts, dim=-2).to(block.device)

    def broadcast(self, item: Any, source: int) -> Any:
        """Return what one rank gives; the others' items are ignored."""
        box = [item]
        with self._watched(f"a message of rank {source}"):
            dist.broadcast_object_list(box, dist.get_global_rank(self.group, source), group=self.group)
        return box[0]

    def broadcast_tensor(self, tensor: Tensor, source: int) -> Tensor:
        """Fill a tensor, of the same shape and dtype on all ranks, with that of one rank."""
        sent = tensor.to(self._device or "cpu").contiguous()
        with self._watched(f"a block of rank {source}"):
            dist.broadcast(sent, dist.get_global_rank(self.group, source), group=self.group)
        return sent.to(tensor.device)

    # faults

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        """Name the error that torch raises where another rank is gone or does not answer."""
        try:
            yield
        except RuntimeError as error:
            text = (str(error).strip().splitlines() or ["no message"])[0]
            raise RankFailedError(
                f"rank {self.rank} of {self.count}: {what} did not come about, since another rank has died, "
                f"has left, or did not answer within the timeout of the process group ({text[:200]}). Start "
                "the job again; what was written by checkpoint= is whole, and is gone on from"
            ) from error

    def together(self, work: Callable[[], Result], what: str) -> Result:
        """Do work that may fail on some ranks, so that then all of them raise.

        Args:
            work: Work of this rank, without collectives of its own.
            what: What it is, for the message.

        Returns:
            Its result.

        Raises:
            RankFailedError: If the work has failed on another rank.
            BaseException: What the work itself has raised here.
        """
        # A rank that raised by itself would leave the others waiting in their next collective. One bit is
        # agreed on first; texts are exchanged where something has failed alone.
        problem: BaseException | None = None
        result = None
        try:
            result = work()
        except BaseException as error:
            problem = error
        if self.any(problem is not None):
            self._fail(problem, what)
        return result  # type: ignore[return-value]

    def _fail(self, problem: BaseException | None, what: str) -> NoReturn:
        """Tell the others what went wrong here, and raise it; or raise what the first of them tells."""
        texts = self.share(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        rank, text = failed[0]
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RankFailedError(f"rank {rank}{others} failed in {what}: {text}")
