"""The forms in which people have numbers in Python: each gives the same results as an array, or one line."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import clip_cid
from clip_cid.method.array_likes import as_array, as_whole_number

ROWS, DIM = 40, 8
VALUES = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
UNIT = VALUES / np.linalg.norm(VALUES, axis=1, keepdims=True)
UNIT[1], UNIT[7] = UNIT[0], UNIT[6]


class Frame:
    """As pandas and polars give numbers: by `to_numpy`, and `[]` takes no rows."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)
        self.shape = self._values.shape

    def __getitem__(self, column: Any) -> Any:
        raise KeyError(column)

    def to_numpy(self) -> np.ndarray:
        return self._values


class Columns(Frame):
    """A frame whose columns are of several kinds: as a whole it is objects."""

    def __init__(self, **columns: Any) -> None:
        self.columns = list(columns)
        self._of = {name: column if isinstance(column, Frame) else Frame(column) for name, column in columns.items()}
        super().__init__(np.empty((ROWS, len(columns)), dtype=object))

    def __getitem__(self, column: str) -> Frame:
        return self._of[column]


def column_of_vectors(values: np.ndarray) -> Frame:
    """A column of a table whose cells are vectors."""
    cells = np.empty(len(values), dtype=object)
    cells[:] = list(values)
    return Frame(cells)


FORMS = {
    "array": lambda values: values,
    "list of lists": lambda values: values.tolist(),
    "tuple of arrays": tuple,
    "list of tensors": lambda values: list(torch.from_numpy(values)),
    "tensor": torch.from_numpy,
    "tensor with gradients": lambda values: torch.from_numpy(values).clone().requires_grad_(),
    "float64 tensor": lambda values: torch.from_numpy(values).double(),
    "data frame": Frame,
    "column of vectors": column_of_vectors,
    "frame of one column of vectors": lambda values: Columns(embedding=column_of_vectors(values)),
    "columns of nullable numbers": lambda values: Columns(**{f"c{place}": values[:, place] for place in range(DIM)}),
    "array of pyarrow": lambda values: pa.array(list(values), type=pa.list_(pa.float32(), DIM)),
    "column of pyarrow": lambda values: pa.table({"e": list(values)})["e"],
    "negative view": lambda values: torch.complex(torch.zeros(values.shape), -torch.from_numpy(values)).conj().imag,
    "Fortran order": np.asfortranarray,
    "big-endian": lambda values: values.astype(">f4"),
}
OF_FLOAT64 = ("list of lists", "float64 tensor", "big-endian")  # read as such


