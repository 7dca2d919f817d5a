"""The results of an evaluation on disk: a line for every number, the answers behind it, nothing measured twice.

The key of a measurement (one model, one set, one protocol) covers everything that its result depends on.
Its lines are appended to `results.jsonl` first. Then its answers appear in `answers/` with one rename.
So a measurement with answers is whole, even if the process was killed.
"""

import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import log
from clip_cid.errors import DataError
from clip_cid.evaluation.protocols import RETRIEVAL
from clip_cid.evaluation.scores import RESULTS, Score, read_scores
from clip_cid.journal import Journal
from clip_cid.run_folder import atomic_file

ANSWERS = "answers"

Answers = Mapping[str, np.ndarray]
"""`predicted` (images, or folds by images) and `labels`.

A retrieval has the hits of each image by recall, and its `captions`."""


class Results:
    """The scores of this evaluation, in `folder`; those in it already, or of an earlier evaluation, are taken over."""

    def __init__(self, folder: Path, earlier: Path | None) -> None:
        self._folder = folder
        (folder / ANSWERS).mkdir(exist_ok=True)
        self._journal = Journal(folder / RESULTS)
        self._journal.drop_torn_line()
        self._drop_damaged()
        self._known: dict[str, tuple[Path, list[Score]]] = {}
        for place in (earlier, folder):
            if place is not None:
                self._known |= {key: (place, scores) for key, scores in _whole_measurements(place).items()}
        self.scores: list[Score] = []

    def holds(self, key: str) -> bool:
        """Whether a measurement was made before."""
        return key in self._known

    def take_over(self, key: str, *, model: str) -> list[Score] | None:
        """The scores of a measurement made before, as scores of this evaluation; None when there is none."""
        if key not in self._known:
            return None
        place, known = self._known[key]
        scores = [replace(score, model=model) for score in known]
        if place != self._folder:
            self._append(scores)
            name = str(scores[0].answers)
            with atomic_file(self._folder / ANSWERS / name) as temporary:
                shutil.copyfile(place / ANSWERS / name, temporary)
        self.scores += scores
        return scores

    def add(self, key: str, scores: Sequence[Score], answers: Answers) -> None:
        """Write a measurement that has just been made."""
        title = re.sub(r"[^A-Za-z0-9]+", "-", f"{scores[0].set}-{scores[0].task}")
        name = f"{title}-{key}.npz"
        written = [replace(score, key=key, answers=name) for score in scores]
        self._append(written)
        with atomic_file(self._folder / ANSWERS / name) as temporary, open(temporary, "wb") as handle:
            small: dict[str, Any] = {kind: _small(values) for kind, values in answers.items()}
            np.savez_compressed(handle, **small)
        self._known[key] = (self._folder, written)
        self.scores += written

    def answers(self, score: Score) -> Answers:
        """The answers behind a score."""
        with np.load(self._folder / ANSWERS / str(score.answers)) as arrays:
            return dict(arrays)

    def close(self) -> None:
        """Keep only the measurements of this evaluation, in its order; drop other models and sets."""
        self._journal.replace(*(score.line() for score in self.scores))
        used = {score.answers for score in self.scores}
        for path in (self._folder / ANSWERS).iterdir():
            if path.name not in used:
                path.unlink()

    def _drop_damaged(self) -> None:
        """Work that does not load is absent: what it held is measured again."""
        try:
            _scores_in(self._folder)
        except DataError as error:
            log.warn(f"{error.problem} What was measured there is measured again.")
            self._journal.replace()

    def _append(self, scores: Sequence[Score]) -> None:
        self._journal.append(*(score.line() for score in scores))
        self._journal.sync()


def _scores_in(folder: Path) -> list[Score]:
    return read_scores(folder / RESULTS) if (folder / RESULTS).is_file() else []


def _can_be_read(answers: Path, score: Score) -> bool:
    """Whether every array behind a score is there and as its checksum says."""
    names = {"captions", score.metric} if score.task == RETRIEVAL else {"predicted", "labels"}
    try:
        with open(answers, "rb") as handle, np.load(handle) as arrays:
            return names <= dict(arrays).keys()
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False


def _small(values: np.ndarray) -> np.ndarray:
    """Class numbers in two bytes if they fit."""
    return values.astype(np.int16) if values.dtype.kind == "i" and values.max(initial=0) < 2**15 else values


def _whole_measurements(folder: Path) -> dict[str, list[Score]]:
    """Key -> the scores of one model with that key, if the answers behind each of them can be read too."""
    by_model: dict[tuple[str, str], dict[str, Score]] = {}
    for score in _scores_in(folder):
        if score.key and score.answers:
            # By metric, because a measurement killed before its answers were there has left its lines twice.
            by_model.setdefault((score.key, score.model), {})[score.metric] = score

    whole: dict[str, list[Score]] = {}
    for (key, _), scores in by_model.items():
        if all(_can_be_read(folder / ANSWERS / str(score.answers), score) for score in scores.values()):
            whole.setdefault(key, list(scores.values()))
    return whole
