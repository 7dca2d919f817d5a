"""Figures of the training and of the trained weights."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clip_cid.evaluation.scores import STUDENT, TEACHER
from clip_cid.figures import losses, throughput, weights
from clip_cid.report.drawing.figure import Figure, Numbers
from clip_cid.report.drawing.run_inputs import RunInputs
from clip_cid.report.drawing.stored_inputs import LeftOut

_WITHOUT_LAYER = "image tower has no mlp.c_proj"


def draw_losses(metrics: Mapping[str, np.ndarray], out: Path) -> Numbers:
    """Of the columns of a log; raises `LeftOut` where there is nothing to draw."""
    if not losses.loss_parts(metrics):
        raise LeftOut("no step of the training's log has a finite loss")
    return losses.draw(metrics, out)


def _losses_caption(numbers: Numbers) -> str:
    caption = (
        "Each loss by step, unweighted except for the total. If a color has two lines, the heavy one is a running mean."
    )
    if any("val/" in name for name in numbers):
        caption += " Validation results are in the second color; thin lines are the numbers behind their means."
    if any(name.startswith(losses.WEIGHT) for name in numbers):
        caption += " The weights in the total follow the gradients: the table has the first and the last."
    return caption


def draw_throughput(metrics: Mapping[str, np.ndarray], out: Path) -> Numbers:
    """Of the columns of a log; raises `LeftOut` where it has no speed."""
    if not set(throughput.COLUMNS) <= metrics.keys():
        raise LeftOut("the training's log has no speed")
    return throughput.draw(metrics, out)


def _weights(inputs: RunInputs, out: Path) -> Numbers:
    models: dict[str, np.ndarray] = {}
    layers: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in inputs.references:
        if name == TEACHER:
            continue
        try:
            parameters = inputs.clip(name).model.state_dict()
        except LeftOut as reason:
            left_out[name] = str(reason)
            continue
        layer = weights.last_layer(parameters)
        if layer is None:
            left_out[name] = f"its {_WITHOUT_LAYER}."
        else:
            models[name], layers[name] = parameters[layer].cpu().double().numpy().ravel(), layer

    if STUDENT not in models:
        raise LeftOut(f"the student's {_WITHOUT_LAYER}")
    return {"layers": layers, "models": weights.draw(models, out), "left_out": left_out}


LOSSES = Figure(
    "losses",
    lambda inputs, out: draw_losses(inputs.metrics, out),
    section="training",
    description="Each loss part by training step",
    caption=_losses_caption,
)
THROUGHPUT = Figure(
    "throughput",
    lambda inputs, out: draw_throughput(inputs.metrics, out),
    section="training",
    description="Pairs a second and share of the time spent waiting for data, by training step",
    caption="Between two lines of the log. If a training waits for data, the reading and decoding of the pairs slow"
    " it down (machine.workers), not the model.",
)
FIGURES = (
    LOSSES,
    THROUGHPUT,
    Figure(
        "weights",
        _weights,
        section="training",
        description="Density of the weights of the last layer of the last block",
        caption="Density of the weights of the last block's mlp.c_proj in the image tower, on a logarithmic axis.",
    ),
)
