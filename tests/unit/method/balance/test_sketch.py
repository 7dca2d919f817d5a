import numpy as np
import pytest
from hard_rows import KINDS, unit

from clip_cid.method import codes as codes_module
from clip_cid.method.balance import sketch as sketch_module
from clip_cid.method.balance.sketch import Sketch, make_sketch, principal_directions
from clip_cid.method.codes import Coding, coding_for
from clip_cid.method.unit_rows import UnitRows

DIM = 100
WIDTHS = [1, 2, 8, 32, 96, DIM]


def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosines in float64, and the rows as the sketch gets them."""
    images = UnitRows(rows, name="rows", any_length=True)
    exact = unit(rows)
    return exact @ exact.T, images.float32(slice(0, len(rows)))


def sketch_of(rows: np.ndarray, width: int) -> Sketch:
    """From the directions of a few rows only: those of the others are not what it was made for."""
    if width == rows.shape[1]:
        return make_sketch(np.eye(width), width)
    return make_sketch(principal_directions(rows[:60], min(96, rows.shape[1])), width)


def products(short: np.ndarray) -> np.ndarray:
    """In float64, of the float32 numbers as they are."""
    return short.astype(np.float64) @ short.astype(np.float64).T


def bound_by(coding: Coding, short: np.ndarray) -> np.ndarray:
    """The largest cosine that two rows may have for all that their codes say."""
    codes, errors = coding.encode(short)
    rows = len(short)
    left, right = np.repeat(errors, rows).astype(np.float64), np.tile(errors, rows).astype(np.float64)
    computed = codes.astype(np.float32) @ codes.astype(np.float32).T  # exact in int8
    added = -coding.floor(0.0, left, right) * coding.unit
    return computed.astype(np.float64) * coding.unit + added.reshape(rows, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_sketch_never_says_less_than_the_cosine(kind, width):
    cosines, rows = read(KINDS[kind](250, DIM))
    sketch = sketch_of(rows, width)
    short = sketch.complete(sketch.project(rows))
    assert short.dtype == np.float32
    assert short.shape == (250, width)
    assert (cosines <= products(short) + sketch.slack).all()


@pytest.mark.parametrize("dim", [3, 257, 700])
def test_the_bound_holds_for_rows_longer_than_one_sum(dim):
    cosines, rows = read(KINDS["outlier dimensions"](80, dim))
    sketch = sketch_of(rows, dim)
    short = sketch.complete(sketch.project(rows))
    assert np.abs(cosines - products(short)).max() <= sketch.slack < 3e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_is_as_near_the_exact_one_as_it_says(kind):
    _, rows = read(KINDS[kind](250, DIM))
    sketch = sketch_of(rows, 32)
    basis = sketch.basis.astype(np.float64)
    exact = unit(KINDS[kind](250, DIM)) @ basis.T
    assert np.linalg.norm(sketch.project(rows) - exact, axis=1).max() <= sketch.error
    np.testing.assert_allclose(basis @ basis.T + np.outer(sketch.rest, sketch.rest), np.eye(32), atol=1e-6)


def test_without_slack_the_sketch_would_hide_pairs(monkeypatch):
    monkeypatch.setattr(sketch_module, "ROUNDING", 0.0)
    monkeypatch.setattr(Sketch, "error", 0.0)
    for kind, width in (("identical", 32), ("rank 8", 96), ("flat", DIM)):
        cosines, rows = read(KINDS[kind](250, DIM))
        sketch = sketch_of(rows, width)
        assert sketch.slack == 0
        lost = cosines > products(sketch.complete(sketch.project(rows)))
        assert lost.sum() > 100


def test_a_sketch_that_forgot_what_is_left_would_hide_pairs():
    cosines, rows = read(KINDS["flat"](250, DIM))
    sketch = sketch_of(rows, 32)
    assert (cosines > products(sketch.project(rows)) + sketch.slack).mean() > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_sketch_of_its_own_rows_says_no_more(kind):
    """Not a law of any rows, but the reason for widths: the mean bound falls towards the mean cosine."""
    cosines, rows = read(KINDS[kind](250, DIM))
    means = [products(s.complete(s.project(rows))).mean() for s in (sketch_of(rows, width) for width in WIDTHS)]
    assert (np.diff(means) <= 1e-3).all()
    assert abs(means[-1] - cosines.mean()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [8, 32, DIM])
@pytest.mark.parametrize("code", ["int8", "float32", "float16"])
def test_no_code_says_less_than_the_cosine(kind, width, code):
    cosines, rows = read(KINDS[kind](250, DIM))
    sketch = sketch_of(rows, width)
    short = sketch.complete(sketch.project(rows))
    assert (bound_by(coding_for(code, short[:60], sketch.slack), short) >= cosines).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.1, 1e-3])
def test_a_step_that_is_too_small_cuts_codes_off_and_hides_nothing(kind, share):
    cosines, rows = read(KINDS[kind](250, DIM))
    sketch = sketch_of(rows, 32)
    short = sketch.complete(sketch.project(rows))
    fine = coding_for("int8", short, sketch.slack)
    coarse = Coding("int8", 32, fine.step * share, sketch.slack)
    codes, errors = coarse.encode(short)
    assert np.abs(codes).max() == 127
    assert errors.max() > 2 * fine.encode(short)[1].max()
    assert (bound_by(coarse, short) >= cosines).all()


@pytest.mark.parametrize("code", ["float32", "float16"])
def test_whole_rows_have_codes_too(code):
    for kind in KINDS:
        cosines, rows = read(KINDS[kind](250, DIM))
        assert (bound_by(coding_for(code, rows, Coding(code, DIM).slack), rows) >= cosines).all()


@pytest.mark.parametrize("code", ["int8", "float16"])
def test_the_error_of_a_code_is_its_distance_from_the_row(code):
    rng = np.random.default_rng(0)
    short = unit(rng.standard_normal((100, 24)) * 10.0 ** rng.uniform(-6, 1, 24)).astype(np.float32)
    coding = coding_for(code, short, 0.0)
    codes, errors = coding.encode(short)
    assert codes.dtype == code
    step = float(coding.step)
    exact = np.linalg.norm(short.astype(np.float64) - step * codes.astype(np.float64), axis=1)
    assert (errors >= exact).all()
    assert (errors <= exact * (1 + 1e-5) + 3e-6).all()


def test_a_code_worked_out_by_hand():
    short = np.array([[0.6, -0.8], [1.27, 0.004]], dtype=np.float32)
    coding = Coding("int8", 2, step=0.01, slack=0.0)
    codes, errors = coding.encode(short)
    assert codes.tolist() == [[60, -80], [127, 0]]
    assert errors == pytest.approx([0, 0.004], abs=2e-6)
    assert coding_for("int8", short, 0.0).step == pytest.approx(0.01)
    # 1 - e (1 + e') - e', of e = 0.1 and e' = 0.2, is 0.68; in units of 0.0001 it is 6800.
    assert coding.floor(1.0, np.array([0.1]), np.array([0.2])) == pytest.approx([6800], abs=0.02)


@pytest.mark.parametrize(("code", "share"), [("int8", 0.0), ("int8", 0.5), ("float16", 0.0)])
def test_with_smaller_errors_codes_would_hide_pairs(monkeypatch, code, share):
    cosines, rows = read(KINDS["flat"](250, DIM))
    sketch = sketch_of(rows, DIM)
    short = sketch.complete(sketch.project(rows))
    fine = coding_for(code, short, sketch.slack)
    coding = Coding(code, DIM, fine.step * (0.3 if code == "int8" else 1), 0.0)  # cut off where int8
    codes, errors = coding.encode(short)
    monkeypatch.setattr(Coding, "encode", lambda *_: (codes, errors * np.float32(share)))
    monkeypatch.setattr(Coding, "product_error", 0.0)
    monkeypatch.setattr(codes_module, "ROUNDING", 0.0)
    assert (bound_by(coding, short) < cosines).sum() > 100


def test_without_the_error_of_products_float32_would_hide_pairs(monkeypatch):
    cosines, rows = read(KINDS["flat"](250, DIM))
    monkeypatch.setattr(Coding, "product_error", 0.0)
    monkeypatch.setattr(codes_module, "ROUNDING", 0.0)
    assert (bound_by(Coding("float32", DIM, slack=0.0), rows) < cosines).sum() > 100


@pytest.mark.parametrize("kind", KINDS)
def test_principal_directions_are_orthonormal_and_hold_what_the_best_ones_hold(kind):
    _, rows = read(KINDS[kind](250, DIM))
    found = principal_directions(rows, 16)
    np.testing.assert_allclose(found @ found.T, np.eye(16), atol=1e-12)
    best = (np.linalg.svd(rows.astype(np.float64), compute_uv=False) ** 2).cumsum()
    held = ((rows @ found.T) ** 2).sum(axis=0).cumsum()
    assert held[-1] >= 0.9 * best[15]
    assert held[0] >= 0.8 * best[0]  # the most important comes first


def test_a_sketch_wider_than_its_directions_is_refused():
    directions = principal_directions(read(KINDS["flat"](250, DIM))[1], 8)
    assert make_sketch(directions, 9).width == 9
    with pytest.raises(ValueError, match="width must be at most 9, got 10"):
        make_sketch(directions, 10)
