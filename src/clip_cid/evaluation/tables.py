"""Results row by row -> one table a task, models by sets, with means that say over how many sets they are."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

MEAN_RECALL = "mean_recall"


def score_table(rows: Sequence[Row], task: str, *, asked: Sequence[str], missing: Mapping[str, str]) -> Row:
    """The scores of `zero_shot` or `linear_probe`.

    Args:
        rows: Results of all tasks.
        task: Which of them to take.
        asked: Every set the recipe names.
        missing: The sets that gave no result, with the reason.
    """
    chosen = [row for row in rows if row["task"] == task]
    scores: dict[str, dict[str, float]] = {}
    for row in chosen:
        scores.setdefault(row["model"], {})[row["set"]] = row["score"]
    about = {row["set"]: {key: row[key] for key in ("metric", "classes", "chance", "n")} for row in chosen}
    return _table(task, about, scores, {name: _mean(by_set) for name, by_set in scores.items()}, asked, missing)


def retrieval_table(rows: Sequence[Row], *, asked: Sequence[str], missing: Mapping[str, str]) -> Row:
    """Every recall, and for each set their mean over depths and directions (`mean_recall`)."""
    chosen = [row for row in rows if row["task"] == "retrieval"]
    scores: dict[str, dict[str, dict[str, float]]] = {}
    about: dict[str, Row] = {}
    for row in chosen:
        scores.setdefault(row["model"], {}).setdefault(row["set"], {})[row["metric"]] = row["score"]
        about.setdefault(row["set"], {})[row["metric"]] = {"chance": row["chance"], "n": row["n"]}
    for by_set in scores.values():
        for recalls in by_set.values():
            recalls[MEAN_RECALL] = _mean(recalls)
    means = {name: _mean({set_: by[MEAN_RECALL] for set_, by in by_set.items()}) for name, by_set in scores.items()}
    return _table("retrieval", about, scores, means, asked, missing)


def score_lines(table: Row, models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines to print: sets down, models across; sets without a result stand below, then the means."""
    lines = [
        [name, about["metric"], percent(about["chance"])]
        + [percent(table["scores"].get(model, {}).get(name)) for model in models]
        for name, about in table["sets"].items()
    ]
    lines += [[name, "not measured", *("-" for _ in range(1 + len(models)))] for name in table["missing"]]
    means = [percent(table["mean"].get(model)) for model in models]
    return ["set", "metric", "chance", *models], [*lines, [f"mean of {table['mean_of']}", "", "", *means]]


def recall_lines(table: Row, models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines to print: a line for each set, direction and depth."""
    lines = [
        [name, metric, percent(value["chance"]), *(percent(table["scores"][model][name][metric]) for model in models)]
        for name, metrics in table["sets"].items()
        for metric, value in metrics.items()
    ]
    lines += [[name, "not measured", *("-" for _ in range(1 + len(models)))] for name in table["missing"]]
    return ["set", "metric", "chance", *models], lines


def percent(score: float | None) -> str:
    """A share as people read it; a dash where there is none."""
    return "-" if score is None else f"{100 * score:.1f}"


def _table(
    task: str,
    about: Row,
    scores: Mapping[str, Any],
    means: Mapping[str, float],
    asked: Sequence[str],
    missing: Mapping[str, str],
) -> Row:
    return {
        "task": task,
        "sets": about,
        "scores": dict(scores),
        "mean": dict(means),
        "mean_of": f"{len(about)}/{len(asked)}",
        "missing": {name: reason for name, reason in missing.items() if name in asked and name not in about},
    }


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
