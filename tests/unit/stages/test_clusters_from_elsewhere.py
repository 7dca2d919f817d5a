"""Clusters that were made elsewhere: checked, and read in any byte and storage order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_cid.errors import DataError
from clip_cid.stages.cluster import read_clusters

DIM, KEPT = 4, 5
CENTERS, LABELS = np.eye(DIM)[:3], np.array([0, 2, 1, 0, 2])


def write(folder: Path, centers: Any, labels: Any) -> Path:
    np.save(folder / "centers.npy", centers, allow_pickle=True)
    np.save(folder / "labels.npy", labels, allow_pickle=True)
    return folder


@pytest.mark.parametrize("centers", [CENTERS.astype(np.float16), CENTERS.astype(">f4"), np.asfortranarray(CENTERS)])
@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1"])
def test_the_numbers_count_not_how_they_are_stored(tmp_path: Path, centers: np.ndarray, dtype: str) -> None:
    read_centers, read_labels = read_clusters(write(tmp_path, centers, LABELS.astype(dtype)), dim=DIM, kept=KEPT)
    assert np.array_equal(read_centers, CENTERS)
    assert np.array_equal(read_labels, LABELS)
    assert read_centers.flags["C_CONTIGUOUS"]
    assert (read_centers.dtype, read_labels.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(
    ("centers", "labels", "problem"),
    [
        (CENTERS[:, :3], LABELS, "centers are float64 of shape"),
        (CENTERS[0], LABELS, "centers are float64 of shape"),
        (CENTERS.astype(int), LABELS, "centers are int64"),
        (CENTERS.astype(complex), LABELS, "centers are complex128"),
        (CENTERS.astype(str), LABELS, "centers are <U"),
        (np.array([object()]), LABELS, "cannot read centers.npy"),
        (CENTERS * 2, LABELS, "center 0 is not a unit vector"),
        (np.where(np.eye(DIM)[:3] == 1, np.nan, 0), LABELS, "center 0 is not a unit vector"),
        (CENTERS[:0], LABELS, "labels outside the 0 centers"),
        (CENTERS, LABELS[:4], "4 labels for 5 kept images"),
        (CENTERS, LABELS[:, None], "5 labels for 5 kept images"),
        (CENTERS, LABELS.astype(float), "labels outside the 3 centers"),
        (CENTERS, LABELS + 1, "labels outside the 3 centers"),
        (CENTERS, LABELS - 1, "labels outside the 3 centers"),
        (CENTERS, np.array([None] * 5), "cannot read centers.npy and labels.npy"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, centers: Any, labels: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_clusters(write(tmp_path, centers, labels), dim=DIM, kept=KEPT)


@pytest.mark.parametrize("name", ["centers.npy", "labels.npy"])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    whole = (write(tmp_path, CENTERS, LABELS) / name).read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], whole.replace(b"'descr'", b"(((((((", 1)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read centers\.npy and labels\.npy"):
            read_clusters(tmp_path, dim=DIM, kept=KEPT)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"cannot read centers.npy and labels.npy .*{name}"):
        read_clusters(tmp_path, dim=DIM, kept=KEPT)
