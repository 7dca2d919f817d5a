from typing import Any
from unittest import mock

import numpy as np
import oracles
import pytest
import torch
from host_waits import HostWaits

from clip_cid.devices import one_ahead
from clip_cid.method.cluster import nearest_centers
from clip_cid.method.cluster.nearest_centers import CenterSearch
from clip_cid.method.unit_rows import UnitRows

KINDS = ("int8", "float32", "float16")


def search_of(centers: np.ndarray, kind: str | None = None) -> CenterSearch:
    """With codes of this kind, whatever is the fastest here."""
    unit_centers = UnitRows(centers, name="centers", any_length=True)
    if kind is None:
        return CenterSearch(unit_centers)
    with mock.patch.object(nearest_centers, "_fastest", return_value=kind):
        return CenterSearch(unit_centers)


def searched(rows: np.ndarray, centers: np.ndarray, kind: str | None = None) -> list[int]:
    images = UnitRows(rows, name="embeddings", any_length=True)
    return search_of(centers, kind).nearest(images, slice(0, len(images)))[0].tolist()


def hard_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows and centers whose order is easily lost: near ties, exact ties, a few large columns, one direction."""
    rng = np.random.default_rng(0)
    rows, centers = rng.standard_normal((70, 40)), rng.standard_normal((37, 40))
    wild = np.ones(40)
    wild[:2] = 40
    narrow = np.ones(40) + 1e-3 * rng.standard_normal((70, 40))
    away = rng.standard_normal((70, 40))
    return {
        "random": (rows, centers),
        "large columns": (rows * wild, centers * wild),
        "one direction": (narrow, narrow[::2] + 1e-4 * centers[:35]),
        "near ties": (rows, np.concatenate([rows + 0.1 * away, rows + 0.1 * (1 - 1e-6) * away])),
        "copies": (rows, np.repeat(centers[:9], 5, axis=0)),
        "all equal": (rows, np.repeat(centers[:1], 12, axis=0)),
        "one center": (rows, centers[:1]),
        "rows are centers": (rows, rows[::-1]),
        "tiny and huge": (rows * 10.0 ** rng.integers(-30, 30, (70, 1)), centers),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", hard_cases())
def test_the_label_is_the_nearest_center_in_float64_whatever_the_codes(case, kind):
    rows, centers = hard_cases()[case]
    assert searched(rows, centers, kind=kind) == oracles.nearest(rows, centers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 8, 11])
def test_blocks_of_centers_change_nothing(kind, block, monkeypatch):
    monkeypatch.setattr(nearest_centers, "_CPU_BLOCK", (1024, block))
    for rows, centers in hard_cases().values():
        assert searched(rows, centers, kind=kind) == oracles.nearest(rows, centers)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stored_rows_of_any_type_and_length_count_by_direction(dtype):
    rng = np.random.default_rng(1)
    rows, centers = rng.standard_normal((50, 24)).astype(dtype), rng.standard_normal((200, 24))
    assert searched(rows, centers) == oracles.nearest(rows, centers)
    assert searched((rows * 900).astype(dtype), centers) == oracles.nearest((rows * 900).astype(dtype), centers)


def test_without_the_margin_the_codes_alone_are_wrong():
    """The check is needed: what the products of codes say is not the order of the cosines."""
    rng = np.random.default_rng(2)
    rows, centers = oracles.unit(rng.standard_normal((3000, 64))), oracles.unit(rng.standard_normal((300, 64)))
    images = UnitRows(rows, name="rows", any_length=True)
    true, careless = search_of(centers, "int8"), search_of(centers, "int8")
    careless._error = careless._length = careless._product_error = 0.0
    expected = (rows @ centers.T).argmax(axis=1).tolist()
    assert true.nearest(images, slice(0, 3000))[0].tolist() == expected
    assert careless.nearest(images, slice(0, 3000))[0].tolist() != expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_center_that_may_be_the_nearest_is_on_the_shortlist(kind):
    """The bound itself: no center within its reach of the best is passed over."""
    rng = np.random.default_rng(3)
    rows, centers = oracles.unit(rng.standard_normal((200, 32))), oracles.unit(rng.standard_normal((150, 32)))
    search = search_of(centers, kind)
    found = set(zip(*(part.tolist() for part in search._shortlist(rows.astype(np.float32))()), strict=True))
    cosines = rows @ centers.T
    assert {(row, int(cosines[row].argmax())) for row in range(200)} <= found
    assert len(found) < 200 * 150 / 10


def test_many_centers_are_coded_in_int8_and_few_are_not():
    rows = np.random.default_rng(4).standard_normal((120, 8))
    kinds = [search_of(rows[:count])._kind for count in (5, 120)]
    assert kinds[0] == "float32"
    assert kinds[1] in ("int8", "float32")  # where int8 products are wrong or absent, float32 stays


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
def test_no_pair_that_reaches_its_floor_is_lost(dtype, width):
    rng = np.random.default_rng(5)
    scores = torch.from_numpy(rng.integers(-9, 9, (13, width))).to(dtype)
    floor = rng.integers(-9, 9, 13) - 0.5
    expected = np.argwhere(scores.numpy() >= floor[:, None])
    limit = nearest_centers._floor_as(dtype, floor)
    rows, columns, values = nearest_centers._at_least(scores.numpy(), limit)
    np.testing.assert_array_equal(np.stack([rows, columns], axis=1), expected)
    np.testing.assert_array_equal(values, scores.numpy()[rows, columns])
    np.testing.assert_array_equal(np.stack(nearest_centers._at_least_there(scores, limit), axis=1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_floor_is_never_rounded_up(dtype):
    floor = np.random.default_rng(6).uniform(-1.1, 1.1, 1000)
    assert (nearest_centers._floor_as(dtype, floor).astype(np.float64) <= floor).all()


@pytest.mark.parametrize("case", hard_cases())
def test_the_way_of_a_device_finds_the_same(case, monkeypatch):
    """Codes, products and comparisons as on CUDA, with tensors of the CPU."""
    as_on_a_device(monkeypatch, center_block=16)
    rows, centers = hard_cases()[case]
    assert searched(rows, centers, kind="float16") == oracles.nearest(rows, centers)


def one_ahead_on_the_processor(items: Any, begin: Any, device: torch.device) -> Any:
    return one_ahead(items, begin, torch.device("meta"))


def as_on_a_device(monkeypatch: pytest.MonkeyPatch, *, center_block: int) -> None:
    monkeypatch.setattr(nearest_centers, "is_at_hand", lambda tensor: False)
    monkeypatch.setattr(nearest_centers, "one_ahead", one_ahead_on_the_processor)
    monkeypatch.setattr(nearest_centers, "_CPU_BLOCK", (9, center_block))


@pytest.mark.parametrize("kept", [1, 2, 500])
def test_a_row_with_more_near_centers_than_a_device_keeps_is_compared_once_more(kept, monkeypatch):
    as_on_a_device(monkeypatch, center_block=16)
    monkeypatch.setattr(nearest_centers, "_KEPT", kept)
    for rows, centers in hard_cases().values():
        assert searched(rows, centers, kind="float16") == oracles.nearest(rows, centers)


@pytest.mark.parametrize("center_block", [7, 1000])
def test_a_device_is_waited_for_once_a_block_of_rows_whatever_the_blocks_of_centers(center_block, monkeypatch):
    """For the largest products of a row and their centers, both at once there when the first is."""
    as_on_a_device(monkeypatch, center_block=center_block)
    rows, centers = hard_cases()["random"]
    search, images = search_of(centers, "float16"), UnitRows(rows, name="rows", any_length=True)
    with HostWaits("cpu", "numpy") as waits:
        blocks = len(list(search.over(images)))
    assert blocks == 8  # of nine rows
    assert waits.counts["cpu"] == 2 * blocks


def wild(rows: int, dim: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    """Rows of which one column is 50 times the others, or is far from zero."""
    found = np.random.default_rng(seed).standard_normal((rows, dim))
    found[:, 3] = found[:, 3] * (1 if shift else 50) + shift
    return found


@pytest.mark.parametrize("shift", [0.0, 90.0])
@pytest.mark.parametrize("dim", [97, 128])
def test_large_columns_are_spread_before_they_are_coded(shift, dim):
    rows, centers = wild(60, dim, seed=7, shift=shift), wild(130, dim, seed=8, shift=shift)
    assert searched(rows, centers, kind="int8") == oracles.nearest(rows, centers)
    search = search_of(centers, "int8")
    assert search._rotation is not None
    even = np.random.default_rng(9).standard_normal((130, dim))
    assert search_of(even, "int8")._rotation is None


@pytest.mark.parametrize("dim", [1, 2, 7, 48, 640])
def test_a_rotation_keeps_products_up_to_its_error(dim):
    rng = np.random.default_rng(10)
    rows = oracles.unit(rng.standard_normal((50, dim)) * rng.choice([1, 100], dim)).astype(np.float32)
    rotation = nearest_centers._Rotation(dim)
    rotated = rotation(torch.from_numpy(rows)).numpy().astype(np.float64)
    exact = rows.astype(np.float64)
    assert np.abs(rotated @ rotated.T - exact @ exact.T).max() <= 3 * rotation.error < 3e-3
