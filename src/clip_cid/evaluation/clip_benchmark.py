"""Results in CLIP_benchmark's JSON, one file for each model, set and task, so that its `build` makes its table of them."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_cid.evaluation.tables import Row
from clip_cid.run_folder import write_json

_TASKS = {
    "zero_shot": "zeroshot_classification",
    "linear_probe": "linear_probe",
    "retrieval": "zeroshot_retrieval",
}
# There the images are what is retrieved: text to image is image retrieval.
_RECALLS = {"text_to_image_R": "image_retrieval_recall", "image_to_text_R": "text_retrieval_recall"}


def write_clip_benchmark(folder: Path, rows: Sequence[Row], references: Mapping[str, str]) -> int:
    """Write what CLIP_benchmark (1.6) has a task for: zero-shot, probe and retrieval; returns how many files.

    Args:
        folder: Made when it does not exist.
        rows: Lines of results.jsonl.
        references: Model -> what it was loaded from; of `NAME/TAG` both parts stand where CLIP_benchmark puts them.
    """
    folder.mkdir(exist_ok=True)
    count = 0
    for (model, name, task), metrics in _metrics(rows).items():
        architecture, tag = _model(model, references[model])
        title = re.sub(r"[^A-Za-z0-9]+", "-", f"{name}_{model}_{_TASKS[task]}")
        digest = hashlib.sha256(f"{model}\n{name}\n{task}".encode()).hexdigest()[:8]  # titles may collide
        result = {"dataset": name, "model": architecture, "pretrained": tag, "task": _TASKS[task], "metrics": metrics}
        write_json(folder / f"{title}-{digest}.json", {**result, "language": "en"})
        count += 1
    return count


def _metrics(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if row["task"] in _TASKS:
            found.setdefault((row["model"], row["set"], row["task"]), {}).update(_of_row(row))
    return found


def _of_row(row: Row) -> Iterator[tuple[str, Any]]:
    if row["task"] == "retrieval":
        kind, _, depth = row["metric"].partition("@")
        yield f"{_RECALLS[kind]}@{depth}", row["score"]
        return
    prefix = "lp_" if row["task"] == "linear_probe" else ""
    yield f"{prefix}acc1", row["top1"]
    if row.get("top5") is not None:
        yield f"{prefix}acc5", row["top5"]
    yield f"{prefix}mean_per_class_recall", row["mean_per_class"]


def _model(name: str, reference: str) -> tuple[str, str]:
    if ":" in reference or "/" not in reference:
        return name, reference
    architecture, _, tag = reference.rpartition("/")
    return architecture, tag
