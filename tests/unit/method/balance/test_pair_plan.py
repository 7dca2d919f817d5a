import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hard_rows import KINDS, squared_matrix, unit

from clip_cid.method import products
from clip_cid.method.balance import plan_choice
from clip_cid.method.balance.cell_windows import Windows
from clip_cid.method.balance.near_pairs import near_forest
from clip_cid.method.balance.pair_plan import Estimate, Layout, Plan, lay_out
from clip_cid.method.balance.plan_choice import make_plan
from clip_cid.method.codes import Coding
from clip_cid.method.products import int8_product, int8_products_are_right
from clip_cid.method.unit_rows import UnitRows


def images_of(rows: np.ndarray) -> UnitRows:
    return UnitRows(rows, name="rows", any_length=True)


def on_a_circle(rows: int, dim: int) -> np.ndarray:
    """In a random plane: no cell has a middle, and pairs lie square across the planes between cells."""
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, rows)
    plane = np.linalg.qr(np.random.default_rng(1).standard_normal((dim, 2)))[0].T
    return unit(np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane)


ROWS = {**KINDS, "circle": on_a_circle}


def missed(layout: Layout, images: UnitRows, squared: np.ndarray, limit: float, *, seen_as: float) -> int:
    """How many pairs within `limit` the windows for pairs within `seen_as` would not compare."""
    assert layout.centers is not None
    home, visits = Windows(layout.centers, seen_as, layout.error)(
        layout.projected(images.float32(slice(0, len(images))))
    )
    near = squared <= limit
    compared = visits[:, home] | visits[:, home].T | (home[:, None] == home)
    assert visits[np.arange(len(home)), home].all()
    return int((near & ~compared).sum())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("width", "cells"), [(None, 1), (None, 12), (8, 12), (32, 40), (64, 400)])
def test_of_two_near_rows_one_visits_the_cell_of_the_other(kind, width, cells):
    rows = ROWS[kind](300, 64)
    squared, images = squared_matrix(rows), images_of(rows)
    layout = lay_out(images, Plan("float32", width, cells))
    for limit in (0.0049, 0.07, 0.14, 0.48, 1.5):
        assert missed(layout, images, squared, limit, seen_as=limit) == 0


@pytest.mark.parametrize("kind", ROWS)
def test_windows_need_no_good_centers(kind):
    rows = ROWS[kind](300, 64)
    images, rng = images_of(rows), np.random.default_rng(5)
    centers = np.concatenate([rng.standard_normal((9, 64)), 3 * rows[:5], 1e-3 * rows[:5], rows[:2], rows[:2]])
    layout = Layout(Plan(cells=len(centers)), Coding("float32", 64), centers=centers.astype(np.float32))
    for limit in (0.0049, 0.14, 0.48):
        assert missed(layout, images, squared_matrix(rows), limit, seen_as=limit) == 0


def test_narrower_windows_would_miss_pairs():
    rows = on_a_circle(1000, 64)
    squared, images = squared_matrix(rows), images_of(rows)
    layout = lay_out(images, Plan("float32", None, 12))
    assert missed(layout, images, squared, 0.14, seen_as=0.14) == 0
    assert missed(layout, images, squared, 0.14, seen_as=0.8 * 0.14) > 10


def test_windows_are_worth_having():
    rows = KINDS["flat"](1000, 64)
    images = images_of(np.repeat(rows[:50], 20, axis=0) + 1e-3 * rows)
    layout = lay_out(images, Plan("float32", 32, 40))
    assert layout.centers is not None
    _, visits = Windows(layout.centers, 0.14, layout.error)(layout.projected(images.float32(slice(0, 1000))))
    assert visits.sum(axis=1).mean() < 4  # cells of 40


def test_few_rows_are_compared_without_ado():
    layout = make_plan(images_of(KINDS["flat"](2048, 16)), 0.14)
    assert replace(layout.plan, chunk_rows=7) == Plan("float32", None, 0, 7, "cpu")
    assert layout.plan.chunk_rows >= 2048  # one task
    assert (layout.sketch, layout.centers, layout.estimate) == (None, None, None)
    assert layout.coding.width == 16


def test_a_device_gets_whole_rows_in_float16():
    layout = make_plan(images_of(KINDS["flat"](2100, 16)), 0.14, device="cuda")
    assert replace(layout.plan, chunk_rows=7) == Plan("float16", None, 0, 7, "cuda")
    assert (layout.sketch, layout.centers) == (None, None)


@pytest.mark.slow
def test_a_plan_for_many_rows_finds_what_the_plain_one_finds(monkeypatch):
    monkeypatch.setattr(plan_choice, "_SMALL_WORK", 0)
    rng = np.random.default_rng(0)
    centers = unit(rng.standard_normal((2500, 32)))
    spread = 10.0 ** rng.uniform(-2, -0.7, (25_000, 1))
    images = images_of(unit(np.repeat(centers, 10, axis=0) + spread * rng.standard_normal((25_000, 32))).astype("f4"))
    chosen = make_plan(images, 0.14)
    assert chosen.estimate is not None
    assert chosen.estimate.pairs <= 25_000**2
    assert chosen.estimate.candidates < chosen.estimate.pairs
    assert (chosen.plan.width is None) == (chosen.sketch is None) or chosen.plan.kind == "int8"
    assert (chosen.plan.cells > 0) == (chosen.centers is not None)
    celled = lay_out(images, Plan("float32", 16, 256, 8192))
    plain, _ = near_forest(images, 0.14, layout=lay_out(images, Plan("float32")))
    assert 5_000 < len(plain.squared) < 24_000
    for layout in (chosen, celled):
        found, _ = near_forest(images, 0.14, layout=layout)
        for name in ("left", "right", "squared"):
            assert getattr(found, name).tobytes() == getattr(plain, name).tobytes()


