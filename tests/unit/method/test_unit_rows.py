import numpy as np
import pytest

from clip_cid.method.unit_rows import UnitRows, cosine_error


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 64, 1280, 20_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_row_is_the_same_bit_for_bit_whatever_is_read_with_it(dim, dtype):
    rows = np.random.default_rng(dim).standard_normal((9, dim)).astype(dtype)
    unit = UnitRows(np.asfortranarray(rows), name="rows", any_length=True)
    everything = unit[0:9]
    assert everything.dtype == np.float64
    for row in range(9):
        np.testing.assert_array_equal(everything[row], unit[np.array([row])][0])
        np.testing.assert_array_equal(everything[row], UnitRows(rows[row:], name="rows", any_length=True)[0:1][0])


def test_rows_come_out_at_length_one():
    rows = 1e-3 * np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    lengths = np.linalg.norm(UnitRows(rows, name="rows", any_length=True)[0:5], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-15)


@pytest.mark.parametrize(
    ("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf"), (0.0, "0"), (1e200, "inf")]
)
@pytest.mark.parametrize("any_length", [False, True])
def test_a_row_without_a_direction_is_named(value, shown, any_length):
    rows = np.zeros((5000, 3))
    rows[:, 1] = 1
    rows[4321] = value
    with pytest.raises(ValueError, match=f"^things must have rows .* row 4321 has length {shown} \\(1 such rows"):
        UnitRows(rows, name="things", any_length=any_length)


def test_lengths_may_be_off_by_a_hundredth_and_no_more():
    assert len(UnitRows(np.array([[0.9901], [1.0099]]), name="rows", any_length=False)) == 2
    for wrong in (0.98, 1.02, 5.0):
        with pytest.raises(ValueError, match=f"length 1 .* row 1 has length {wrong:g}"):
            UnitRows(np.array([[1.0], [wrong]]), name="rows", any_length=False)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 2, 2)])
def test_only_tables_with_something_in_them_are_rows(shape):
    with pytest.raises(ValueError, match="rows must be an array of"):
        UnitRows(np.ones(shape), name="rows", any_length=True)


@pytest.mark.parametrize("values", [np.array([["a"]]), np.array([[True]]), np.array([[1j]])])
def test_only_real_numbers_are_rows(values):
    with pytest.raises(ValueError, match="rows must be real numbers, got"):
        UnitRows(values, name="rows", any_length=True)


@pytest.mark.parametrize("dim", [2, 64, 1280])
def test_no_float32_product_is_further_off_than_its_bound(dim):
    rng = np.random.default_rng(dim)
    rows = np.concatenate([rng.standard_normal((200, dim)), np.abs(rng.standard_normal((200, dim))), np.ones((1, dim))])
    unit = UnitRows(rows, name="rows", any_length=True)[0 : len(rows)]
    unit32 = unit.astype(np.float32)
    assert np.abs(unit32 @ unit32.T - unit @ unit.T).max() <= cosine_error(dim)