@pytest.mark.parametrize("form", FORMS)
def test_balance_and_kmeans_give_the_same_in_every_form(form: str) -> None:
    given = FORMS[form](UNIT)
    same = UNIT.astype(np.float64) if form in OF_FLOAT64 else UNIT
    expected = clip_cid.balance(same, threshold=0.1, text_embeddings=same[::-1])
    result = clip_cid.balance(given, threshold=0.1, text_embeddings=FORMS[form](UNIT[::-1].copy()))
    assert np.array_equal(result.kept, expected.kept)
    assert len(result.kept) < ROWS

    clusters = clip_cid.spherical_kmeans(given, num_centers=3, iterations=2)
    assert np.array_equal(clusters.centers, clip_cid.spherical_kmeans(same, num_centers=3, iterations=2).centers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tensors_are_the_float32_numbers_they_stand_for(dtype: torch.dtype) -> None:
    half = torch.from_numpy(UNIT).to(dtype)
    expected = clip_cid.balance(half.float().numpy(), threshold=0.1)
    assert np.array_equal(clip_cid.balance(half, threshold=0.1).kept, expected.kept)
    assert np.array_equal(as_array(half, name="x"), half.float().numpy())
    assert as_array(torch.tensor([1, 2], dtype=torch.int16), name="x").dtype == np.int16


@pytest.mark.parametrize(
    ("form", "labels"),
    [*((form, "array") for form in FORMS), *(("tensor", labels) for labels in ("list", "tensor", "frame", "bytes"))],
)
def test_the_linear_probe_gives_the_same_in_every_form(form: str, labels: str) -> None:
    y = np.arange(ROWS) % 2
    x = (VALUES + 3 * y[:, None]).astype(np.float32)
    of_labels = {
        "array": y,
        "list": y.tolist(),
        "tensor": torch.from_numpy(y),
        "frame": Frame(y),
        "bytes": y.astype("u1"),
    }
    expected = clip_cid.linear_probe(x, y, x, y)
    given = FORMS[form](x)
    result = clip_cid.linear_probe(given, of_labels[labels], given, of_labels[labels], val=None)
    assert (result.score, result.C, result.curve) == (expected.score, expected.C, expected.curve)


REFUSED = {
    "path": ("x.npy", "embeddings must be an array, got the path 'x.npy'; load it first"),
    "Path": (Path("x.npy"), "got the path 'x.npy'"),
    "number": (3.0, "embeddings must be an array, got float"),
    "None": (None, "embeddings must be an array, got NoneType"),
    "dictionary": ({"a": 1}, "got dict"),
    "table of pyarrow": (pa.table({"a": [1.0, 0.0], "b": [0.0, 1.0]}), "must be an array, got Table"),
    "frame with keys": (Columns(key=np.full(ROWS, "k"), x=np.ones(ROWS)), "column 'key' has <U1; give the embedding's"),
    "keys and vectors": (Columns(n=np.arange(ROWS), e=column_of_vectors(UNIT)), "column 'e' has vectors"),
    "a missing vector": ([[1.0, 0.0], None], "must have a vector in each row, but row 1 has none"),
    "generator": ((row for row in UNIT), r"got generator; list\(\) makes one"),
    "ragged": ([[1.0, 0.0], [1.0]], "must have rows of one length"),
    "one row": ([1.0, 0.0], r"\(rows, dim\), neither of them 0, got shape \(2,\)"),
    "empty": ([], r"got shape \(0,\)"),
    "texts": ([["a", "b"]], "must be real numbers, got <U1"),
    "objects": (Frame(np.array([["a", 1.0]], dtype=object)), "must be real numbers, got object"),
    "masked": (np.ma.masked_invalid(UNIT), "got a masked one"),
    "complex tensor": (torch.ones(2, 2, dtype=torch.complex64), "must be real numbers, got complex64"),
    "sparse tensor": (torch.eye(2).to_sparse(), "must be a dense array of numbers, got a tensor of torch.float32"),
    "tensor without data": (torch.ones(2, 2, device="meta"), "must be a dense array"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_rows_of_numbers_is_refused_in_one_line(form: str) -> None:
    given, problem = REFUSED[form]
    for call in (clip_cid.balance, lambda rows: clip_cid.spherical_kmeans(rows, num_centers=1)):
        with pytest.raises(ValueError, match=problem) as error:
            call(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"train_x": VALUES[0]}, r"train_x must be real numbers of shape \(images, dim\), got float32 of shape \(8,\)"),
        ({"test_x": [["a"] * DIM] * ROWS}, "test_x must be real numbers"),
        ({"train_x": "x.npy"}, "train_x must be an array, got the path"),
        ({"train_y": np.full(ROWS, "cat")}, "train_y must be a class number for each image, got <U3"),
        ({"train_y": np.zeros(ROWS)}, "train_y must be a class number for each image, got float64"),
        ({"test_y": np.zeros((ROWS, 2), dtype=int)}, r"test_y must be .* of shape \(40, 2\)"),
        ({"val": (VALUES, [0.5] * ROWS)}, "val_y must be a class number"),
    ],
)
def test_the_linear_probe_refuses_other_things_in_one_line(change: dict[str, Any], problem: str) -> None:
    labels = np.arange(ROWS) % 2
    given: dict[str, Any] = {"train_x": VALUES, "train_y": labels, "test_x": VALUES, "test_y": labels}
    with pytest.raises(ValueError, match=problem):
        clip_cid.linear_probe(**given | change)


def test_flags_are_classes() -> None:
    y = np.arange(ROWS) % 2
    x = VALUES + 3 * y[:, None]
    assert clip_cid.linear_probe(x, y == 1, x, y == 1).score == clip_cid.linear_probe(x, y, x, y).score


@pytest.mark.parametrize("number", ["4", 4.0, None])
def test_what_is_no_number_is_refused_in_one_line(number: Any) -> None:
    """In the words of the argument, where no type is checked before the function runs."""
    with pytest.raises(ValueError, match="num_centers must be a whole number, got"):
        as_whole_number(number, name="num_centers", least=1)
    assert as_whole_number(np.int64(4), name="num_centers", least=1) == 4


def test_a_store_is_told_to_give_its_images() -> None:
    class Store:
        images = UNIT

    with pytest.raises(ValueError, match=r"got Store; give its images \(embeddings\.images\)"):
        clip_cid.balance(Store())


@pytest.mark.parametrize("threshold", [0.93, 0.8])
def test_a_similarity_for_a_distance_is_warned_of(threshold: float) -> None:
    near = UNIT + np.float32(2)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    with pytest.warns(
        UserWarning, match=rf"keeps 1 of 40 rows; .* did you mean 1 - {threshold:g} = {1 - threshold:.4g}"
    ):
        clip_cid.balance(near, threshold=threshold)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.07},
        {"threshold": 0.93, "metric": "euclidean"},
        {"threshold": 1.5},
        {"threshold": 0.93, "target_removed": 0.5},
    ],
)
def test_other_thresholds_are_not_warned_of(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_cid.balance(UNIT, **options)


def test_a_large_threshold_that_keeps_most_rows_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(clip_cid.balance(np.eye(DIM), threshold=0.9).kept) == DIM


def test_arrays_are_no_tensors_for_the_fused_loss() -> None:
    """In a process of its own, where no type is checked before the function runs."""
    code = """
import numpy as np, torch, clip_cid
rows = torch.eye(3)
try:
    clip_cid.fused_cluster_loss(rows.numpy(), rows, rows, torch.arange(3), scale=1.0)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "student must be a torch.Tensor, got ndarray; torch.as_tensor makes one\n"
