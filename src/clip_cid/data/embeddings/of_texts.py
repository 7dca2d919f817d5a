"""The teacher's embeddings of texts without images.

texts.parquet  text, each once
texts.npy      (texts, dim) unit embeddings in float16, in the same order
texts.json     the teacher; written last
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float16

from clip_cid import log
from clip_cid.data.embeddings.files import check_unit, read_texts, write_table
from clip_cid.data.npy_files import new_npy, read_array_of_stage
from clip_cid.devices import one_ahead
from clip_cid.errors import DataError
from clip_cid.file_digests import digest
from clip_cid.run_folder import WORK, read_json, write_json

_TEXTS, _VECTORS, _INFO, _DONE = "texts.parquet", "texts.npy", "texts.json", "done.json"
_BLOCK = 8_192  # texts between two notes of how far the work is


@runtime_checkable
class TextEncoder(Protocol):
    """Gives unit embeddings of texts, such as `models.teacher.Teacher`."""

    @property
    def dim(self) -> int: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def device(self) -> torch.device: ...

    def begin_texts(self, captions: list[str]) -> Callable[[], Float16[np.ndarray, "texts dim"]]: ...

    def count_truncated(self, captions: list[str]) -> int: ...


@dataclasses.dataclass(frozen=True)
class EmbeddedTexts:
    """Texts, and the teacher's embedding of each."""

    texts: pa.LargeStringArray
    embeddings: Float[np.ndarray, "texts dim"]
    """Mapped from the file."""
    teacher: dict[str, Any]
    """As `Teacher.identity`."""

    def __len__(self) -> int:
        return len(self.texts)


def embed_texts(out: Path, texts: pa.LargeStringArray, encoder: TextEncoder, *, batch: int) -> int:
    """Embed each text, or those that a killed attempt in `out` has left; returns how many the encoder cuts short.

    Args:
        out: The folder, with the work of an attempt at the same texts or without any.
        texts: At least one.
        encoder: The teacher.
        batch: Texts in the encoder at once.

    Raises:
        DataError: An embedding is not finite.
    """
    write_table(out / _TEXTS, pa.table({"text": texts}))

    # A killed attempt has filled the first rows.
    work, shape = out / WORK, (len(texts), encoder.dim)
    work.mkdir(exist_ok=True)
    key = digest(json.loads(json.dumps(encoder.identity)))
    done, truncated = _done(work, key) if (out / _VECTORS).is_file() else (0, 0)
    if not done:
        new_npy(out / _VECTORS, np.float16, shape)
    vectors = cast(np.memmap, np.load(out / _VECTORS, mmap_mode="r+"))

    with log.progress("texts", len(texts), unit="texts", start=done) as bar:
        for start in range(done, len(texts), _BLOCK):
            block: list[str] = texts.slice(start, _BLOCK).to_pylist()
            batches = (block[at : at + batch] for at in range(0, len(block), batch))
            filled = start
            for begun in one_ahead(batches, encoder.begin_texts, encoder.device):
                rows = begun()
                check_unit(rows, np.ones(len(rows), dtype=bool), where="the teacher's texts", first_row=filled)
                vectors[filled : filled + len(rows)] = rows
                filled += len(rows)
            truncated += encoder.count_truncated(block)
            vectors.flush()  # only what is on the disk counts as done
            write_json(work / _DONE, {"key": key, "texts": start + len(block), "truncated": truncated})
            bar.advance(len(block))

    write_json(out / _INFO, {"teacher": encoder.identity})
    return truncated


def _done(work: Path, key: str) -> tuple[int, int]:
    state = read_json(work / _DONE) if (work / _DONE).is_file() else {}
    return (state["texts"], state["truncated"]) if state.get("key") == key else (0, 0)


def open_texts(path: Path) -> EmbeddedTexts:
    """The texts that the stage has left in its folder.

    Raises:
        DataError: A file is missing, damaged, or of other texts.
        RunError: The record of the teacher cannot be read.
    """
    texts = read_texts(path / _TEXTS, "text")
    embeddings = read_array_of_stage(path / _VECTORS, mmap_mode="r")
    if embeddings.ndim != 2 or len(embeddings) != len(texts) or embeddings.dtype != np.float16:
        raise DataError(
            f"{path}: {len(texts):,} texts, but {embeddings.dtype} embeddings of shape {embeddings.shape}.",
            fix=f"Make them again: `clip-cid texts {path.parent} --force`.",
        )
    return EmbeddedTexts(texts, embeddings, read_json(path / _INFO)["teacher"])
