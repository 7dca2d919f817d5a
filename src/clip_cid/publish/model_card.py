"""The model card of a finished student, filled from the records of its run."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData
from markupsafe import Markup

from clip_cid import log, units
from clip_cid.errors import DataError, RunError
from clip_cid.models.student import CONFIG_FILE
from clip_cid.publish.public_names import public_name, public_provenance
from clip_cid.run_folder import RunFolder, StageRecord, read_json

_STUDENT = "student"
_TASKS = {
    "zero_shot": "Zero-shot classification",
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbors",
    "retrieval": "Retrieval",
}
_SETTINGS = (
    *("batch_size", "lr", "warmup_steps", "weight_decay", "ema_decay", "lock", "temperature", "sample_rate"),
    *("alignment", "seed"),
)
# Characters that mean something to Markdown, to HTML inside it, or to its automatic links. As entities they mean nothing,
# whatever stands around them.
_SPECIAL = re.compile(r"[\\`*_\[\]<>#|~&$@]|:(?=//)")


@dataclass(frozen=True)
class _Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    missing: str


def model_card(run: RunFolder, repo: str, *, license: str | None) -> str:
    """The README.md of a finished student.

    Every number is read from the records of the run. A stage that was run again after the student was trained says
    nothing about it and is left out, with a warning; so is an evaluation of another student.

    Args:
        run: Its distill stage must have finished.
        repo: `ORG/NAME` on the Hub, for the lines to paste.
        license: A license identifier of the Hub; None leaves it unsaid.

    Raises:
        RunError: The distill stage has not finished, or a record cannot be read.
        DataError: The results of the evaluation cannot be read.
    """
    student = run.stage("distill") / "student"
    config = read_json(student / CONFIG_FILE)
    records = _records(run)
    try:
        values = _values(repo, config, records, public_provenance(config["clip_cid"]), run.path / "evaluate")
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(
            f"{run.path}: its records are not of this version ({type(error).__name__}: {error}).",
            fix=f"Run `clip-cid distill {run.path} --force` with this version, or `clip-cid export` and write a card yourself.",
        ) from error
    return f"{_front_matter(license, distilled=values['teacher'] is not None)}\n{_render(values)}"


def markdown_text(value: object) -> str:
    """Any text as Markdown that shows it as it is, in one line of a table cell."""
    if isinstance(value, Markup):
        return str(value)
    text = " ".join(str(value).split())
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text)


def _front_matter(license: str | None, *, distilled: bool) -> str:
    data = ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        license=license,
        tags=["clip", "clip-cid", *(["distillation"] if distilled else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _render(values: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clip_cid", "publish"),
        undefined=jinja2.StrictUndefined,
        finalize=markdown_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["verbatim"] = Markup
    text = environment.get_template("model_card.md").render(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def _records(run: RunFolder) -> dict[str, StageRecord]:
    """The stages this student comes from, and its own evaluation."""
    distill = run.record("distill")
    assert distill is not None  # the caller has asked for its folder
    records = {"distill": distill}
    for stage in ("embed", "balance", "cluster", "evaluate"):
        record = run.record(stage)
        if record is None:
            continue
        belongs = (
            record.inputs.get("distill") == distill.results
            if stage == "evaluate"
            else distill.inputs.get(stage) == record.results
        )
        if belongs:
            records[stage] = record
        elif stage in distill.inputs or stage == "evaluate":
            log.warn(f"{run.path}: {stage} does not belong to this student any more; the model card leaves it out")
    return records


def _values(
    repo: str, config: dict[str, Any], records: dict[str, StageRecord], provenance: dict[str, Any], evaluate: Path
) -> dict[str, Any]:
    recipe, distill = provenance["recipe"], records["distill"]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000).rstrip()
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    scores = _scores(evaluate) if "evaluate" in records else []
    return {
        "name": repo.rpartition("/")[2],
        "repo": repo,
        "architecture": recipe["distill"]["student"],
        "teacher": provenance["teacher"],
        "dim": config["model_cfg"]["embed_dim"],
        "model": _model(config, provenance, distill),
        "data": _data(records),
        "balanced": "balance" in records,
        "training": _training(recipe["distill"], distill),
        "weights": [(name, f"{weight:g}") for name, weight in recipe["distill"]["weights"].items() if weight],
        "scores": scores,
        "compared": _compared(records.get("evaluate"), scores),
        "versions": list(distill.versions.items()),
        "recipe": text,
        "fence": "`" * max(3, longest + 1),
    }


def _model(config: dict[str, Any], provenance: dict[str, Any], distill: StageRecord) -> list[tuple[str, str]]:
    parameters, teacher = distill.summary["parameters"], provenance["teacher"]
    size = config["preprocess_cfg"]["size"]
    rows = [
        ("architecture", provenance["recipe"]["distill"]["student"]),
        ("parameters of the image tower", f"{parameters['image']:,}"),
        ("parameters of the text tower", f"{parameters['text']:,}"),
        ("width of the embeddings", f"{config['model_cfg']['embed_dim']:,}"),
        ("image size", " x ".join(map(str, size if isinstance(size, list) else [size, size]))),
        ("context length", f"{config['model_cfg']['text_cfg'].get('context_length', 77)} tokens"),
    ]
    if teacher is None:
        return [*rows, ("teacher", "none")]
    digest = teacher.get("weights_sha256", "not recorded")
    return [*rows, ("teacher", _reference(teacher["reference"])), ("SHA-256 of the teacher's weights", digest)]


def _data(records: dict[str, StageRecord]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if "embed" in records:
        embed = records["embed"].summary
        rows += [("image-text pairs", f"{embed['images']:,}"), ("of them usable", f"{embed['ok']:,}")]
    if "balance" in records:
        balance = records["balance"].summary
        scales = [f"{value:.4g} ({name.replace('_', ' ')})" for name, value in balance.get("threshold", {}).items()]
        share = units.percent(balance["removed_share"])
        rows += [
            ("threshold of near-duplicates", " = ".join(scales) or "none; the kept rows were made elsewhere"),
            ("near-duplicates removed", f"{balance['removed']:,} ({share})"),
            ("kept", f"{balance['kept']:,}"),
        ]
    if "cluster" in records:
        rows.append(("clusters of the kept images", f"{records['cluster'].summary['centers']:,}"))
    return [*rows, ("pairs trained on", f"{records['distill'].summary['pairs']:,}")]


def _training(settings: dict[str, Any], distill: StageRecord) -> list[tuple[str, str]]:
    summary = distill.summary
    rows = [
        ("steps", f"{summary['steps']:,}"),
        ("pairs seen", f"{summary['pairs_seen']:,}"),
        ("passes over the pairs", f"{summary['epochs']:.4g}"),
    ]
    rows += [(name.replace("_", " "), str(settings[name])) for name in _SETTINGS if settings.get(name) is not None]
    if settings.get("schedule"):
        rows.append(("weights of the losses", "follow the schedule in the recipe below"))
    if "head_scale" in summary:
        rows.append(("scale of the cluster logits (sigma)", f"{summary['head_scale']:.4g}"))
    if settings.get("pretrained"):
        rows.append(("started from", settings["pretrained"]))
    return [*rows, ("arithmetic", f"{summary['precision']} on {distill.device}")]


def _compared(evaluate: StageRecord | None, scores: Sequence[_Table]) -> list[tuple[str, str]]:
    if evaluate is None or not scores:
        return []
    models = evaluate.settings["evaluate"]["compare"]
    return [(name, _reference(public_name(reference))) for name, reference in models.items()]


def _reference(reference: str) -> str:
    """A model as `public_name` gives it; readers cannot know that two of the schemes are not on the Hub."""
    return f"{reference} (a model of the author's own)" if reference.startswith(("run:", "local-dir:")) else reference


def _scores(folder: Path) -> list[_Table]:
    """One table a task: a line for each set and metric, a column for each model."""
    path = folder / "results.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        grouped = itertools.groupby(sorted(rows, key=lambda row: list(_TASKS).index(row["task"])), lambda r: r["task"])
        return [_table(task, list(found), folder) for task, found in grouped]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not the results of an evaluation ({error}).",
            fix=f"Run `clip-cid evaluate {folder.parent} --force` to make the stage again.",
        ) from error


def _table(task: str, rows: list[dict[str, Any]], folder: Path) -> _Table:
    models = sorted(dict.fromkeys(row["model"] for row in rows), key=lambda model: model != _STUDENT)
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["set"], row["metric"]), {})[row["model"]] = row
    cells = [
        [name, metric.replace("_", " "), f"{facts['n']:,}", units.in_percent(facts["chance"])]
        + [_interval(by_model.get(model)) for model in models]
        for (name, metric), by_model in lines.items()
        for facts in [next(iter(by_model.values()))]
    ]
    missing = ", ".join(read_json(folder / f"{task}.json")["missing"])
    return _Table(_TASKS[task], ["set", "metric", "n", "chance", *models], cells, missing)


def _interval(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{units.in_percent(row['score'])} [{units.in_percent(row['low'])}, {units.in_percent(row['high'])}]"
