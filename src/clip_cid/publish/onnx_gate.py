"""How much ONNX graphs of lower precision lose on the evaluation sets of the run: the same images, both models."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid import log
from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.evaluation.comparison import differences
from clip_cid.evaluation.features import Encoder, UnmeasurableError
from clip_cid.evaluation.measure import Measured
from clip_cid.evaluation.measurements import Measurement
from clip_cid.evaluation.opened_sets import open_sets_of
from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.results import ANSWERS, Answers
from clip_cid.evaluation.scores import RESULTS, Score, read_scores
from clip_cid.file_digests import sha256_file
from clip_cid.models.clip import Clip
from clip_cid.models.device import resolve_device
from clip_cid.models.loading import load_clip
from clip_cid.models.references import LOCAL, files_beside_weights
from clip_cid.recipe import STUDENT, Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import EVALUATE

_CONVERTED = "onnx"
_ROUNDING = 1e-9  # of a difference of two shares


@dataclass(frozen=True)
class Drop:
    """A score of the student, that of the graphs, and how much lower it is. Shares of 1."""

    task: str
    set: str
    metric: str
    n: int | None
    student: float
    graphs: float
    drop: float
    low: float
    high: float
    """Of a paired bootstrap over the same images, 95 %."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Drops:
    """Of all sets that were measured."""

    rows: list[Drop]
    missing: list[str]
    """Sets of the recipe that could not be measured."""

    def refuse(self, precision: str, *, allowed: float) -> None:
        """Refuse graphs that lose more on a score.

        Args:
            precision: Of the graphs.
            allowed: In points.

        Raises:
            RunError: A score drops by more.
        """
        more = [row for row in self.rows if not row.drop * 100 <= allowed + _ROUNDING]  # also true for NaN
        if not more:
            return
        worst = max(more, key=lambda row: math.inf if math.isnan(row.drop) else row.drop)
        raise RunError(
            f"--onnx {precision}: {PROTOCOLS[worst.task].short} on {worst.set} ({worst.metric}) drops by"
            f" {100 * worst.drop:.1f} points, from {100 * worst.student:.1f} to {100 * worst.graphs:.1f} %;"
            f" {len(more)} of {len(self.rows)} scores drop by more than {allowed:g}.",
            fix=f"Nothing is written. Use {'--onnx fp16 or --onnx' if precision == 'int8' else '--onnx'}, or allow more"
            " with --max-drop POINTS.",
        )


def refuse_without_sets(recipe: Recipe, precision: str) -> None:
    """Refuse a run that has nothing to measure on.

    Raises:
        ConfigError: Its recipe names no set for zero-shot or retrieval.
    """
    settings = recipe.evaluate
    if not (settings.sets and settings.zero_shot) and not settings.retrieval:
        raise ConfigError(
            f"--onnx {precision}: what it loses is measured on the evaluation sets of the run, and its recipe names"
            " none for zero-shot or retrieval.",
            fix="Evaluate it first: `clip-cid evaluate RUN --evaluate.sets NAME FOLDER`, or use --onnx.",
        )


def measure_drops(run: RunFolder, student: Path, recipe: Recipe, sessions: Mapping[str, Any], scratch: Path) -> Drops:
    """Zero-shot and retrieval of the graphs beside those of the student.

    Scores of the student are taken from the evaluation of the run if their keys are equal, which cover images, prompts
    and weights; otherwise it is measured.

    Args:
        run: Its results are read.
        student: The folder of the student.
        recipe: Of the run.
        sessions: Tower -> a session of onnxruntime.
        scratch: A folder for features.

    Raises:
        RunError: The graphs give no usable embeddings.
        DataError: No set is there, or none can be measured.
    """
    recipe = _without_training(recipe)
    sets = open_sets_of(recipe, sha256_file)
    clip = load_clip(f"{LOCAL}{student}", device=str(resolve_device(recipe.machine.device)))
    ours = _encoder(STUDENT, clip, student, scratch / "student", recipe, clip.device)
    graphs = replace(clip, model=_Graphs(sessions))
    theirs = _encoder(_CONVERTED, graphs, student, scratch / _CONVERTED, recipe, torch.device("cpu"))

    rows: list[Drop] = []
    missing = list(sets.missing)
    known = _Known(run)
    for measurement in sets.measurements(recipe):
        try:
            of_student = known.measured(measurement.key(ours)) or measurement.measure(ours)
            rows += _drops(measurement, of_student, _measured(measurement, theirs), seed=recipe.evaluate.seed)
        except UnmeasurableError as error:
            log.warn(f"{error.problem} No {PROTOCOLS[measurement.task].short} on it.")
            missing.append(measurement.set)
    if not rows:
        raise DataError(
            f"{run.path}: no evaluation set can be measured ({', '.join(missing)}).",
            fix="Mend the sets, or name others.",
        )
    return Drops(rows, list(dict.fromkeys(missing)))


