"""Results row by row -> one table a task, models by sets, with means that say over how many sets they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_cid import units

Row = dict[str, Any]

MEAN_RECALL = "mean_recall"


@dataclass(frozen=True)
class Group:
    """Sets whose scores may be averaged: alike enough that one number over them means something."""

    name: str
    """Such as `CLIP's sets`; empty where there is only one group."""
    sets: tuple[str, ...]
    """Those of its sets that the recipe names."""
    of: int
    """How many sets it has in all, named in the recipe or not."""

    def title(self, measured: int) -> str:
        """`mean of 11/14`, never only `mean`."""
        return f"mean of {measured}/{self.of}" + (f" ({self.name})" if self.name else "")


def score_table(rows: Sequence[Row], task: str, *, groups: Sequence[Group], missing: Mapping[str, str]) -> Row:
    """The scores of `zero_shot`, `linear_probe` or `knn`, with a mean for every group; `mean` is that of the first that was measured.

    Args:
        rows: Results of all tasks.
        task: Which of them to take.
        groups: Every set the recipe names, by what may be averaged.
        missing: The sets that gave no result, with the reason.
    """
    chosen = [row for row in rows if row["task"] == task]
    scores: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for row in chosen:
        scores.setdefault(row["model"], {})[row["set"]] = row["score"]
        intervals.setdefault(row["model"], {})[row["set"]] = (row["low"], row["high"])
    facts = ("metric", "classes", "chance", "n", "variant")
    about = {row["set"]: {key: row[key] for key in facts} for row in chosen}
    means = [_group_mean(group, scores) for group in groups]
    asked = [name for group in groups for name in group.sets]
    measured = [mean for mean in means if mean["mean"]]
    head = [*measured, *means, {"mean": {}, "of": "0/0"}][0]
    table = _table(task, about, scores, head["mean"], head["of"], asked, missing)
    return {**table, "intervals": intervals, "groups": means}


def retrieval_table(rows: Sequence[Row], *, asked: Sequence[str], missing: Mapping[str, str]) -> Row:
    """Every recall, and for each set their mean over depths and directions (`mean_recall`)."""
    chosen = [row for row in rows if row["task"] == "retrieval"]
    scores: dict[str, dict[str, dict[str, float]]] = {}
    intervals: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    about: dict[str, Row] = {}
    for row in chosen:
        model, name = row["model"], row["set"]
        scores.setdefault(model, {}).setdefault(name, {})[row["metric"]] = row["score"]
        intervals.setdefault(model, {}).setdefault(name, {})[row["metric"]] = (row["low"], row["high"])
        about.setdefault(row["set"], {})[row["metric"]] = {"chance": row["chance"], "n": row["n"]}
    for by_set in scores.values():
        for recalls in by_set.values():
            recalls[MEAN_RECALL] = _mean(recalls)
    means = {name: _mean({set_: by[MEAN_RECALL] for set_, by in by_set.items()}) for name, by_set in scores.items()}
    table = _table("retrieval", about, scores, means, f"{len(about)}/{len(asked)}", asked, missing)
    return {**table, "intervals": intervals}


def score_lines(table: Row, models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines to print: sets down, models across; sets without a result stand below, then the means.

    A star stands at sets that are not as CLIP measured them; `variant_notes` says how they differ.
    """
    lines: list[list[str]] = []
    for name, about in table["sets"].items():
        of_set = [(table["scores"].get(model, {}).get(name), model) for model in models]
        cells = ["-" if score is None else _cell(score, table["intervals"][model][name]) for score, model in of_set]
        lines.append(
            [name + (" *" if about["variant"] else ""), about["metric"], units.in_percent(about["chance"]), *cells]
        )
    lines += [[name, "not measured", *("-" for _ in range(1 + len(models)))] for name in table["missing"]]
    for group in table["groups"]:
        star = " *" if any(table["sets"][name]["variant"] for name in group["sets"] if name in table["sets"]) else ""
        lines.append([group["title"] + star, "", "", *(units.in_percent(group["mean"].get(model)) for model in models)])
    return ["set", "metric", "chance", *models], lines


def variant_notes(tables: Mapping[str, Row]) -> list[str]:
    """What the stars of the printed tables stand for."""
    found: dict[str, str] = {}
    for table in tables.values():
        found |= {name: about["variant"] for name, about in table["sets"].items() if about.get("variant")}
    return [f"* {name}: {words}" for name, words in found.items()]


def same_class_lines(rows: Sequence[Row], models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines to print: each robustness set, and the model's accuracy on ImageNet's images of the same classes."""
    found = {(row["model"], row["set"]): row for row in rows if row.get("imagenet_same_classes") is not None}
    lines: list[list[str]] = []
    for name in dict.fromkeys(name for _, name in found):
        of_set = [found[model, name] for model in models]
        lines.append([name, "this set", *(units.in_percent(row["top1"]) for row in of_set)])
        lines.append(
            ["", "ImageNet, same classes", *(units.in_percent(row["imagenet_same_classes"]) for row in of_set)]
        )
    return ["set", "top1 on", *models], lines


def difference_lines(found: Sequence[Row], models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines to print: how far the first model is ahead of each other one, in points, with its interval."""
    first, *others = models
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in found:
        if row["model"] == first:
            points = [f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high")]
            place = (row.get("set") or row["group"], "" if "group" in row else row["metric"])
            lines.setdefault(place, {})[row["other"]] = f"{points[0]} ({points[1]} to {points[2]})"
    columns = ["set", "metric", *(f"{first} - {other}" for other in others)]
    return columns, [[*place, *(cells[other] for other in others)] for place, cells in lines.items()]


def recall_lines(table: Row, models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines to print: a line for each set, direction and depth."""
    lines = [
        [name, metric, units.in_percent(value["chance"])]
        + [_cell(table["scores"][model][name][metric], table["intervals"][model][name][metric]) for model in models]
        for name, metrics in table["sets"].items()
        for metric, value in metrics.items()
    ]
    lines += [[name, "not measured", *("-" for _ in range(1 + len(models)))] for name in table["missing"]]
    return ["set", "metric", "chance", *models], lines


def _cell(score: float, interval: tuple[float, float]) -> str:
    """A score and its interval in percent: `62.3 (60.1-64.5)`."""
    low, high = interval
    return f"{units.in_percent(score)} ({units.in_percent(low)}-{units.in_percent(high)})"


def _group_mean(group: Group, scores: Mapping[str, Mapping[str, float]]) -> Row:
    by_model = {model: [by_set[name] for name in group.sets if name in by_set] for model, by_set in scores.items()}
    measured = max((len(values) for values in by_model.values()), default=0)
    means = {model: sum(values) / len(values) for model, values in by_model.items() if values}
    return {"title": group.title(measured), "of": f"{measured}/{group.of}", "sets": list(group.sets), "mean": means}


def _table(
    task: str,
    about: Row,
    scores: Mapping[str, Any],
    means: Mapping[str, float],
    mean_of: str,
    asked: Sequence[str],
    missing: Mapping[str, str],
) -> Row:
    return {
        "task": task,
        "sets": about,
        "scores": dict(scores),
        "mean": dict(means),
        "mean_of": mean_of,
        "missing": {name: reason for name, reason in missing.items() if name in asked and name not in about},
    }


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
