"""Every value of a manifest replaced by others, and bytes of its files: an error of ours, or a store that is read."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid.data.embeddings.files import read_info
from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import ClipCidError, DataError

OTHERS: list[Any] = [None, True, -1, 0, 3.5, "", "foo", [], {}, [1], {"a": 1}, 10**30, "float32"]
KEYS = list("abcdef")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.eye(6, dtype=np.float16))
    pq.write_table(pa.table({"key": KEYS, "caption": KEYS}), tmp_path / "x.parquet")
    import_existing(tmp_path / "x.npy", tmp_path / "store")
    return tmp_path / "store"


def read_all(path: Path) -> EmbeddingStore:
    store = EmbeddingStore.open(path)
    store.check_values()
    assert len(store.keys) == len(store.ok) == len(store.num_captions) == store.rows
    assert store.images[:].shape == (store.rows, store.dim)
    return store


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*place, key))


def changed(manifest: Any, place: tuple[Any, ...], other: Any) -> Any:
    manifest = json.loads(json.dumps(manifest))
    if not place:
        return other
    parent = manifest
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = other
    return manifest


def test_any_value_of_the_manifest_may_be_another(store: Path) -> None:
    manifest = json.loads((store / "store.json").read_text())
    for place in places(manifest):
        for other in OTHERS:
            (store / "store.json").write_text(json.dumps(changed(manifest, place, other)))
            with contextlib.suppress(ClipCidError):
                assert read_all(store).rows == len(KEYS)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"null"])
def test_what_is_no_manifest_is_named(store: Path, content: bytes) -> None:
    (store / "store.json").write_bytes(content)
    with pytest.raises(DataError, match=r"store\.json: not a manifest of this version"):
        read_info(store)


@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "store/store.json"])
def test_any_byte_may_be_another(store: Path, name: str) -> None:
    path, chance = store.parent / name, random.Random(0)
    whole = path.read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 3])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        with contextlib.suppress(ClipCidError):
            read_all(store)
        with contextlib.suppress(ClipCidError):
            import_existing(store.parent / "x.npy", store.parent / "again")
