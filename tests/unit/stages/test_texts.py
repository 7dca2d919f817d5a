"""The stage that embeds texts without images, and what the training reads of it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_cid.data.embeddings.files import StoreInfo
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages import texts
from clip_cid.training.join import read_lines

DIM = 8


class Teacher:
    dim, device, identity = DIM, torch.device("cpu"), {"reference": "tiny", "weights_sha256": "ab"}

    def begin_texts(self, captions: list[str]) -> Callable[[], np.ndarray]:
        rows = torch.tensor([[1.0 + ord(text[0]), *[1.0 + len(text)] * (DIM - 1)] for text in captions])
        return lambda: torch.nn.functional.normalize(rows, dim=1).half().numpy()

    def count_truncated(self, captions: list[str]) -> int:
        return sum(len(text) > 10 for text in captions)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(texts, "load_teacher", lambda embed, device: Teacher())
    (tmp_path / "a.txt").write_text("one\n\ntwo\none\n")
    (tmp_path / "b.txt").write_text("three\nfar longer than the context\n")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    return parse_recipe({"distill": {"texts": files, "weights": {"cosine_text": 1.0}, "batch_size": 8}}, where="test")


def run(folder: Path, recipe: Recipe) -> Any:
    out = folder / "texts"
    out.mkdir(parents=True)
    summary = texts.run(RunFolder(folder), out, recipe)
    (out / "manifest.json").write_text("{}")
    return summary


def store(path: Path, *, weights: str = "ab", dim: int = DIM) -> EmbeddingStore:
    """Of no pairs."""
    teacher = {"reference": "other", "weights_sha256": weights}
    return EmbeddingStore(path, StoreInfo(teacher, None, dim, "float16", (), "key", "captions", None, ()))


def test_the_stage_embeds_each_text_once_and_says_what_it_left_out(
    tmp_path: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    summary = run(tmp_path / "run", recipe)
    assert (summary.texts, summary.empty, summary.repeated, summary.truncated) == (4, 1, 1, 1)
    assert "1 empty lines are left out, and 1 that repeat another" in caplog.text
    assert "1 of 4 are longer than the teacher's context" in caplog.text
    assert str(summary) == "4 texts embedded in 8 dimensions"
    assert json.loads((tmp_path / "run" / "texts" / "texts.json").read_text())["teacher"]["reference"] == "tiny"


def test_the_training_reads_what_the_stage_left(tmp_path: Path, recipe: Recipe):
    run(tmp_path / "run", recipe)
    lines = read_lines(RunFolder(tmp_path / "run"), recipe, store(tmp_path))
    assert [lines.text(number) for number in range(len(lines))] == [
        "one",
        "two",
        "three",
        "far longer than the context",
    ]
    assert lines.per_step == 2
    assert lines.embeddings is not None
    assert np.array_equal(lines.embeddings[0], Teacher().begin_texts(["one"])()[0])


@pytest.mark.parametrize("other", [{"weights": "cd"}, {"dim": 4}])
def test_texts_of_another_teacher_than_the_pairs_are_refused(tmp_path: Path, recipe: Recipe, other: dict[str, Any]):
    run(tmp_path / "run", recipe)
    with pytest.raises(DataError, match="texts embedded in 8 dimensions by the teacher tiny, but the pairs in"):
        read_lines(RunFolder(tmp_path / "run"), recipe, store(tmp_path, **other))


def test_other_texts_are_another_training(tmp_path: Path, recipe: Recipe):
    digests = set[bytes]()
    for name, content in (("x", "one\ntwo\n"), ("y", "two\none\n"), ("z", "onetwo\n")):
        (tmp_path / "a.txt").write_text(content)
        run(tmp_path / name, recipe)
        digests.add(read_lines(RunFolder(tmp_path / name), recipe, store(tmp_path)).digest)
    assert len(digests) == 3
