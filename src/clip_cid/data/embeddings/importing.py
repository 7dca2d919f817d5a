"""Take over embeddings made elsewhere: write a manifest here; arrays that can be read in place stay there.

Arrays that cannot be read in place (members of a .npz, float64) or are to be scaled are converted once,
shard by shard.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from clip_cid import log, units
from clip_cid.data.embeddings.files import (
    COLUMNS,
    FOLDERS,
    PROGRESS_FILE,
    SKIPPED_FILE,
    STORE_FILE,
    StoreFile,
    StoreInfo,
    StoreShard,
    array_header,
    check_unit,
    record_file,
    write_info,
    write_table,
)
from clip_cid.data.embeddings.layouts import FIX, LayoutShard, Vectors, find_embeddings
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError
from clip_cid.run_folder import atomic_file

_KEY_COLUMNS = ("key", "uid", "image_path")
_CAPTION_COLUMNS = ("caption", "text")


def import_existing(source: Path, out: Path, *, normalize: bool = False) -> None:
    """Make `out` a store that refers to `source`: a store of ours, or any layout of `layouts.py`.

    Every array is read once: lengths, values, and a digest of each file.

    Args:
        source: A folder or a file.
        out: The store to make; converted shards that a killed attempt on the same source left there are used.
        normalize: Scale rows to length one (into `out`) instead of refusing rows of another length.

    Raises:
        DataError: It is none of these, a part is missing or cut short, widths differ, keys repeat, a row is zero or not
            finite, or (without `normalize`) not of length 1.
    """
    source = source.absolute()  # not resolved: a link has the suffix that its target may lack
    out.mkdir(parents=True, exist_ok=True)

    if (source / STORE_FILE).is_file() or (source / PROGRESS_FILE).is_file():
        info = EmbeddingStore.open(source).info
        info = dataclasses.replace(info, root=info.root or str(source))
        if (source / SKIPPED_FILE).is_file():
            shutil.copyfile(source / SKIPPED_FILE, out / SKIPPED_FILE)
    else:
        info = _take_over(source, find_embeddings(source), out, normalize=normalize)
        (out / SKIPPED_FILE).write_text("", encoding="utf-8")

    write_info(out, info)
    store = EmbeddingStore.open(out)
    if not len(store.keys):
        raise DataError(f"{source}: no embeddings there.", fix=FIX)
    with log.progress("check", store.rows, unit="rows") as bar:
        store.check_values(bar.advance)


def _take_over(source: Path, layout: Sequence[LayoutShard], out: Path, *, normalize: bool) -> StoreInfo:
    dtypes = {vectors.dtype.newbyteorder("=") for shard in layout for vectors in shard.vectors.values()}
    dtype = np.dtype(np.float16 if dtypes == {np.dtype(np.float16)} else np.float32)
    columns = _columns(layout[0])
    _log_plan(layout, out, dtype, normalize=normalize)

    shards: list[StoreShard] = []
    with log.progress("take over", sum(shard.image.rows for shard in layout), unit="rows") as bar:
        for number, shard in enumerate(layout):
            files = {"metadata": _metadata_file(shard, out, number)}
            for kind, vectors in shard.vectors.items():
                name = f"{FOLDERS[kind]}/{FOLDERS[kind]}_{number:04d}.npy"
                files[kind] = _array_file(vectors, out, name, dtype, normalize=normalize)
            rows = shard.image.rows
            shards.append(StoreShard(name=shard.name, rows=rows, ok=rows, more=0, files=files))
            bar.advance(rows)

    return StoreInfo(
        teacher={"reference": f"unknown (taken over from {source})"} | _members(layout[0]),
        pairs=None,
        dim=layout[0].image.dim,
        dtype=dtype.name,
        fields=columns.fields,
        key_column=columns.key,
        captions_column=columns.caption,
        root=None,
        shards=tuple(shards),
    )


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The roles of the columns of the metadata."""

    key: str
    caption: str | None
    fields: tuple[str, ...]


def _columns(shard: LayoutShard) -> _Columns:
    """The columns of the first shard's metadata, which all shards have.

    Raises:
        DataError: There is no key, or no caption though there are text embeddings.
    """
    if shard.metadata is None:
        return _Columns("key", None, ())
    names = pq.read_schema(shard.metadata).names
    key, caption = (next((name for name in few if name in names), None) for few in (_KEY_COLUMNS, _CAPTION_COLUMNS))
    if key is None or (caption is None and shard.text is not None):
        raise DataError(
            f"{shard.metadata}: no column key, uid or image_path, or no caption or text, among {', '.join(names)}.",
            fix="Keys join embeddings to pairs; add the column, or leave the metadata out.",
        )
    return _Columns(key, caption, tuple(name for name in names if name not in (*COLUMNS, key, caption)))


