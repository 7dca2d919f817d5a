"""The teacher's embeddings of texts without images: resumed, and refused when they are not whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from clip_cid.data.embeddings import of_texts
from clip_cid.data.embeddings.of_texts import embed_texts, open_texts
from clip_cid.errors import DataError

TEXTS = pa.array([f"text {number}" for number in range(10)], pa.large_string())


class Encoder:
    """A direction for each number; stops when told to."""

    dim, device = 6, torch.device("cpu")

    def __init__(self, *, name: str = "a", stop_after: int = 1000) -> None:
        self.identity: dict[str, Any] = {"reference": name, "weights_sha256": name}
        self.read: list[str] = []
        self.stop_after = stop_after

    def begin_texts(self, captions: list[str]) -> Callable[[], np.ndarray]:
        if len(self.read) + len(captions) > self.stop_after:
            raise KeyboardInterrupt
        self.read += captions
        angles = torch.tensor([[float(text.split()[1]) * place for place in range(self.dim)] for text in captions])
        rows = torch.nn.functional.normalize(1.5 + torch.sin(angles), dim=1).half().numpy()
        return lambda: rows

    def count_truncated(self, captions: list[str]) -> int:
        return sum(text in ("text 2", "text 9") for text in captions)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(of_texts, "_BLOCK", 4)


def test_texts_and_their_embeddings_are_read_as_they_were_written(tmp_path: Path):
    encoder = Encoder()
    assert embed_texts(tmp_path, TEXTS, encoder, batch=3) == 2
    found = open_texts(tmp_path)
    assert found.texts.to_pylist() == TEXTS.to_pylist()
    assert found.teacher == encoder.identity
    assert found.embeddings.dtype == np.float16
    assert np.array_equal(found.embeddings, encoder.begin_texts(TEXTS.to_pylist())())


def test_a_killed_attempt_is_resumed_and_gives_the_same_bytes(tmp_path: Path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder in (whole, again):
        folder.mkdir()
    embed_texts(whole, TEXTS, Encoder(), batch=3)
    with pytest.raises(KeyboardInterrupt):
        embed_texts(again, TEXTS, Encoder(stop_after=6), batch=3)
    encoder = Encoder()
    assert embed_texts(again, TEXTS, encoder, batch=3) == 2
    assert encoder.read == TEXTS.to_pylist()[4:]
    assert (again / "texts.npy").read_bytes() == (whole / "texts.npy").read_bytes()


def test_the_work_of_another_teacher_is_not_resumed(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        embed_texts(tmp_path, TEXTS, Encoder(stop_after=6), batch=3)
    encoder = Encoder(name="b")
    embed_texts(tmp_path, TEXTS, encoder, batch=3)
    assert encoder.read == TEXTS.to_pylist()


def test_embeddings_of_other_texts_are_refused(tmp_path: Path):
    embed_texts(tmp_path, TEXTS, Encoder(), batch=3)
    np.save(tmp_path / "texts.npy", np.zeros((3, 6), dtype=np.float16))
    with pytest.raises(DataError, match=r"10 texts, but float16 embeddings of shape \(3, 6\)"):
        open_texts(tmp_path)
    (tmp_path / "texts.npy").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_texts(tmp_path)
