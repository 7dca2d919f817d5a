"""The results of an evaluation on disk: a line for every number, the answers behind it, nothing measured twice.

A task (one model, one set, one way to measure) is recognized by its key, which covers everything its result depends on.
Its lines are appended to `results.jsonl` first and its answers appear in `answers/` afterwards, at once: a task with
answers is whole, whenever the process was killed.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid.evaluation.tables import Row
from clip_cid.journal import Journal
from clip_cid.run_folder import atomic_file

RESULTS, ANSWERS = "results.jsonl", "answers"

Answers = Mapping[str, np.ndarray]
"""`predicted` (images, or folds by images) and `labels`; of a retrieval the hits of each image by recall, and its `captions`."""


class Results:
    """The lines of this evaluation, in `folder`; tasks found there or in an earlier evaluation are taken over."""

    def __init__(self, folder: Path, earlier: Path | None) -> None:
        self._folder = folder
        (folder / ANSWERS).mkdir(exist_ok=True)
        self._journal = Journal(folder / RESULTS)
        self._journal.drop_torn_line()
        self._found: dict[str, tuple[Path, list[Row]]] = {}
        for place in (earlier, folder):
            if place is not None:
                self._found |= {key: (place, rows) for key, rows in _whole_tasks(place).items()}
        self.rows: list[Row] = []

    def take_over(self, key: str, *, model: str) -> list[Row] | None:
        """The lines of a task measured before, as lines of this evaluation; None when it has not been."""
        if key not in self._found:
            return None
        place, found = self._found[key]
        rows = [{**row, "model": model} for row in found]
        if place != self._folder:
            self._journal.append(*rows)
            self._journal.sync()
            name = rows[0]["answers"]
            with atomic_file(self._folder / ANSWERS / name) as temporary:
                shutil.copyfile(place / ANSWERS / name, temporary)
        self.rows += rows
        return rows

    def add(self, key: str, rows: Sequence[Row], answers: Answers) -> None:
        """Write a task that has just been measured."""
        title = re.sub(r"[^A-Za-z0-9]+", "-", f"{rows[0]['set']}-{rows[0]['task']}")
        name = f"{title}-{key}.npz"
        lines = [{**row, "key": key, "answers": name} for row in rows]
        self._journal.append(*lines)
        self._journal.sync()
        with atomic_file(self._folder / ANSWERS / name) as temporary, open(temporary, "wb") as handle:
            small: dict[str, Any] = {kind: _small(values) for kind, values in answers.items()}
            np.savez_compressed(handle, **small)
        self._found[key] = (self._folder, lines)
        self.rows += lines

    def answers(self, row: Row) -> Answers:
        """The answers behind a line."""
        with np.load(self._folder / ANSWERS / row["answers"]) as found:
            return dict(found)

    def close(self) -> None:
        """Leave what this evaluation is made of, in its order: no lines or answers of models or sets no longer asked for."""
        self._journal.replace(*self.rows)
        used = {row["answers"] for row in self.rows}
        for path in (self._folder / ANSWERS).iterdir():
            if path.name not in used:
                path.unlink()


def _small(values: np.ndarray) -> np.ndarray:
    """Class numbers in two bytes where they fit."""
    return values.astype(np.int16) if values.dtype.kind == "i" and values.max(initial=0) < 2**15 else values


def _whole_tasks(folder: Path) -> dict[str, list[Row]]:
    """Key -> the lines of one model with that key, where its answers are there too."""
    by_model: dict[tuple[str, str], dict[str, Row]] = {}
    for row in Journal(folder / RESULTS).read():
        if "answers" in row and (folder / ANSWERS / row["answers"]).is_file():
            # By metric, because a task killed before its answers were there has left its lines twice.
            by_model.setdefault((row["key"], row["model"]), {})[row["metric"]] = row
    found: dict[str, list[Row]] = {}
    for (key, _), rows in by_model.items():
        found.setdefault(key, list(rows.values()))
    return found
