"""The ranks of a training: one process alone, or those that torchrun has started."""

import contextlib
import dataclasses
import datetime
import os
import socket
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from clip_cid.errors import ConfigError, RunError
from clip_cid.method.distill.contrastive import Side
from clip_cid.tasks import torchrun_place
from clip_cid.training.ranks.meeting import Meeting, is_of_another_rank

# Long work of one rank (indexing pairs, the last export) must not end the ranks that wait for it. When a process
# ends, those that wait for it notice at once.
_WORK = datetime.timedelta(hours=6)
_SENT_AT_ONCE = 1 << 26  # numbers
_UNSEEN_SECONDS = 75  # NFS and others remember for up to a minute that a file is not there
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

    def from_main(self, value: _Value) -> _Value:
        """The main process's plain value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def array_from_main(self, values: np.ndarray | None) -> np.ndarray:
        """The main process's array, on every rank; the others give None.

        It is for arrays of all rows: nothing of them is held twice.
        """
        form = self.from_main(None if values is None else (values.shape, values.dtype))
        assert form is not None, "the main process gives an array"
        if values is None:
            values = np.empty(*form)
        if self.size > 1:
            for part in torch.from_numpy(values.reshape(-1)).split(_SENT_AT_ONCE):
                dist.broadcast(part, src=0)
        return values

    def sees(self, there: Callable[[], bool]) -> bool:
        """Whether this rank sees what another has written before a barrier.

        It looks for longer than a host remembers that a file is not there.
        """
        deadline = time.monotonic() + (_UNSEEN_SECONDS if self.size > 1 else 0)
        while not there():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def find(self, path: Path) -> Path:
        """A file or folder that another rank has made before a barrier.

        Raises:
            RunError: This rank does not see it.
        """
        if not self.sees(path.exists):
            raise RunError(
                f"{path}: another rank has made it, but rank {self.rank} on {socket.gethostname()} does not see it.",
                fix="The run folder must be a shared one; see that this host has it, then run the same command again.",
            )
        return path

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
    """Join the other processes, as in `meet_ranks`, to compute on a device.

    Args:
        device: As the recipe has it; each rank of a machine takes the CUDA device of its own number.

    Raises:
        ConfigError: This machine has fewer CUDA devices than processes, or another machine has none.
        RunError: As `meet_ranks`.
    """
    with meet_ranks() as ranks:
        if ranks.size > 1:
            device = _own_device(device)
        yield dataclasses.replace(ranks, device=device)


@contextlib.contextmanager
def meet_ranks() -> Generator[Ranks]:
    """Meet the other processes of torchrun, and stay with them for as long as the block lasts.

    After an error this process has to end. The others then end with the same two lines.

    Raises:
        RunError: Some do not come, or one has ended.
    """
    place = torchrun_place()
    if place.size == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return

    meeting = Meeting(place)
    store = PrefixStore("ranks", meeting.store)
    try:
        backend = "cpu:gloo,cuda:nccl" if meeting.all_have_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=_WORK)
        meeting.stand()
        yield (ranks := Ranks(place.rank, place.size))
        ranks.wait()
    except BaseException as error:
        if not is_of_another_rank(error):
            meeting.tell(error)
            raise
        raise meeting.first_error() from error
    meeting.end()
    # Not after an error: NCCL would wait here for the other ranks, which wait for this one.
    dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    """The device of this rank among those of its machine."""
    if device.type != "cuda":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
        return device

    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if (own.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"machine.device: process {own.index} of this machine has no CUDA device of its own; there are {count}.",
            fix=f"Start torchrun with --nproc-per-node {count}, or set machine.device: cpu.",
        )
    if "nccl" not in dist.get_backend_config():
        raise ConfigError(
            f"machine.device: {device} on {socket.gethostname()}, but another machine of this torchrun has no CUDA.",
            fix="Leave that machine out, or set machine.device: cpu for all.",
        )
    torch.cuda.set_device(own)
    return own


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
