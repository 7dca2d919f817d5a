"""Figures of the scores."""

from collections.abc import Callable
from pathlib import Path

from clip_cid.evaluation.protocols import LINEAR_PROBE, PROTOCOLS, ZERO_SHOT, Protocol
from clip_cid.evaluation.scores import STUDENT, models_of, reference_model
from clip_cid.figures import gain, radar, scores
from clip_cid.report.drawing.figure import Figure, Numbers
from clip_cid.report.drawing.run_inputs import NO_SCORES, RunInputs
from clip_cid.report.drawing.stored_inputs import LeftOut


def _scores(task: str) -> Callable[[RunInputs, Path], Numbers]:
    def draw(inputs: RunInputs, out: Path) -> Numbers:
        chosen = [score for score in inputs.scores if score.task == task]
        if not chosen:
            raise LeftOut(NO_SCORES)
        return scores.draw(chosen, inputs.differences, task, out)

    return draw


def _scores_caption(protocol: Protocol) -> Callable[[Numbers], str]:
    def caption(numbers: Numbers) -> str:
        lead = "; on the right the student's lead with its paired interval, faint where that contains 0."
        compared = any(model != STUDENT for model in numbers)
        return f"{protocol.title}: score with its interval, dotted line at chance{lead if compared else '.'}"

    return caption


def _gain(inputs: RunInputs, out: Path) -> Numbers:
    baseline = reference_model(models_of(inputs.scores))
    if baseline is None:
        raise LeftOut("the only model to compare the student with is the teacher")
    if not inputs.differences.headlines(baseline):
        raise LeftOut(NO_SCORES)
    return {"baseline": baseline, "lines": gain.draw(inputs.differences, baseline, out)}


def _radar(inputs: RunInputs, out: Path) -> Numbers:
    """The radar of the linear probe, as in the paper; of zero-shot if the probe has too few sets."""
    if len(models_of(inputs.scores)) < 2:
        raise LeftOut("there is one model only")
    for task in (LINEAR_PROBE, ZERO_SHOT):
        chosen = [score for score in inputs.scores if score.task == task]
        if len(radar.common_rows(chosen)) >= radar.MIN_SETS:
            return {"task": task, **radar.draw(chosen, out)}
    raise LeftOut(f"fewer than {radar.MIN_SETS} sets with a score of every model")


def _radar_caption(numbers: Numbers) -> str:
    return f"{PROTOCOLS[numbers['task']].title} on all sets, each axis on its own range; the numbers are the student's."


FIGURES = (
    *(
        Figure(
            f"scores_{task}",
            _scores(task),
            section="scores",
            description=f"{protocol.title} scores with intervals, by set and model",
            caption=_scores_caption(protocol),
        )
        for task, protocol in PROTOCOLS.items()
    ),
    Figure(
        "radar",
        _radar,
        section="scores",
        description="Scores of all models on all sets, each axis on its own range",
        caption=_radar_caption,
    ),
    Figure(
        "gain",
        _gain,
        section="head",
        description="The student's lead over the baseline by measure, with intervals",
        caption="All measures; a dot is hollow where the interval contains 0.",
    ),
)
