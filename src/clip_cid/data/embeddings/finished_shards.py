"""Shards that other stores hold, finished or not: a shard of the same contents is not embedded again."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clip_cid import log
from clip_cid.data.embeddings.files import (
    AGAIN,
    PROGRESS_FILE,
    SKIPPED_FILE,
    STORE_FILE,
    StoreInfo,
    StoreShard,
    check_shard,
    read_info,
    shard_from_json,
)
from clip_cid.data.pairs.crops import Views
from clip_cid.errors import DataError
from clip_cid.file_digests import sha256_file
from clip_cid.journal import Journal

Held = tuple[dict[str, Any], list[StoreShard], list[dict[str, Any]]]
"""What shards were made from, the shards, and the rows that were skipped."""


@dataclass(frozen=True)
class FinishedShard:
    """A shard of another store."""

    store: Path
    shard: StoreShard
    skipped: list[dict[str, Any]]
    """As in the store, but each row counted within the shard."""
    views: Views | None = None
    """Of the store."""

    def usable_views(self, wanted: Views | None) -> int:
        """How many of the wanted views it holds; these are the first ones."""
        if wanted is None or self.views is None or "view" not in self.shard.files:
            return 0
        same = replace(self.views, count=wanted.count) == wanted
        return min(self.views.count, wanted.count) if same else 0


class FinishedShards:
    """The shards of several stores, by their contents.

    Args:
        stores: Folders of finished and unfinished stores; one that cannot be read is left out with a word.
        made_from: What the shards must be made from, except for fields and views.
    """

    def __init__(self, stores: Sequence[Path], made_from: dict[str, Any]) -> None:
        self._dim = made_from["dim"]
        self._by_contents: dict[str, list[FinishedShard]] = {}
        for store in stores:
            for finished in _of_store(store, made_from):
                if finished.shard.contents is not None:
                    self._by_contents.setdefault(finished.shard.contents, []).append(finished)
        wanted = views_in(made_from)
        for same in self._by_contents.values():
            same.sort(key=lambda one: -one.usable_views(wanted))  # a stable sort: the latest of equals

    def __len__(self) -> int:
        return len(self._by_contents)

    def find(self, contents: str) -> FinishedShard | None:
        """A shard of these contents whose files are as they were written; they are read for it."""
        for finished in self._by_contents.get(contents, []):
            if is_whole(finished.store, finished.shard, dim=self._dim, dtype="float16", views=finished.views):
                return finished
            log.warn(f"{finished.store}: the files of shard {finished.shard.name} are damaged; it is embedded again")
        return None


def _of_store(store: Path, made_from: dict[str, Any]) -> list[FinishedShard]:
    try:
        held = read_shards(store)
        if held is None:
            return []
        own = {name: made_from.get(name) for name in ("fields", "views")}
        check_same(store, held[0] | own, made_from)
        views = views_in(held[0])
    except DataError as error:
        log.info(f"embed     not used: {error.problem}")
        return []

    finished: list[FinishedShard] = []
    first_row = 0
    for shard in held[1]:
        rows = range(first_row, first_row + shard.rows)
        skipped = [entry | {"row": entry["row"] - first_row} for entry in held[2] if entry["row"] in rows]
        finished.append(FinishedShard(store, shard, skipped, views))
        first_row += shard.rows
    return finished


def read_shards(store: Path) -> Held | None:
    """The shards of a finished or unfinished store; None if nothing was begun there.

    Raises:
        DataError: The record of the shards is damaged.
    """
    if (progress := store / PROGRESS_FILE).is_file():
        return _read_progress(Journal(progress))
    return _read_finished(store) if (store / STORE_FILE).is_file() else None


def is_whole(root: Path, shard: StoreShard, *, dim: int, dtype: str, views: Views | None) -> bool:
    """Whether every file of a shard is as it was written, byte by byte."""
    try:
        check_shard(root, shard, dim=dim, dtype=dtype, views=views)
        return has_its_bytes(root, shard)
    except (DataError, OSError):
        return False


def has_its_bytes(root: Path, shard: StoreShard) -> bool:
    """Whether the digest of each file of a shard is as recorded."""
    try:
        return all(sha256_file(root / file.path) == file.sha256 for file in shard.files.values())
    except OSError:
        return False


def made_from_of(info: StoreInfo) -> dict[str, Any]:
    """The facts that must be equal for two shards to lie in one store, as JSON."""
    views = {} if info.views is None else {"views": asdict(info.views)}
    return {"teacher": info.teacher, "dim": info.dim, "fields": list(info.fields), **views}


def check_same(store: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Teacher, width, fields and views are the same. The reference of a teacher is not compared: a folder may have moved.

    Raises:
        DataError: They are not.
    """
    if not isinstance(before.get("teacher"), dict):
        raise DataError(f"{store / PROGRESS_FILE}: not a record of finished shards.", fix=AGAIN)

    parts = {name for name in {*before["teacher"], *now["teacher"]} if name != "reference"}
    different = sorted(name for name in parts if before["teacher"].get(name) != now["teacher"].get(name))
    different += [name for name in ("dim", "fields", "views") if before.get(name) != now.get(name)]
    if different:
        raise DataError(
            f"{store}: holds embeddings of another teacher or other fields ({', '.join(different)} differ).",
            fix="Embeddings are not mixed: use another run folder, or start over with --force.",
        )


def views_in(made_from: dict[str, Any]) -> Views | None:
    """The views that shards were made with.

    Raises:
        DataError: They are not as any version writes them.
    """
    views = made_from.get("views")
    try:
        return None if views is None else Views(**views)
    except TypeError as error:
        raise DataError(f"Not the views of a store: {views!r}.", fix=AGAIN) from error


def _read_progress(progress: Journal) -> Held | None:
    try:
        lines = progress.read()
        if not lines:  # killed before its first line
            return None
        made_from, *finished = lines
        shards = [shard_from_json(entry["shard"]) for entry in finished]
        return made_from, shards, [skipped for entry in finished for skipped in entry["skipped"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{progress.path}: not a record of finished shards ({error}).", fix=AGAIN) from error


def _read_finished(store: Path) -> Held:
    """Of a store that is finished; also of a process that ended before the stage's folder was renamed."""
    info = read_info(store)
    made_from = made_from_of(info)
    try:
        return made_from, list(info.shards), Journal(store / SKIPPED_FILE).read()
    except (OSError, ValueError) as error:
        raise DataError(f"{store / SKIPPED_FILE}: cannot be read ({error}).", fix=AGAIN) from error
