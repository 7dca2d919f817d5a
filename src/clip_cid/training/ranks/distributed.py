"""The ranks of a training: one process alone, or those that torchrun has started."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clip_cid.errors import ConfigError, RunError
from clip_cid.method.distill.contrastive import Side
from clip_cid.tasks import torchrun_place

# Long work of one rank (indexing pairs, the last export) must not end the ranks that wait for it. When a rank
# dies, torchrun ends the others at once.
_PATIENCE = datetime.timedelta(hours=6)
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the exchange with the others; a single process exchanges nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, rows: Tensor) -> Side:
        """The rows of all ranks, which hold equally many; the gradient of a rank's rows is the sum over all ranks."""
        if self.size == 1:
            return Side.whole(rows)
        return Side(rows, _Gather.apply(rows.contiguous(), self.size, self.rank), self.rank * len(rows))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over the ranks of each number; all ranks give the same names."""
        if self.size == 1 or not values:
            return dict(values)
        table = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(table)
        return dict(zip(values, (table / self.size).tolist(), strict=True))

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: int) -> int:
        if self.size == 1:
            return value
        table = torch.tensor(value)
        dist.all_reduce(table, dist.ReduceOp.MAX)
        return int(table)

    def all(self, value: _Value) -> list[_Value]:
        """A plain value of each rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            self.largest(0)  # on the CPU's group: a rank that waits leaves its device alone

    @contextlib.contextmanager
    def main_first(self) -> Generator[None]:
        """The main process runs the block first, then the others, which reuse its files."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def agree(self, what: str, value: Any) -> None:
        """Make sure that all ranks have the same.

        Raises:
            RunError: They have not; the training would be wrong without an error.
        """
        values = self.all(value)
        others = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
        if others:
            raise RunError(
                f"rank {others[0]} of {self.size} has different {what} than rank 0.",
                fix="All ranks need the same recipe, run folder, packages and data; the run folder must be a"
                " shared one.",
            )


ALONE = Ranks()
"""One process, on the CPU."""


@contextlib.contextmanager
def join_ranks(device: torch.device) -> Generator[Ranks]:
    """Join the other processes for as long as the block lasts; after an error this process has to end.

    Args:
        device: As the recipe has it; each rank of a machine takes the CUDA device of its own number.

    Raises:
        ConfigError: This machine has fewer CUDA devices than processes.
    """
    if torchrun_place().size == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"machine.device: process {device.index} of this machine has no CUDA device of its own; there"
                f" are {count}.",
                fix=f"Start torchrun with --nproc-per-node {count}, or set machine.device: cpu.",
            )
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    # Not after an error: NCCL would wait here for the other ranks, which wait for this one.
    dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All ranks' rows; backwards, the sum over all ranks of the gradients in this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int, rank: int) -> Tensor:
        ctx.shape = rows.shape
        gathered = rows.new_empty((size * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        own = grad_outputs[0].new_empty(ctx.shape)
        dist.reduce_scatter_tensor(own, grad_outputs[0].contiguous())
        return own, None, None
