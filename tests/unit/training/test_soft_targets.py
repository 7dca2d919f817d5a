from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest

from clip_cid.errors import DataError
from clip_cid.method.distill import fused_cluster_loss
from clip_cid.method.distill.cluster_distillation import nearest_labels
from clip_cid.training import soft_targets as module
from clip_cid.training.ranks import parts
from clip_cid.training.ranks.distributed import ALONE
from clip_cid.training.soft_targets import several_labels, soft_targets

ROWS, DIM, CENTERS = 23, 6, 9


def unit_rows(count: int, seed: int) -> np.ndarray:
    return oracles.unit(np.random.default_rng(seed).normal(size=(count, DIM))).astype(np.float32)


def stored() -> np.ndarray:
    return unit_rows(40, 0).astype(np.float16)


def targets(folder: Path, images: np.ndarray | None = None, key: str = "one") -> Any:
    images = stored() if images is None else images
    rows = np.arange(ROWS)[::-1] + 5
    how: dict[str, Any] = {"scale": 16.0, "temperature": 2.0, "key": key, "ranks": ALONE}
    return soft_targets(folder, images, rows, unit_rows(CENTERS, 1), **how)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK_ROWS", 5)


def test_they_are_the_teachers_mean_center_and_entropy_row_by_row(tmp_path: Path):
    found = targets(tmp_path / "soft")
    rows, centers = oracles.unit(stored()[np.arange(ROWS)[::-1] + 5]), unit_rows(CENTERS, 1).astype(np.float64)
    log_p = oracles.log_softmax(8 * rows @ centers.T)
    np.testing.assert_allclose(found.mean[:], np.exp(log_p) @ centers, atol=1e-6)
    np.testing.assert_allclose(found.entropy[:][:, 0], -(np.exp(log_p) * log_p).sum(axis=1), atol=1e-5)
    assert (found.mean.dtype, found.entropy.dtype) == (np.float32, np.float64)


@pytest.mark.resume
def test_a_killed_attempt_goes_on_where_it_was_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = targets(tmp_path / "whole")
    calls = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fused_cluster_loss.soft_centers(*arguments, **named)

    monkeypatch.setattr(module, "soft_centers", counted)
    with pytest.raises(KeyboardInterrupt):
        targets(tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut").glob("mean*")) == ["mean-0000.npy", "mean-0001.npy"]
    found = targets(tmp_path / "cut")
    assert calls == [5, 5, 5, 5, 5, 3]  # the third was done again, the first two were not
    np.testing.assert_array_equal(found.mean[:], whole.mean[:])
    np.testing.assert_array_equal(found.entropy[:], whole.entropy[:])


def test_what_another_recipe_left_is_not_taken_up(tmp_path: Path):
    targets(tmp_path / "soft")
    for part in (tmp_path / "soft").glob("mean-*.npy"):
        np.load(part, mmap_mode="r+")[:] = 7
    assert (targets(tmp_path / "soft").mean[:] == 7).all()
    assert (np.abs(targets(tmp_path / "soft", key="other").mean[:]) <= 1).all()


@pytest.mark.resume
def test_killed_labels_go_on_where_they_were_and_belong_to_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def labels(folder: Path, rows: np.ndarray, key: str = "one") -> np.ndarray:
        own = np.arange(len(rows)) % CENTERS
        how: dict[str, Any] = {"count": 4, "key": key, "ranks": ALONE}
        return several_labels(folder, stored(), rows, own, unit_rows(CENTERS, 1), **how)[:]

    rows, calls = np.arange(ROWS)[::-1] + 5, []
    whole = labels(tmp_path / "whole", rows)
    cosines = oracles.unit(stored()[rows]) @ unit_rows(CENTERS, 1).astype(np.float64).T
    for own, found, of_row in zip(np.arange(ROWS) % CENTERS, whole, cosines, strict=True):
        assert found.tolist() == [own, *[center for center in np.argsort(-of_row) if center != own][:3]]

    def cut(*arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return nearest_labels(*arguments)

    monkeypatch.setattr(module, "nearest_labels", cut)
    with pytest.raises(KeyboardInterrupt):
        labels(tmp_path / "cut", rows)
    np.testing.assert_array_equal(labels(tmp_path / "cut", rows), whole)
    assert calls == [5, 5, 5, 5, 5, 3]
    np.testing.assert_array_equal(labels(tmp_path / "cut", rows), whole)
    assert len(calls) == 6
    labels(tmp_path / "cut", rows[:-1])  # other rows are labelled anew, even with the same key
    assert len(calls) == 11


def test_a_damaged_teacher_vector_is_named(tmp_path: Path):
    images = stored()
    images[12] = 0
    with pytest.raises(DataError, match="The teacher's image embedding of row 12 has length 0"):
        targets(tmp_path / "soft", images)