def _metadata_file(shard: LayoutShard, out: Path, number: int) -> StoreFile:
    """The metadata where it is; without any, keys made of the file's name and the row's number in it."""
    if shard.metadata is not None:
        return record_file(out, str(shard.metadata))
    rows = pc.cast(pa.array(np.arange(shard.image.rows)), pa.large_string())
    stem, slash = (pa.scalar(text, pa.large_string()) for text in (shard.name, "/"))
    name = f"{FOLDERS['metadata']}/{FOLDERS['metadata']}_{number:04d}.parquet"
    (out / name).parent.mkdir(exist_ok=True)
    write_table(out / name, pa.table({"key": pc.call_function("binary_join_element_wise", [stem, rows, slash])}))
    return record_file(out, name)


def _array_file(vectors: Vectors, out: Path, name: str, dtype: np.dtype[Any], *, normalize: bool) -> StoreFile:
    """The array where it is, or converted into the store."""
    if not _must_convert(vectors, dtype, normalize=normalize):
        return record_file(out, str(vectors.path))
    path = out / name
    if not (path.is_file() and array_header(path) == ((vectors.rows, vectors.dim), dtype)):
        path.parent.mkdir(exist_ok=True)
        _convert(vectors, path, dtype, normalize=normalize)
    return record_file(out, name)


def _must_convert(vectors: Vectors, dtype: np.dtype[Any], *, normalize: bool) -> bool:
    return normalize or vectors.member is not None or vectors.dtype != dtype


def _convert(vectors: Vectors, path: Path, dtype: np.dtype[Any], *, normalize: bool) -> None:
    shape = (vectors.rows, vectors.dim)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    prepare = _scaled if normalize else _unit
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        first_row = 0
        for block in vectors.blocks():
            handle.write(prepare(block, str(vectors), first_row).astype(dtype).tobytes())
            first_row += len(block)


def _unit(block: Float[np.ndarray, "rows dim"], where: str, first_row: int) -> Float[np.ndarray, "rows dim"]:
    """The rows as they are; each must be of length one."""
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused
        narrow = block if block.dtype.itemsize == 2 else block.astype(np.float32)
    check_unit(narrow, np.ones(len(block), dtype=bool), where=where, first_row=first_row)
    return narrow


def _scaled(block: Float[np.ndarray, "rows dim"], where: str, first_row: int) -> Float[np.ndarray, "rows dim"]:
    """The rows scaled to length one, in float64.

    Raises:
        DataError: A row has no direction: it is all zeros, or not finite.
    """
    wide = block.astype(np.float64)
    peaks = np.abs(wide).max(axis=1)
    undirected = np.flatnonzero(~(np.isfinite(peaks) & (peaks > 0)))
    if len(undirected):
        what = "is all zeros" if peaks[undirected[0]] == 0 else "is not finite"
        raise DataError(
            f"{where}: row {first_row + int(undirected[0]):,} {what} ({len(undirected):,} such rows among"
            f" {len(block):,}).",
            fix="Remove such rows at their source; they have no direction to compare.",
        )
    wide /= peaks[:, None]  # so that no square overflows
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _members(shard: LayoutShard) -> dict[str, str]:
    """The names of the arrays taken from a .npz, for the store's record."""
    members = [vectors.member for vectors in shard.vectors.values() if vectors.member is not None]
    return {"arrays": ", ".join(members)} if members else {}


def _log_plan(layout: Sequence[LayoutShard], out: Path, dtype: np.dtype[Any], *, normalize: bool) -> None:
    """Log what is missing, and which arrays are converted and why."""
    if layout[0].text is None:
        log.info("embed     no text embeddings: balance and cluster need none, the instance loss does")
    if layout[0].metadata is None:
        log.info(f"embed     no metadata: keys are file and row, such as {layout[0].name + '/0'!r}")

    every = [vectors for shard in layout for vectors in shard.vectors.values()]
    converted = [vectors for vectors in every if _must_convert(vectors, dtype, normalize=normalize)]
    if not converted:
        return

    reasons = ["embed.normalize scales them"] if normalize else []
    reasons += ["members of a .npz cannot be read in place"] if any(one.member for one in converted) else []
    kinds = sorted({one.dtype.name for one in converted if one.dtype != dtype})
    reasons += [f"{' and '.join(kinds)} become {dtype}"] if kinds else []
    size = sum(one.rows * one.dim for one in converted) * dtype.itemsize
    log.info(
        f"embed     {len(converted):,} arrays are converted once into {out}, {units.size(size)}: {'; '.join(reasons)}"
    )
