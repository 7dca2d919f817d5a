"""Stage `draw`: the figures of a run, each with its CSV; a figure without input is left out and named."""

from pathlib import Path
from typing import Any

from clip_cid import log
from clip_cid.recipe import Recipe
from clip_cid.report.drawing.all_figures import FIGURES
from clip_cid.report.drawing.run_inputs import RunInputs
from clip_cid.report.drawing.stored_inputs import LeftOut
from clip_cid.run_folder import RunFolder
from clip_cid.summaries import DrawSummary


def run(folder: RunFolder, out: Path, recipe: Recipe) -> DrawSummary:
    """Draw every figure that the run has files for."""
    inputs = RunInputs(folder, recipe)
    numbers: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with log.progress("draw", len(FIGURES), unit="figures") as bar:
        for figure in FIGURES:
            try:
                numbers[figure.name] = figure.draw(inputs, out)
            except LeftOut as reason:
                left_out[figure.name] = str(reason)
            bar.advance(note=figure.name)

    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, why in left_out.items() if why == reason)
        log.info(f"draw      no {names}: {reason}")
    return DrawSummary(figures=numbers, left_out=left_out)
