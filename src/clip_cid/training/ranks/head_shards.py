"""The rows of a head spread over ranks, as one file of each rank: any number of ranks can resume from them.

A shard holds the rows of the centers and, if they learn, their optimizer state. The rows that the drift is
measured from are not kept: they are the centers of the clustering, from which a head is made before it is
loaded, and the choice of these rows depends on the number of ranks.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_cid.errors import RunError
from clip_cid.method.distill.cluster_distillation import CenterHead
from clip_cid.run_folder import atomic_file

WEIGHT = "weight"
_FORMAT, _ABOUT = 1, "clip_cid_head_shard"
_NAME = re.compile(r"head-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class _Part:
    """A shard's file and its header."""

    path: Path
    first: int
    count: int
    total: int
    step: int
    rows: str
    """What is kept of a row: name, type and shape of each tensor."""

    @property
    def stop(self) -> int:
        return self.first + self.count


def save_shard(folder: Path, head: CenterHead, optimizer_state: Mapping[str, Tensor] | None, *, step: int = 0) -> Path:
    """Write this rank's rows; every rank of the head's group calls this. See `write_rows`.

    Args:
        folder: Where the shards of one moment lie.
        head: The head, or this rank's part of it.
        optimizer_state: What the optimizer keeps of each row, `RowAdam.state[head.weight]`; absent for a frozen head.
        step: How many steps are done.
    """
    rank, ranks, first, total = 0, 1, 0, len(head.weight)
    if head.shard is not None:
        rank, ranks = dist.get_rank(head.shard.group), dist.get_world_size(head.shard.group)
        first, total = head.shard.first, head.shard.total
    rows = {WEIGHT: head.weight, **(optimizer_state or {})}
    return write_rows(folder, rows, first=first, total=total, rank=rank, ranks=ranks, step=step)


def write_rows(
    folder: Path, rows: Mapping[str, Tensor], *, first: int, total: int, rank: int, ranks: int, step: int = 0
) -> Path:
    """Write `head-00003-of-00008.safetensors`, whole or not at all.

    Args:
        folder: Where the shards of one moment lie; made when it does not exist.
        rows: `weight`, and whatever else there is of each row; possibly of no rows.
        first: The number of the first of them among all.
        total: K, over all ranks.
        rank: Which shard this is.
        ranks: Of how many.
        step: How many steps are done; shards of different steps are not one head.

    Raises:
        ValueError: The rows are not among the `total`, or a tensor is not by row.
    """
    count = len(rows[WEIGHT])
    if not (0 <= rank < ranks and first >= 0 and first + count <= total):
        raise ValueError(f"rows {first} to {first + count} of {total} cannot be those of rank {rank} of {ranks}")
    for name, value in rows.items():
        if value.ndim == 0 or len(value) != count:
            raise ValueError(f"{name} must be of the {count} rows, got the shape {tuple(value.shape)}")
    about = {"format": _FORMAT, "first": first, "count": count, "total": total, "step": step}
    tensors = {name: value.detach().cpu().contiguous() for name, value in rows.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"head-{rank:05d}-of-{ranks:05d}.safetensors"
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={_ABOUT: json.dumps(about)})
    return path


def load_rows(folder: Path, first: int, stop: int) -> dict[str, Tensor]:
    """Rows `first` to `stop` (not included) of all that the shards hold, however many ranks wrote them.

    All headers are read, but of the tensors these rows alone: no rank ever holds the whole head.

    Returns:
        `weight`, and the optimizer's tensors by their names; on the CPU.

    Raises:
        RunError: The shards are not one whole head: one is missing, cut short or of another moment, they overlap or
            leave a gap, or the head is smaller than `stop`.
    """
    parts = _whole_head(folder)
    if not 0 <= first <= stop <= parts[-1].stop:
        raise _broken(folder, f"rows {first:,} to {stop:,} are wanted, but the head has {parts[-1].stop:,}")

    pieces: dict[str, list[Tensor]] = {}
    for part in parts:
        start, end = (min(max(row, part.first), part.stop) - part.first for row in (first, stop))
        if start == end and part is not parts[0]:  # the first one always: of no rows there are still width and type
            continue
        with safe_open(part.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                pieces.setdefault(name, []).append(file.get_slice(name)[start:end])
    return {name: torch.cat(rows) for name, rows in pieces.items()}


def num_rows(folder: Path) -> int:
    """K, over all shards.

    Raises:
        RunError: As `load_rows`.
    """
    return _whole_head(folder)[-1].stop


def _whole_head(folder: Path) -> list[_Part]:
    """All shards in the order of their rows, which follow each other from 0 to K."""
    named = {path: match for path in sorted(folder.glob("head-*")) if (match := _NAME.fullmatch(path.name))}
    if not named:
        raise _broken(folder, "there are no shards of a head")

    # One file of each rank, and of one number of ranks.
    ranks = sorted({int(match[2]) for match in named.values()})
    if len(ranks) > 1:
        raise _broken(folder, f"there are shards of {' and of '.join(map(str, ranks))} ranks")
    missing = sorted(set(range(ranks[0])) - {int(match[1]) for match in named.values()})
    if missing:
        raise _broken(folder, f"{len(named)} of {ranks[0]} shards; missing: {', '.join(map(str, missing))}")

    # One head: the shards agree, and their rows follow each other.
    parts = sorted((_read(path) for path in named), key=lambda part: (part.first, part.count))
    at = 0
    for part in parts:
        for name in ("total", "step", "rows"):
            ours, theirs = getattr(part, name), getattr(parts[0], name)
            if ours != theirs:
                raise _broken(part.path, f"{name} {ours}, but {parts[0].path.name} has {theirs}")
        if part.first != at:
            what = "overlap" if part.first < at else "leave a gap"
            raise _broken(part.path, f"the shards {what}: it begins at row {part.first:,} where {at:,} comes next")
        at = part.stop
    if at != parts[0].total:
        raise _broken(folder, f"the shards hold {at:,} of {parts[0].total:,} centers")
    return parts


def _read(path: Path) -> _Part:
    """A shard from its header alone; safetensors compares the length of the file with it."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            kinds = {name: (rows.get_dtype(), tuple(rows.get_shape())) for name, rows in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, f"cannot be read ({error})") from error
    if about.pop("format", None) != _FORMAT or WEIGHT not in kinds:
        raise _broken(path, "not a shard of a head, or of another version of clip-cid")
    for name, (_, shape) in kinds.items():
        if shape[:1] != (about["count"],):
            raise _broken(path, f"{name} has the shape {shape}, not {about['count']:,} rows")
    rows = ", ".join(f"{name} {kind} {list(shape[1:])}" for name, (kind, shape) in kinds.items())
    return _Part(path, rows=rows, **about)


def _broken(path: Path, problem: str) -> RunError:
    folder = path.parent if path.suffix == ".safetensors" else path
    return RunError(
        f"{path}: {problem}.",
        fix=f"Delete {folder} to resume from what was saved before it, or train from the start.",
    )
