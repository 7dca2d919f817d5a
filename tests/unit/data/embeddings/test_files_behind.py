"""What an input of embeddings stands for: the files whose change is a change of the input."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid.data.embeddings.files_behind import files_behind
from clip_cid.data.embeddings.importing import import_existing


def save_unit_rows(path: Path, rows: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.eye(4, dtype=np.float16)[:rows])
    return path


def test_a_folder_stands_for_its_files_also_below_linked_folders(tmp_path: Path) -> None:
    near, far = save_unit_rows(tmp_path / "in" / "a.npy"), save_unit_rows(tmp_path / "far" / "deep" / "b.npy")
    (tmp_path / "in" / ".cache").mkdir()
    (tmp_path / "in" / ".cache" / "x.npy").write_bytes(b"")
    (tmp_path / "in" / ".DS_Store").write_bytes(b"")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "one.npy").symlink_to(far)
    (tmp_path / "in" / "gone.npy").symlink_to(tmp_path / "nowhere")
    expected = [near, tmp_path / "in" / "linked" / "deep" / "b.npy", tmp_path / "in" / "one.npy"]
    assert files_behind(tmp_path / "in") == expected

    (tmp_path / "to_in").symlink_to(tmp_path / "in")
    assert files_behind(tmp_path / "to_in") == [
        tmp_path / "to_in" / path.relative_to(tmp_path / "in") for path in expected
    ]


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    file = save_unit_rows(tmp_path / "in" / "sub" / "a.npy")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in" / "self")
    assert files_behind(tmp_path / "in") == [file]


def test_a_file_of_rows_stands_for_its_metadata_too(tmp_path: Path) -> None:
    file = save_unit_rows(tmp_path / "a.npy")
    save_unit_rows(tmp_path / "b.npy")
    assert files_behind(file) == [file]
    pq.write_table(pa.table({"key": ["x", "y", "z"]}), tmp_path / "a.parquet")
    assert files_behind(file) == [file, tmp_path / "a.parquet"]
    assert files_behind(tmp_path / "a.parquet") == [tmp_path / "a.parquet"]
    assert files_behind(tmp_path / "nothing") == []


def test_a_store_stands_for_its_manifest_and_the_files_it_names(tmp_path: Path) -> None:
    """A store of taken-over embeddings, and a second that refers to it: both name the array elsewhere."""
    array = save_unit_rows(tmp_path / "in" / "a.npy")
    first, second = tmp_path / "first", tmp_path / "second"
    import_existing(array, first)
    import_existing(first, second)
    (first / "manifest.json").write_text("of the run, not of the store")

    keys = first / "metadata" / "metadata_0000.parquet"
    assert files_behind(first) == sorted([array, keys, first / "store.json"])
    assert files_behind(second) == sorted([array, keys, second / "store.json"])

    array.unlink()
    assert files_behind(second) == sorted([keys, second / "store.json"])


@pytest.mark.parametrize("manifest", ["", "[]", "null", '{"root": null, "shards": [3]}', '{"root": 3}'])
def test_of_a_damaged_store_the_manifest_counts(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "store.json").write_text(manifest)
    assert files_behind(tmp_path) == [tmp_path / "store.json"]


def test_the_question_is_answered_without_heavy_imports() -> None:
    """`clip-cid status` asks it."""
    code = (
        "import sys, clip_cid.data.embeddings.files_behind; assert not {'numpy', 'pyarrow', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
