"""Files that hold embeddings in a form that is not read, or something else: two lines, with what to do."""

from pathlib import Path

import numpy as np
import pytest

from clip_cid.data.embeddings.layouts import find_embeddings
from clip_cid.errors import DataError


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("all.pt", "torch.load(FILE)"),
        ("all.SAFETENSORS", "safetensors.numpy.load_file(FILE)"),
        ("all.h5", "h5py.File(FILE)"),
        ("all.txt", "np.loadtxt(FILE"),
        ("all.index", "faiss.read_index(FILE)"),
    ],
)
def test_a_file_of_another_type_says_how_it_becomes_an_array(tmp_path: Path, name: str, how: str):
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(DataError, match="not read from files of this type") as error:
        find_embeddings(tmp_path / name)
    assert error.value.fix.startswith("Write them as rows of a .npy first: np.save('image_embeddings.npy', ")
    assert how in error.value.fix


@pytest.mark.parametrize(
    "other", [np.arange(6), np.ones((6, 2, 4), dtype=np.float32), np.ones((6, 4), dtype=np.int64)], ids=str
)
def test_an_array_that_is_no_rows_of_numbers_is_named(tmp_path: Path, other: np.ndarray):
    np.save(tmp_path / "embeddings.npy", np.eye(6, dtype=np.float32))
    np.save(tmp_path / "labels.npy", other)
    with pytest.raises(DataError, match=r"labels\.npy: .* not rows of float16") as error:
        find_embeddings(tmp_path)
    assert "take it out of the folder" in error.value.fix
