"""Writing an embedding store shard by shard, so that a killed run resumes after the last finished shard."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from clip_cid.data.embeddings.files import (
    FOLDERS,
    PROGRESS_FILE,
    SKIPPED_FILE,
    StoreFile,
    StoreInfo,
    StoreShard,
    check_unit,
    record_file,
    write_array,
    write_info,
    write_table,
)
from clip_cid.data.embeddings.finished_shards import FinishedShard, check_same, is_whole, made_from_of, read_shards
from clip_cid.data.pairs.contents import contents_of_shards
from clip_cid.data.pairs.crops import Views
from clip_cid.errors import ConfigError
from clip_cid.journal import Journal
from clip_cid.recipe import STORE_COLUMNS
from clip_cid.run_folder import link_or_copy, remove_folder


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
    contents: str | None = None
    """Digest of keys, images and captions, to know the shard again."""
    contents_with_fields: str | None = None
    views: Float[np.ndarray, "rows views dim"] | None = None
    """Of crops of each image, if the store has any."""
    made_on: str | None = None
    """As in `StoreShard`."""

    @property
    def captioned(self) -> Bool[np.ndarray, " rows"]:
        """The ok rows with a text embedding."""
        return self.ok & np.array([bool(captions) for captions in self.captions], dtype=bool)


class StoreWriter:
    """Adds finished shards to a store and, at the end, declares it finished.

    Raises:
        DataError: The folder holds embeddings of another teacher, with other fields or other views.
    """

    def __init__(
        self,
        out: Path,
        *,
        teacher: dict[str, Any],
        dim: int,
        fields: tuple[str, ...],
        num_shards: int,
        views: Views | None = None,
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
            pairs=None,
            dim=dim,
            dtype="float16",
            fields=fields,
            key_column="key",
            captions_column="captions",
            root=None,
            shards=(),
            views=views,
        )
        self.shards: list[StoreShard] = []
        self.skipped: list[dict[str, Any]] = []
        self._resume()

    @property
    def made_from(self) -> dict[str, Any]:
        """The facts that must be equal for two shards to lie in one store."""
        return made_from_of(self._info)

    @property
    def views(self) -> Views | None:
        return self._info.views

    @property
    def rows(self) -> int:
        """Rows of the finished shards."""
        return sum(shard.rows for shard in self.shards)

    def add(self, rows: ShardRows) -> None:
        """Write a shard; once this returns, the shard survives a kill."""
        _check_rows(rows, self._info)
        arrays = {"image": rows.images, "text": rows.texts}
        arrays |= {"more_text": rows.more_texts} if len(rows.more_texts) else {}
        arrays |= {"view": rows.views} if rows.views is not None else {}
        paths = self._paths([*arrays, "metadata"])

        for kind, array in arrays.items():
            good = {"more_text": np.ones(len(array), dtype=bool), "text": rows.captioned}.get(kind, rows.ok)
            self._write_unit(paths[kind], array, good, where=f"{rows.name} ({kind})")
        write_table(self._out / paths["metadata"], _metadata(rows))

        # The journal's line comes last: a shard without it does not exist.
        files = {kind: record_file(self._out, path) for kind, path in paths.items()}
        count = len(rows.ok)
        contents = (rows.contents, rows.contents_with_fields)
        self._add(
            StoreShard(
                rows.name,
                count,
                int(rows.ok.sum()),
                len(rows.more_texts),
                files,
                *contents,
                without_text=int((rows.ok & ~rows.captioned).sum()),
                made_on=rows.made_on,
            ),
            rows.skipped,
        )

    def take(
        self,
        finished: FinishedShard,
        name: str,
        *,
        metadata: pa.Table | None,
        with_fields: str,
        views: Float[np.ndarray, "rows views dim"] | None = None,
    ) -> None:
        """Add a shard that another store holds: its files are linked, or copied where that is not possible.

        Args:
            finished: The shard, whole.
            name: Of the shard in these pairs.
            metadata: Its metadata with other fields; None keeps the file.
            with_fields: Digest of the contents with the fields.
            views: Those of this store, if it has any and the shard has others; None keeps the file.
        """
        keep_views = self.views is not None and views is None
        taken = {kind: file for kind, file in finished.shard.files.items() if kind != "view" or keep_views}
        kinds = {*taken, "view"} if views is not None else taken.keys()
        paths, files = self._paths(kind for kind in FOLDERS if kind in kinds), dict[str, StoreFile]()
        for kind, file in taken.items():
            if kind == "metadata" and metadata is not None:
                write_table(self._out / paths[kind], metadata)
                files[kind] = record_file(self._out, paths[kind])
                continue
            remove_folder(self._out / paths[kind])  # of a shard that was not finished
            link_or_copy(finished.store / file.path, self._out / paths[kind])
            files[kind] = dataclasses.replace(file, path=paths[kind])
        if views is not None:
            bad = [entry["row"] for entry in finished.skipped]
            self._write_unit(paths["view"], views, ~np.isin(np.arange(len(views)), bad), where=f"{name} (view)")
            files["view"] = record_file(self._out, paths["view"])
        files = {kind: files[kind] for kind in paths}

        first_row = self.rows
        skipped = [entry | {"row": first_row + entry["row"], "shard": name} for entry in finished.skipped]
        shard = dataclasses.replace(finished.shard, name=name, files=files, contents_with_fields=with_fields)
        self._add(shard, skipped)

    def whole_shards(self, contents: Sequence[str]) -> int:
        """How many of the finished shards, from the first on, are as they were written and of these contents.

        Args:
            contents: Of as many shards of the pairs as are finished here.
        """
        for number, (shard, wanted) in enumerate(zip(self.shards, contents, strict=False)):
            info = self._info
            if shard.contents != wanted or not is_whole(
                self._out, shard, dim=info.dim, dtype=info.dtype, views=info.views
            ):
                return number
        return min(len(self.shards), len(contents))

    def finish(self) -> StoreInfo:
        """Declare the store finished."""
        contents = [shard.contents for shard in self.shards if shard.contents is not None]
        pairs = contents_of_shards(contents) if len(contents) == len(self.shards) else None
        info = dataclasses.replace(self._info, shards=tuple(self.shards), pairs=pairs)
        self.write_skipped()
        write_info(self._out, info)
        self._progress.path.unlink(missing_ok=True)
        return info

    def write_skipped(self, unfinished: Iterable[dict[str, Any]] = ()) -> Path:
        """List the bad rows so far, and those of a shard that will not be finished; returns the file."""
        path = self._out / SKIPPED_FILE
        Journal(path).replace(*self.skipped, *unfinished)
        return path

    def _write_unit(
        self, path: str, vectors: Float[np.ndarray, "rows *views dim"], good: Bool[np.ndarray, " rows"], *, where: str
    ) -> None:
        """Unit rows, or several for each row, in float16."""
        half = vectors.astype(np.float16)
        flat = half.reshape(-1, half.shape[-1])
        check_unit(flat, good.repeat(len(flat) // max(len(good), 1)), where=where, first_row=0)
        write_array(self._out / path, half)

    def _add(self, shard: StoreShard, skipped: list[dict[str, Any]]) -> None:
        self._record({"shard": dataclasses.asdict(shard), "skipped": skipped})
        self.shards.append(shard)
        self.skipped += skipped

    def _paths(self, kinds: Iterable[str]) -> dict[str, str]:
        """The files of the next shard, by kind; their folders exist."""
        number = f"{len(self.shards):0{self._digits}d}"
        paths: dict[str, str] = {}
        for kind in kinds:
            folder, suffix = FOLDERS[kind], "parquet" if kind == "metadata" else "npy"
            (self._out / folder).mkdir(exist_ok=True)
            paths[kind] = f"{folder}/{folder}_{number}.{suffix}"
        return paths

    def _resume(self) -> None:
        """Take over the shards that an earlier process finished, and delete unfinished ones."""
        self._out.mkdir(parents=True, exist_ok=True)

        if self._progress.path.is_file():
            self._progress.drop_torn_line()
        if (held := read_shards(self._out)) is not None:
            made_from, self.shards, self.skipped = held
        else:
            made_from = self.made_from
            self._progress.replace(made_from)
        check_same(self._out, made_from, self.made_from)

        known = {file.path for shard in self.shards for file in shard.files.values()}
        for folder in FOLDERS.values():
            for path in (self._out / folder).glob("*"):
                if path.relative_to(self._out).as_posix() not in known:
                    path.unlink()

    def _record(self, value: dict[str, Any]) -> None:
        self._progress.append(value)
        self._progress.sync()


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

    further = sum(len(captions[1:]) for captions, good in zip(rows.captions, rows.ok, strict=True) if good)
    if len(rows.more_texts) != further:
        raise ValueError(f"more_texts: must have {further} rows, got {len(rows.more_texts)}")
    for name in ("images", "texts", "more_texts"):
        if (width := getattr(rows, name).shape[1]) != info.dim:
            raise ValueError(f"{name}: must be {info.dim} wide, got {width}")

    wanted = None if info.views is None else (count, info.views.count, info.dim)
    if (shape := None if rows.views is None else rows.views.shape) != wanted:
        raise ValueError(f"views: must be {wanted}, got {shape}")

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