@pytest.mark.parametrize("kind", ["int8", "float32", "float16"])
@pytest.mark.parametrize("width", [None, 1, 8, 64, 200])
def test_a_given_plan_is_laid_out_as_it_says(kind, width):
    images = images_of(KINDS["flat"](100, 64))
    layout = lay_out(images, Plan(kind, width, cells=5))
    assert layout.plan == Plan(kind, width, cells=5)
    assert layout.coding.kind == kind
    assert layout.coding.width == min(width or 64, 64)
    assert layout.centers is not None
    assert layout.centers.shape == (5, min(width or 64, 64))
    assert (layout.sketch is None) == (width is None and kind != "int8")


def test_there_are_no_more_centers_than_rows():
    layout = lay_out(images_of(KINDS["flat"](7, 16)), Plan(cells=50))
    assert layout.centers is not None
    assert layout.centers.shape == (7, 16)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(), "whole rows in float32, all pairs"),
        (Plan("int8", 96), "96-number sketches in int8, all pairs"),
        (Plan("float32", 32, 2048), "32-number sketches in float32, 2,048 cells"),
        (Plan("float16", device="cuda"), "whole rows in float16, all pairs on cuda"),
    ],
)
def test_a_plan_is_told_in_a_line(plan, words):
    assert Layout(plan, Coding("float32", 8)).describe() == words


@pytest.mark.parametrize(
    ("device", "seconds", "time"),
    [
        ("cpu", 0.04, "0.0s of one core"),
        ("cpu", 59, "59.0s of one core"),
        ("cpu", 600, "10m00s of one core"),
        ("cpu", 9000, "2h30m of one core"),
        ("cuda", 12.34, "12.3s of one device"),
    ],
)
def test_an_estimate_is_told_with_its_units(device, seconds, time):
    told = Layout(Plan(device=device), Coding("float32", 8), estimate=Estimate(1.25e9, 3.1e5, seconds)).describe()
    assert re.search(r": about 1\.2e\+09 products and 3\.1e\+05 exact distances, ", told)
    assert told.endswith(time)


def wrapping(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Adds up in 16 bits."""
    return (left.int() @ right.int()).to(torch.int16).int()


def saturating(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Adds two products of unsigned and signed bytes up in 16 bits, as processors without VNNI do."""
    shifted, width = left.int() + 128, left.shape[1] // 2 * 2
    each = shifted[:, :width, None] * right.int()[None, :width, :]
    pairs = each.reshape(len(left), width // 2, 2, right.shape[1]).sum(dim=2).clamp(-(2**15), 2**15 - 1)
    last = shifted[:, width:] @ right.int()[width:, :]
    return (pairs.sum(dim=1) + last - 128 * right.int().sum(dim=0)).int()


def missing(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    raise RuntimeError("not on this machine")


def gone(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    raise AttributeError("module 'torch' has no attribute '_int_mm'")


def right_and_slow(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return left.int() @ right.int()


@pytest.fixture
def cheap_int8(monkeypatch):
    """A machine on which int8 pays for any rows."""
    monkeypatch.setattr(
        plan_choice, "_time_of_product", lambda kind, width: width * (1e-13 if kind == "int8" else 1e-9)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_int8")
@pytest.mark.parametrize("product", [wrapping, saturating, missing, gone])
def test_a_machine_that_cannot_multiply_int8_gets_float32(monkeypatch, product):
    monkeypatch.setattr(products, "int8_product", product)
    assert not int8_products_are_right()
    monkeypatch.setattr(plan_choice, "_SMALL_WORK", 0)
    assert make_plan(images_of(KINDS["rank 8"](2100, 300)), 0.14).plan.kind == "float32"


@pytest.mark.usefixtures("cheap_int8")
def test_a_machine_that_can_gets_int8_where_it_pays(monkeypatch):
    monkeypatch.setattr(products, "int8_product", right_and_slow)
    assert int8_products_are_right()
    monkeypatch.setattr(plan_choice, "_SMALL_WORK", 0)
    assert make_plan(images_of(KINDS["rank 8"](2100, 300)), 0.14).plan.kind == "int8"


def test_int8_products_are_those_of_integers_where_they_are_used():
    if not int8_products_are_right():
        pytest.skip("this machine multiplies no int8, and plans do without")
    rng = np.random.default_rng(0)
    for rows, width, columns in ((1, 1, 1), (3, 7, 5), (17, 64, 33), (40, 129, 2)):
        left, right = (torch.from_numpy(rng.integers(-127, 128, (n, width), dtype=np.int8)) for n in (rows, columns))
        expected = left.numpy().astype(np.int64) @ right.numpy().T.astype(np.int64)
        out = torch.empty((rows, columns), dtype=torch.int32)
        assert int8_product(left, right.T).tolist() == expected.tolist()
        assert int8_product(left, right.T, out=out).tolist() == expected.tolist() == out.tolist()
