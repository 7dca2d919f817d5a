"""The page of a training: `training.html` in the run folder, also while the training goes on.

It is no result of a stage: no record knows it, and writing it takes no lock and touches no work folder.
"""

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clip_cid import units
from clip_cid.errors import RunError
from clip_cid.figures import learning, losses
from clip_cid.models.public_names import PublicWords, public_settings
from clip_cid.recipe import Recipe, as_yaml
from clip_cid.report import page
from clip_cid.report.cards import Card
from clip_cid.report.drawing import of_training
from clip_cid.report.drawing.figure import Figure, Numbers
from clip_cid.report.drawing.stored_inputs import LeftOut
from clip_cid.report.drawing.training_log import read_metrics
from clip_cid.report.parts import place_figures, place_to_draw
from clip_cid.run_folder import RunFolder, atomic_file
from clip_cid.stage_names import DISTILL
from clip_cid.training import checkpoint
from clip_cid.training.loop import CHECKPOINTS
from clip_cid.training.so_far import METRICS, PAGE, TrainingSoFar

Standing = Literal["running", "stopped", "finished"]
"""How a training stands: a process is at it; none is, and it can be resumed; its student is there."""


def _draw_learning(metrics: Mapping[str, np.ndarray], out: Path) -> Numbers:
    learning.draw(metrics, out)
    return {}


_FIGURES = (  # of the columns of a log
    replace(of_training.LOSSES, draw=of_training.draw_losses),
    replace(of_training.THROUGHPUT, draw=of_training.draw_throughput),
    Figure(
        "learning",
        _draw_learning,
        section="signs",
        description="Learning rate, gradient norm and the signs of a collapse, by training step",
        caption="Learning rate, norm of the gradient before clipping, and the numbers behind the signs of a collapse.",
    ),
)


def write_training_page(folder: RunFolder, recipe: Recipe, standing: Standing, *, refresh: int | None = None) -> Path:
    """Write `training.html`, whole or not at all, from the log of the training.

    Args:
        folder: The run folder; another process may work there.
        recipe: Of the run: what the page must not say, such as local paths.
        standing: How the training stands.
        refresh: The page loads itself again after so many seconds; for as long as a command keeps writing it.

    Raises:
        RunError: There is no training.
        DataError: Its log is damaged.
    """
    of = TrainingSoFar.finished if standing == "finished" else TrainingSoFar.unfinished
    training = of(folder)
    if training is None:
        raise RunError(f"{folder.path}: no training here.", fix=f"Run `clip-cid run {folder.path}`.")

    path, words = folder.path / PAGE, PublicWords(recipe.model_dump(mode="json"), folder.path)
    stage = folder.path / DISTILL if standing == "finished" else folder.part(DISTILL)
    with place_to_draw(path) as drawn:
        numbers, left_out = _draw(stage / METRICS, drawn, training)
        figures = place_figures(_FIGURES, drawn, numbers, words, images=True)
    values = {
        "title": "Training" if standing == "finished" else "Training, unfinished",
        "run": folder.path.resolve().name,
        "refresh": refresh,
        "blur": False,
        "side": 0,
        "standing": standing,
        "training": training,
        "share": training.step / training.steps if training.steps else None,
        "written": _time(time.time()),
        "cards": _cards(training, standing, checkpoint.newest_step(stage / CHECKPOINTS)),
        "losses": numbers.get("losses", {}),
        "loss_name": losses.display_name,
        "signs": _signs(training.lines),
        "figures": figures,
        "left_out": left_out,
        "settings": as_yaml(public_settings({DISTILL: dict(training.settings)})),
    }
    with atomic_file(path) as temporary:
        temporary.write_text(page.render(PAGE, values, words), encoding="utf-8")
    return path


def _draw(path: Path, drawn: Path, training: TrainingSoFar) -> tuple[dict[str, Any], dict[str, str]]:
    """Name -> numbers of the figures, and the reason for each that is left out."""
    numbers, left_out = dict[str, Any](), dict[str, str]()
    if not training.lines:
        return numbers, left_out
    metrics = read_metrics(path, grows=True)
    for figure in _FIGURES:
        try:
            numbers[figure.name] = figure.draw(metrics, drawn)
        except LeftOut as reason:
            left_out[figure.name] = str(reason)
    return numbers, left_out


def _cards(training: TrainingSoFar, standing: Standing, saved: int | None) -> list[Card]:
    """The facts at the head of the page."""
    last, steps = training.last, training.steps
    shown = [Card("step", f"{training.step:,}" + (f" of {steps:,}" if steps else ""), _epoch(training))]
    if training.seconds_left is not None and standing != "finished":
        label = "time left" if standing == "running" else "time to go, once it is resumed"
        note = f"at {training.pairs_per_s:,.0f} pairs/s as of late, without measurements"
        shown.append(Card(label, units.duration(training.seconds_left), note))
    if last:
        first = training.lines[0]["loss"]
        shown.append(Card("loss", _number(last["loss"]), f"{_number(first)} at step {training.lines[0]['step']:,}"))
        shown.append(Card("learning rate", f"{last['lr']:.3g}", f"gradient norm {_number(last['grad_norm'])}"))
        waiting, skipped = last.get("data_wait_share"), last.get("skipped_steps", 0)
        note = f"{units.counted(skipped, 'step')} skipped, not finite" if skipped else "no step skipped"
        shown.append(Card("waits for data", "-" if waiting is None else units.percent(waiting, 0), note))
        shown.append(Card("last line of the log", _time(training.written)[11:], _time(training.written)[:10]))
    if standing != "finished":
        note = "a killed training goes on from there" if saved else "a killed training begins anew"
        shown.append(Card("last checkpoint", f"step {saved:,}" if saved else "none yet", note))
    return shown


def _epoch(training: TrainingSoFar) -> str:
    epoch, settings = training.last.get("epoch"), training.settings
    if epoch is None:
        return ""
    return f"epoch {epoch:.2f}" + ("" if settings.get("steps") else f" of {settings['epochs']:,}")


def _signs(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Each sign of a collapse in words, with its first and its last number."""
    rows: list[tuple[str, str, str]] = []
    for name, title in learning.SIGNS.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            rows.append((title, _number(values[0]), _number(values[-1])))
    return rows


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
