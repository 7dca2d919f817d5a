"""Shards that are embedded one at a time, on any machine: each is a small store of its own, there whole or not at all.

The store of the run takes them over, as it does with shards that another run has embedded.
"""

import collections
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from clip_cid.data.embeddings.finished_shards import read_shards
from clip_cid.data.embeddings.from_pairs import Encoder, embed_shard
from clip_cid.data.embeddings.writer import StoreWriter
from clip_cid.data.pairs.contents import ShardContents, keep_contents
from clip_cid.data.pairs.crops import Views
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError, RunError
from clip_cid.file_digests import FileDigests
from clip_cid.recipe import MachineConfig, PairsConfig
from clip_cid.run_folder import own_mark, read_json, remove_folder, sync, write_json

_REMARKS = "remarks.json"


class LoneShard(NamedTuple):
    """A task: the number of a shard of the pairs, and the store that holds it afterwards."""

    number: int
    store: Path


@dataclasses.dataclass(frozen=True)
class EmbeddedShard:
    """What is known of a shard that is embedded."""

    contents: ShardContents
    skipped: list[dict[str, Any]]
    """As in the store of all pairs."""
    remarks: collections.Counter[str]


def lone_shard(folder: Path, pairs: Pairs, number: int) -> LoneShard:
    """The task of a shard; its store is named by the state of the files behind it, wherever they stand in the pairs."""
    return LoneShard(number, folder / pairs.shard_state(number)[:20])


def lone_stores(folder: Path) -> list[Path]:
    """All stores that tasks have left."""
    return sorted(folder.glob("[0-9a-f]*")) if folder.is_dir() else []


def embed_lone_shard(
    task: LoneShard,
    *,
    pairs: Pairs,
    encoder: Encoder,
    identity: dict[str, Any],
    views: Views | None,
    settings: PairsConfig,
    machine: MachineConfig,
    made_on: str,
) -> None:
    """Embed one shard. Of two processes that do so at once, the first one counts."""
    if task.store.is_dir():
        return
    rows, remarks = embed_shard(pairs, task.number, encoder, views, settings, machine, made_on)
    first_row = pairs.shards[task.number].first_row
    skipped = [entry | {"row": entry["row"] - first_row} for entry in rows.skipped]

    part = task.store.with_name(f".{task.store.name}.part-{own_mark()}")
    try:
        writer = StoreWriter(
            part, teacher=identity, dim=encoder.dim, fields=settings.keep_fields, num_shards=1, views=views
        )
        writer.add(dataclasses.replace(rows, skipped=skipped))
        write_json(part / _REMARKS, remarks)
        _publish(part, task.store)
    finally:
        remove_folder(part)


def _publish(part: Path, store: Path) -> None:
    try:
        os.rename(part, store)
    except OSError:
        if not store.is_dir():
            raise
    sync(store.parent)


def read_lone_shard(task: LoneShard, pairs: Pairs) -> EmbeddedShard:
    """What a task has left.

    Raises:
        DataError: It is damaged.
    """
    held = read_shards(task.store)
    try:
        remarks = collections.Counter[str](read_json(task.store / _REMARKS))
        _, shards, skipped = held if held is not None else ({}, [], ())
        (shard,) = shards
    except (RunError, ValueError, TypeError) as error:
        raise DataError(
            f"{task.store}: not the store of one shard ({error}).",
            fix="Delete that folder, then run the same command again.",
        ) from error
    first_row = pairs.shards[task.number].first_row
    return EmbeddedShard(
        ShardContents(shard.contents or "", shard.contents_with_fields or ""),
        [entry | {"row": first_row + entry["row"]} for entry in skipped],
        remarks,
    )


def remember_contents(folder: Path, pairs: Pairs, digests: FileDigests) -> None:
    """Spare reading the pairs of shards that an earlier attempt has embedded, if their files are as they were."""
    if not (left := {*lone_stores(folder)}):
        return
    for number in range(len(pairs.shards)):
        task = lone_shard(folder, pairs, number)
        if task.store in left:
            with contextlib.suppress(DataError):  # it will be made again
                keep_contents(pairs, number, read_lone_shard(task, pairs).contents, digests)
