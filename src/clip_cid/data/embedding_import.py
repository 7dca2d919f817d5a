"""Taking over embeddings made elsewhere: a manifest is written here, the arrays stay where they are."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from clip_cid import log
from clip_cid.data.embedding_files import (
    COLUMNS,
    FOLDERS,
    PROGRESS_FILE,
    SKIPPED_FILE,
    STORE_FILE,
    StoreInfo,
    StoreShard,
    array_header,
    record_file,
    table_rows,
    write_info,
)
from clip_cid.data.embeddings import EmbeddingStore
from clip_cid.errors import DataError

_FIX = "It needs img_emb/img_emb_*.npy, text_emb/text_emb_*.npy and metadata/metadata_*.parquet with equal numbers."
_KINDS = ("image", "text", "metadata")


def import_existing(source: Path, out: Path) -> None:
    """Make `out` a store that refers to `source`: a store of ours, or a folder as clip-retrieval writes it.

    Every array is read once: lengths, values, and a digest of each file.

    Raises:
        DataError: It is neither, a part is missing or cut short, widths differ, keys repeat, or a row is not of length 1.
    """
    source = source.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (source / STORE_FILE).is_file() or (source / PROGRESS_FILE).is_file():
        info = EmbeddingStore.open(source).info
        info = dataclasses.replace(info, root=info.root or str(source))
        if (source / SKIPPED_FILE).is_file():
            shutil.copyfile(source / SKIPPED_FILE, out / SKIPPED_FILE)
    else:
        info = _clip_retrieval(source)
        (out / SKIPPED_FILE).write_text("", encoding="utf-8")
    write_info(out, info)
    store = EmbeddingStore.open(out)
    if not len(store.keys):
        raise DataError(f"{source}: no embeddings there.", fix=_FIX)
    with log.progress("check", store.rows, unit="rows") as bar:
        store.check_values(bar.advance)


def _clip_retrieval(source: Path) -> StoreInfo:
    parts = {kind: _numbered(source, kind) for kind in _KINDS}
    numbers = sorted(parts["image"])
    if not numbers:
        raise DataError(f"{source}: neither an embedding store nor a clip-retrieval folder.", fix=_FIX)
    for kind in _KINDS:
        if lone := sorted(set(numbers) ^ set(parts[kind])):
            raise DataError(f"{source}: shard {lone[0]} has no {FOLDERS[kind]} or no img_emb file.", fix=_FIX)
    shape, dtype = array_header(source / parts["image"][numbers[0]])
    if len(shape) != 2 or dtype not in (np.float16, np.float32):
        raise DataError(
            f"{source / parts['image'][numbers[0]]}: {shape} {dtype}, not rows of float16 or float32.", fix=_FIX
        )
    columns = _columns(source / parts["metadata"][numbers[0]])
    key_column = next((name for name in ("key", "image_path") if name in columns), None)
    if key_column is None or "caption" not in columns:
        raise DataError(
            f"{source / parts['metadata'][numbers[0]]}: no column key or image_path, or no caption, among "
            f"{', '.join(columns)}.",
            fix="Keys join embeddings to pairs; add the column.",
        )
    shards: list[StoreShard] = []
    with log.progress("digest", len(numbers), unit="shards") as bar:
        for number in numbers:
            files = {kind: record_file(source, parts[kind][number]) for kind in _KINDS}
            rows = table_rows(source / parts["metadata"][number])
            shards.append(StoreShard(name=f"{number:04d}", rows=rows, ok=rows, more=0, files=files))
            bar.advance(1)
    return StoreInfo(
        teacher={"reference": f"unknown (taken over from {source})"},
        pairs=None,
        dim=shape[1],
        dtype=dtype.name,
        fields=tuple(name for name in columns if name not in (*COLUMNS, key_column)),
        key_column=key_column,
        captions_column="caption",
        root=str(source),
        shards=tuple(shards),
    )


def _numbered(source: Path, kind: str) -> dict[int, str]:
    """Shard number -> path; clip-retrieval pads its numbers as the count of shards needs."""
    folder = FOLDERS[kind]
    pattern = re.compile(rf"{folder}_(\d+)\.{'parquet' if kind == 'metadata' else 'npy'}")
    found: dict[int, str] = {}
    for path in sorted((source / folder).glob("*")):
        if match := pattern.fullmatch(path.name):
            number = int(match[1])
            if number in found:
                raise DataError(f"{source}: both {found[number]} and {path.name} are shard {number}.", fix=_FIX)
            found[number] = f"{folder}/{path.name}"
    return found


def _columns(path: Path) -> list[str]:
    table_rows(path)  # whole, and Parquet
    return pq.read_schema(path).names
