"""Writing an embedding store shard by shard, so that a killed run resumes after the last finished shard."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from clip_cid.data.embeddings.files import (
    AGAIN,
    FOLDERS,
    PROGRESS_FILE,
    SKIPPED_FILE,
    STORE_FILE,
    StoreInfo,
    StoreShard,
    check_shard,
    check_unit,
    read_info,
    record_file,
    shard_from_json,
    write_array,
    write_info,
    write_table,
)
from clip_cid.errors import ConfigError, DataError
from clip_cid.journal import Journal
from clip_cid.recipe import STORE_COLUMNS


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """The embeddings and the metadata of one shard of the pairs; rows that are not ok are zeros."""

    name: str
    images: Float[np.ndarray, "rows dim"]
    texts: Float[np.ndarray, "rows dim"]
    """Of each first caption."""
    more_texts: Float[np.ndarray, "more dim"]
    """Embeddings of the other captions of the ok rows, in row order."""
    ok: Bool[np.ndarray, " rows"]
    keys: list[str]
    captions: list[tuple[str, ...]]
    sizes: list[tuple[int, int]]
    """Width and height in pixels; 0 where unknown."""
    fields: dict[str, list[str]]
    skipped: list[dict[str, Any]]
    """row (of the store), key, shard and reason of each row that is not ok."""


class StoreWriter:
    """Adds finished shards to a store and, at the end, declares it finished.

    Raises:
        DataError: The folder holds embeddings of another teacher or of other pairs, or a finished shard was damaged.
    """

    def __init__(
        self,
        out: Path,
        *,
        teacher: dict[str, Any],
        pairs: str | None,
        dim: int,
        fields: tuple[str, ...],
        num_shards: int,
    ) -> None:
        if taken := sorted(set(fields) & set(STORE_COLUMNS)):
            raise ConfigError(
                f"pairs.keep_fields: {', '.join(taken)} would hide a column the store has of its own.",
                fix=f"Rename the field in the data, or leave it out; taken are {', '.join(STORE_COLUMNS)}.",
            )

        self._out, self._progress = out, Journal(out / PROGRESS_FILE)
        self._digits = max(4, len(str(num_shards - 1)))
        self._info = StoreInfo(
            teacher=json.loads(json.dumps(teacher)),
            pairs=pairs,
            dim=dim,
            dtype="float16",
            fields=fields,
            key_column="key",
            captions_column="captions",
            root=None,
            shards=(),
        )
        self.shards: list[StoreShard] = []
        self.skipped: list[dict[str, Any]] = []
        self._resume()

    @property
    def rows(self) -> int:
        """Rows of the finished shards."""
        return sum(shard.rows for shard in self.shards)

    def add(self, rows: ShardRows) -> None:
        """Write a shard; once this returns, the shard survives a kill."""
        _check_rows(rows, self._info)
        number = f"{len(self.shards):0{self._digits}d}"
        paths = {kind: f"{folder}/{folder}_{number}.npy" for kind, folder in FOLDERS.items() if kind != "metadata"}
        paths["metadata"] = f"metadata/metadata_{number}.parquet"
        arrays = {"image": rows.images, "text": rows.texts, "more_text": rows.more_texts}
        if not len(rows.more_texts):
            del paths["more_text"], arrays["more_text"]

        for path in paths.values():
            (self._out / path).parent.mkdir(exist_ok=True)
        for kind, array in arrays.items():
            half = array.astype(np.float16)
            good = np.ones(len(half), dtype=bool) if kind == "more_text" else rows.ok
            check_unit(half, good, where=f"{rows.name} ({kind})", first_row=0)
            write_array(self._out / paths[kind], half)
        write_table(self._out / paths["metadata"], _metadata(rows))

        # The journal's line comes last: a shard without it does not exist.
        files = {kind: record_file(self._out, path) for kind, path in paths.items()}
        shard = StoreShard(rows.name, len(rows.ok), int(rows.ok.sum()), len(rows.more_texts), files)
        self._record({"shard": dataclasses.asdict(shard), "skipped": rows.skipped})
        self.shards.append(shard)
        self.skipped += rows.skipped

    def finish(self) -> StoreInfo:
        """Declare the store finished."""
        info = dataclasses.replace(self._info, shards=tuple(self.shards))
        self.write_skipped()
        write_info(self._out, info)
        self._progress.path.unlink(missing_ok=True)
        return info

    def write_skipped(self, unfinished: Iterable[dict[str, Any]] = ()) -> Path:
        """List the bad rows so far, and those of a shard that will not be finished; returns the file."""
        path = self._out / SKIPPED_FILE
        Journal(path).replace(*self.skipped, *unfinished)
        return path

    def _resume(self) -> None:
        """Take over the shards that an earlier process finished, and delete unfinished ones."""
        self._out.mkdir(parents=True, exist_ok=True)

        if self._progress.path.is_file():
            self._progress.drop_torn_line()
            made_from, self.shards, self.skipped = _read_progress(self._progress)
        elif (self._out / STORE_FILE).is_file():
            made_from, self.shards, self.skipped = _read_finished(self._out)
        else:
            made_from = _made_from(self._info)
            self._record(made_from)

        _check_same(self._out, made_from, _made_from(self._info))
        for shard in self.shards:
            check_shard(self._out, shard, dim=self._info.dim, dtype=self._info.dtype)

        known = {file.path for shard in self.shards for file in shard.files.values()}
        for folder in FOLDERS.values():
            for path in (self._out / folder).glob("*"):
                if path.relative_to(self._out).as_posix() not in known:
                    path.unlink()

    def _record(self, value: dict[str, Any]) -> None:
        self._progress.append(value)
        self._progress.sync()


def _made_from(info: StoreInfo) -> dict[str, Any]:
    """The facts that must be equal for two shards to lie in one store."""
    return {"teacher": info.teacher, "pairs": info.pairs, "dim": info.dim, "fields": list(info.fields)}


def _read_progress(progress: Journal) -> tuple[dict[str, Any], list[StoreShard], list[dict[str, Any]]]:
    try:
        made_from, *finished = progress.read()
        shards = [shard_from_json(entry["shard"]) for entry in finished]
        return made_from, shards, [skipped for entry in finished for skipped in entry["skipped"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{progress.path}: not a record of finished shards ({error}).", fix=AGAIN) from error


def _read_finished(out: Path) -> tuple[dict[str, Any], list[StoreShard], list[dict[str, Any]]]:
    """The store of a process that ended after its last shard, before the stage's folder was renamed."""
    info = read_info(out)
    try:
        return _made_from(info), list(info.shards), Journal(out / SKIPPED_FILE).read()
    except (OSError, ValueError) as error:
        raise DataError(f"{out / SKIPPED_FILE}: cannot be read ({error}).", fix=AGAIN) from error


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Teacher and pairs are the same. The reference of a teacher is not compared: a folder may have moved."""
    if not isinstance(before.get("teacher"), dict):
        raise DataError(f"{out / PROGRESS_FILE}: not a record of finished shards.", fix=AGAIN)

    parts = {name for name in {*before["teacher"], *now["teacher"]} if name != "reference"}
    different = sorted(name for name in parts if before["teacher"].get(name) != now["teacher"].get(name))
    different += [name for name in ("pairs", "dim", "fields") if before.get(name) != now[name]]
    if different:
        raise DataError(
            f"{out}: holds embeddings of another teacher or of other pairs ({', '.join(different)} differ).",
            fix="Embeddings are not mixed: use another run folder, or start over with --force.",
        )


def _check_rows(rows: ShardRows, info: StoreInfo) -> None:
    """One of everything for each row, and an embedding for each caption of the ok rows."""
    count = len(rows.ok)
    lengths = {"images": rows.images, "texts": rows.texts, "keys": rows.keys, "captions": rows.captions}
    lengths |= {"sizes": rows.sizes, **{f"fields[{name!r}]": values for name, values in rows.fields.items()}}
    for name, values in lengths.items():
        if len(values) != count:
            raise ValueError(f"{name}: must have {count} rows, got {len(values)}")

    if tuple(rows.fields) != info.fields:
        raise ValueError(f"fields: must be {info.fields}, got {tuple(rows.fields)}")

    further = sum(len(captions) - 1 for captions, good in zip(rows.captions, rows.ok, strict=True) if good)
    if len(rows.more_texts) != further:
        raise ValueError(f"more_texts: must have {further} rows, got {len(rows.more_texts)}")
    for name in ("images", "texts", "more_texts"):
        if (width := getattr(rows, name).shape[1]) != info.dim:
            raise ValueError(f"{name}: must be {info.dim} wide, got {width}")

    if len(rows.skipped) != count - int(rows.ok.sum()):
        raise ValueError(f"skipped: must have {count - int(rows.ok.sum())} entries, got {len(rows.skipped)}")


def _metadata(rows: ShardRows) -> pa.Table:
    columns = {
        "key": pa.array(rows.keys, pa.string()),
        "caption": pa.array([captions[0] if captions else "" for captions in rows.captions], pa.string()),
        "captions": pa.array([list(captions) for captions in rows.captions], pa.list_(pa.string())),
        "ok": pa.array(rows.ok),
        "width": pa.array([width for width, _ in rows.sizes], pa.int32()),
        "height": pa.array([height for _, height in rows.sizes], pa.int32()),
    }
    return pa.table(columns | {name: pa.array(values, pa.string()) for name, values in rows.fields.items()})
