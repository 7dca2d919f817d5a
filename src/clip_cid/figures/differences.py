"""How far the student is ahead of another model on the same images, with the interval that the evaluation found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid.errors import DataError
from clip_cid.figures import style
from clip_cid.run_folder import read_json

TASKS = {
    "zero_shot": "Zero-shot",
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbors",
    "retrieval": "Retrieval",
}
"""Every way to measure -> its name in words; `evaluate/` holds a table for each that was used."""
MEAN = "mean"
_STUDENT = "student"


@dataclass(frozen=True)
class Difference:
    """Student minus `other`, a share of 1, with the 95 % interval of a paired bootstrap."""

    task: str
    set: str
    """A set, or the title of a group of them (`mean of 3/14`), which has the metric `mean`."""
    metric: str
    other: str
    difference: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out, so that these images tell the two models apart."""
        return self.low > 0 or self.high < 0


class Differences(Sequence[Difference]):
    """Those of one evaluation."""

    def __init__(self, found: Sequence[Difference]) -> None:
        self._found = list(found)
        self._by_place = {(one.task, one.set, one.metric, one.other): one for one in self._found}

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    def of(self, task: str, set: str, metric: str, other: str) -> Difference | None:
        return self._by_place.get((task, set, metric, other))

    def headlines(self, other: str) -> list[Difference]:
        """One or a few for each task: the mean of the first group of sets, and each retrieval's R@1."""
        found: list[Difference] = []
        for task in TASKS:
            own = [one for one in self._found if one.task == task and one.other == other]
            found += [one for one in own if one.metric == MEAN][:1]
            found += [one for one in own if task == "retrieval" and one.metric.endswith("R@1")]
        return found


def read_table(evaluate: Path, task: str) -> dict[str, Any] | None:
    """The table of a task as the evaluate stage wrote it; None where the task was not asked for."""
    path = evaluate / f"{task}.json"
    return read_json(path) if path.is_file() else None


def read_differences(evaluate: Path) -> Differences:
    """What the tables of an `evaluate/` folder say of the student and each other model.

    Raises:
        DataError: A table holds something else.
    """
    found: list[Difference] = []
    for task in TASKS:
        try:
            found += _of_table(task, read_table(evaluate, task) or {})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{evaluate / task}.json: not a table of scores ({type(error).__name__}: {error}).",
                fix=f"Run `clip-cid evaluate {evaluate.parent} --force` to make the stage again.",
            ) from error
    return Differences(found)


def _of_table(task: str, table: dict[str, Any]) -> Iterator[Difference]:
    for line in table.get("differences", ()):
        if line["model"] == _STUDENT:
            place = line["group"] if "group" in line else line["set"]
            numbers = (float(line[name]) for name in ("difference", "low", "high"))
            yield Difference(task, place, line["metric"], line["other"], *numbers)


def points(one: Difference) -> tuple[str, str, str]:
    """The difference and the ends of its interval, in points with their signs."""
    return style.signed_points(one.difference), style.signed_points(one.low), style.signed_points(one.high)
