"""Results in CLIP_benchmark's JSON, one file for each model, set and task; its `build` makes the table."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clip_cid.evaluation.protocols import LINEAR_PROBE, PROTOCOLS, RETRIEVAL
from clip_cid.evaluation.scores import Score
from clip_cid.run_folder import write_json

# There the images are what is retrieved: text to image is image retrieval.
_RECALLS = {"text_to_image_R": "image_retrieval_recall", "image_to_text_R": "text_retrieval_recall"}


def write_clip_benchmark(folder: Path, scores: Sequence[Score], references: Mapping[str, str]) -> int:
    """Write what CLIP_benchmark (1.6) has a task for: zero-shot, probe and retrieval; returns how many files.

    Args:
        folder: Made when it does not exist.
        scores: Lines of results.jsonl.
        references: Model -> what it was loaded from; of `NAME/TAG` both parts stand where CLIP_benchmark puts them.
    """
    folder.mkdir(exist_ok=True)
    metrics = _metrics(scores)
    for (model, name, task), values in metrics.items():
        architecture, tag = _architecture_and_tag(model, references[model])
        theirs = PROTOCOLS[task].clip_benchmark
        title = re.sub(r"[^A-Za-z0-9]+", "-", f"{name}_{model}_{theirs}")[:150]
        digest = hashlib.sha256(f"{model}\n{name}\n{task}".encode()).hexdigest()[:8]  # titles may collide
        result = {"dataset": name, "model": architecture, "pretrained": tag, "task": theirs, "metrics": values}
        write_json(folder / f"{title}-{digest}.json", {**result, "language": "en"})
    return len(metrics)


def _metrics(scores: Sequence[Score]) -> dict[tuple[str, str, str], dict[str, float | None]]:
    """Model, set and task -> metric -> value."""
    metrics: dict[tuple[str, str, str], dict[str, float | None]] = {}
    for score in scores:
        if PROTOCOLS[score.task].clip_benchmark is not None:
            metrics.setdefault((score.model, score.set, score.task), {}).update(_of_score(score))
    return metrics


def _of_score(score: Score) -> Iterator[tuple[str, float | None]]:
    if score.task == RETRIEVAL:
        kind, _, depth = score.metric.partition("@")
        yield f"{_RECALLS[kind]}@{depth}", score.score
        return
    prefix = "lp_" if score.task == LINEAR_PROBE else ""
    yield f"{prefix}acc1", score.top1
    if score.top5 is not None:
        yield f"{prefix}acc5", score.top5
    yield f"{prefix}mean_per_class_recall", score.mean_per_class


def _architecture_and_tag(name: str, reference: str) -> tuple[str, str]:
    if ":" in reference or "/" not in reference:
        return name, reference
    architecture, _, tag = reference.rpartition("/")
    return architecture, tag
