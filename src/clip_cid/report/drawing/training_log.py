"""The log of a training, as columns."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clip_cid.errors import DataError
from clip_cid.figures import losses


def read_metrics(path: Path, *, grows: bool = False) -> dict[str, Float[np.ndarray, " lines"]]:
    """The columns of a metrics.jsonl: `step`, `loss`, its parts, `lr`, ...; a value a line lacks, or null, is NaN.

    A line with nothing but `val/` is a validation's, and may be of the same step as a training's.

    Args:
        path: The log.
        grows: A process may be writing its last line now: one that is not whole is left out.

    Raises:
        DataError: A line is not a JSON object, a loss is not finite, parts come or go, or the steps do not rise.
    """
    lines: list[dict[str, Any]] = []
    parts: set[str] | None = None
    last = {True: -math.inf, False: -math.inf}  # training, validation -> step
    content = path.read_bytes()
    whole = (content[: content.rfind(b"\n") + 1] if grows else content).decode()
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            values = {name: line[name] for name in line if losses.is_loss(name)}
            own = {name for name in values if not name.startswith(losses.VALIDATION)}
            step, trains = line["step"], bool(own)

            if not values or not all(value is None or math.isfinite(value) for value in values.values()):
                raise ValueError(f"step {step}, {values}")
            if step <= last[trains] or step < last[not trains]:
                raise ValueError(f"step {step}, after {max(last.values())}")
            if trains and own != (parts or own):
                raise ValueError(f"its parts are {', '.join(sorted(own))}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: not the losses of a later step ({error}).",
                fix=f"Run `clip-cid distill {path.parent.parent} --force` to make the stage again.",
            ) from error
        lines.append(line)
        last[trains] = step
        parts = own if trains else parts

    names = sorted({name for line in lines for name, value in line.items() if isinstance(value, int | float)})
    return {name: np.array([_number(line.get(name)) for line in lines]) for name in names}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