def _without_training(recipe: Recipe) -> Recipe:
    settings = recipe.evaluate.model_copy(update={"linear_probe": False, "knn": False})
    return recipe.model_copy(update={"evaluate": settings})


def _encoder(name: str, clip: Clip, student: Path, cache: Path, recipe: Recipe, device: torch.device) -> Encoder:
    beside = files_beside_weights(f"{LOCAL}{student}")
    return Encoder(
        name,
        clip,
        cache,
        device=device,
        batch_size=recipe.machine.embed_batch,
        workers=recipe.machine.workers,
        tokenizer={path.name: sha256_file(path) for path in beside},
    )


def _measured(measurement: Measurement, graphs: Encoder) -> Measured:
    try:
        return measurement.measure(graphs)
    except UnmeasurableError:
        raise
    except DataError as error:
        raise RunError(f"onnx: the graphs give no usable embeddings ({error.problem})", fix="Use --onnx.") from error


def _drops(measurement: Measurement, ours: Measured, theirs: Measured, *, seed: int) -> list[Drop]:
    """Student minus graphs on each metric of a measurement."""
    scores = [
        *(replace(score, model=STUDENT) for score in ours[0]),
        *(replace(score, model=_CONVERTED) for score in theirs[0]),
    ]
    answers = {STUDENT: ours[1], _CONVERTED: theirs[1]}
    of_graphs = {score.metric: score.score for score in theirs[0]}
    gaps = differences(scores, lambda score: answers[score.model], groups=[], seed=seed)
    by_metric = {gap.metric: gap for gap in gaps}

    return [
        Drop(
            measurement.task,
            measurement.set,
            score.metric,
            score.n,
            score.score,
            of_graphs[score.metric],
            by_metric[score.metric].difference,
            by_metric[score.metric].low,
            by_metric[score.metric].high,
        )
        for score in ours[0]
    ]


class _Known:
    """What the evaluation of the run has measured."""

    def __init__(self, run: RunFolder) -> None:
        self._folder = run.path / EVALUATE
        self._scores: dict[str, dict[str, Score]] = {}
        if run.has(EVALUATE) and not run.changed_files(EVALUATE, digests=True):
            for score in read_scores(self._folder / RESULTS):
                if score.key is not None and score.answers is not None:
                    self._scores.setdefault(score.key, {})[score.metric] = score

    def measured(self, key: str) -> Measured | None:
        """The scores of a key with their answers."""
        scores = list(self._scores.get(key, {}).values())
        return (scores, _read_answers(self._folder / ANSWERS / str(scores[0].answers))) if scores else None


def _read_answers(path: Path) -> Answers:
    with np.load(path) as arrays:
        return dict(arrays)


class _Graphs(torch.nn.Module):
    """The graphs in the place of an open_clip model; they give unit rows."""

    def __init__(self, sessions: Mapping[str, Any]) -> None:
        super().__init__()
        self._run: dict[str, Callable[[Tensor], Tensor]] = {
            name: _runner(session) for name, session in sessions.items()
        }

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        return self._run["image"](pixels)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        return F.normalize(self._run["text"](tokens), dim=-1)


def _runner(session: Any) -> Callable[[Tensor], Tensor]:
    (given,) = session.get_inputs()

    def run(rows: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: rows.cpu().numpy()})[0])

    return run
