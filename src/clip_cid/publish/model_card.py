"""The model card of a finished student, filled from the records of its run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup

from clip_cid import log, units
from clip_cid.errors import RunError
from clip_cid.evaluation.printed_tables import cost_lines, machines
from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.scores import (
    RESULTS,
    STUDENT,
    Score,
    TaskSummary,
    read_scores,
    read_task_summaries,
    score_rows,
)
from clip_cid.models.public_names import PublicWords, public_name, public_provenance
from clip_cid.models.references import CONFIG_FILE
from clip_cid.recipe import OWN_TEXT_TOWER, as_yaml
from clip_cid.run_folder import RunFolder, StageRecord, read_json
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, EMBED, EVALUATE
from clip_cid.summaries import BalanceSummary, ClusterSummary, DistillSummary, EmbedSummary, costs_in, read_summary

_SETTINGS = (
    *("batch_size", "lr", "warmup_steps", "weight_decay", "ema_decay", "lock", "temperature", "sample_rate"),
    *("alignment", "seed"),
)
# Characters with a meaning in Markdown, in HTML inside it, or in its automatic links. As entities they have none,
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

    Every number comes from the records of the run. A stage that ran again after the training does not
    describe the student; it is left out with a warning. So is an evaluation of another student.

    Args:
        run: Its distill stage must have finished.
        repo: `ORG/NAME` on the Hub, for the lines to paste.
        license: A license identifier of the Hub; None leaves it unsaid.

    Raises:
        RunError: The distill stage has not finished, or a record cannot be read.
        DataError: The results of the evaluation cannot be read.
    """
    student = run.stage(DISTILL) / "student"
    config = read_json(student / CONFIG_FILE)
    records, words = _records(run), PublicWords(config["clip_cid"].get("recipe", {}), run.path)
    try:
        values = _values(repo, config, records, public_provenance(config["clip_cid"]), run.path / "evaluate")
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(
            f"{run.path}: its records are not of this version ({type(error).__name__}: {error}).",
            fix=f"Run `clip-cid distill {run.path} --force` with this version, or `clip-cid export` and write a card"
            " yourself.",
        ) from error
    return f"{_front_matter(license, distilled=values['teacher'] is not None)}\n{_render(values, words)}"


def markdown_text(value: object) -> str:
    """Any text as Markdown that shows it as it is, in one line of a table cell."""
    if isinstance(value, Markup):
        return str(value)
    text = " ".join(str(value).split())
    return _SPECIAL.sub(lambda special: f"&#{ord(special[0])};", text)


def _front_matter(license: str | None, *, distilled: bool) -> str:
    data = ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        license=license,
        tags=["clip", "clip-cid", *(["distillation"] if distilled else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _render(values: Mapping[str, Any], words: PublicWords) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clip_cid", "publish"),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: markdown_text(words(value) if type(value) is str else value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"verbatim": Markup, "cost_lines": cost_lines, "machines": machines}
    text = environment.get_template("model_card.md").render(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def _records(run: RunFolder) -> dict[str, StageRecord]:
    """The stages this student comes from, and its evaluation."""
    distill = run.record(DISTILL)
    assert distill is not None  # the caller has asked for its folder
    records = {DISTILL: distill}
    for stage in (EMBED, BALANCE, CLUSTER, EVALUATE):
        record = run.record(stage)
        if record is None:
            continue
        belongs = (
            record.inputs.get(DISTILL) == distill.results
            if stage == EVALUATE
            else distill.inputs.get(stage) == record.results
        )
        if belongs:
            records[stage] = record
        elif stage in distill.inputs or stage == EVALUATE:
            log.warn(f"{run.path}: {stage} does not belong to this student any more; the model card leaves it out")
    return records


def _values(
    repo: str, config: dict[str, Any], records: dict[str, StageRecord], provenance: dict[str, Any], evaluate: Path
) -> dict[str, Any]:
    recipe, record = provenance["recipe"], records[DISTILL]
    distill = read_summary(DistillSummary, record.summary)
    text = as_yaml(recipe).rstrip()
    longest_fence = max((len(run) for run in re.findall(r"`+", text)), default=0)
    scores = _scores(evaluate) if EVALUATE in records else []

    return {
        "name": repo.rpartition("/")[2],
        "repo": repo,
        "architecture": recipe["distill"]["student"],
        "teacher": provenance["teacher"],
        "dim": config["model_cfg"]["embed_dim"],
        "model": _model(config, provenance, distill),
        "data": _data(records, distill),
        "balanced": BALANCE in records,
        "training": _training(recipe["distill"], distill, record.device),
        "weights": [(name, f"{weight:g}") for name, weight in recipe["distill"]["weights"].items() if weight],
        "scores": scores,
        "compared": _compared(records.get(EVALUATE), scores),
        "costs": costs_in(records[EVALUATE].summary) if scores else [],
        "versions": list(record.versions.items()),
        "recipe": text,
        "fence": "`" * max(3, longest_fence + 1),
    }


def _model(config: dict[str, Any], provenance: dict[str, Any], distill: DistillSummary) -> list[tuple[str, str]]:
    size, teacher = config["preprocess_cfg"]["size"], provenance["teacher"]
    rows = [
        ("architecture", provenance["recipe"]["distill"]["student"]),
        ("parameters of the image tower", f"{distill.parameters.image:,}"),
        ("parameters of the text tower", f"{distill.parameters.text:,}"),
        ("width of the embeddings", f"{config['model_cfg']['embed_dim']:,}"),
        ("image size", " x ".join(map(str, size if isinstance(size, list) else [size, size]))),
        ("context length", f"{config['model_cfg']['text_cfg'].get('context_length', 77)} tokens"),
    ]
    if provenance["recipe"]["distill"].get("text_tower", OWN_TEXT_TOWER) != OWN_TEXT_TOWER:
        rows.append(("text tower", "the teacher's, as it was; only the image tower was trained"))
    if teacher is None:
        return [*rows, ("teacher", "none")]
    digest = teacher.get("weights_sha256", "not recorded")
    return [*rows, ("teacher", _reference(teacher["reference"])), ("SHA-256 of the teacher's weights", digest)]


def _data(records: dict[str, StageRecord], distill: DistillSummary) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if EMBED in records:
        embed = read_summary(EmbedSummary, records[EMBED].summary)
        rows += [("image-text pairs", f"{embed.images:,}"), ("of them usable", f"{embed.ok:,}")]
        if embed.views:
            rows.append(("embedded crops of an image, one of which it saw in an epoch", f"{embed.views:,}"))

    if BALANCE in records:
        balance = read_summary(BalanceSummary, records[BALANCE].summary)
        thresholds = (balance.threshold or {}).items()
        scales = [f"{value:.4g} ({name.replace('_', ' ')})" for name, value in thresholds]
        rows += [
            ("threshold of near-duplicates", " = ".join(scales) or "none; the kept rows were made elsewhere"),
            ("near-duplicates removed", f"{balance.removed:,} ({units.percent(balance.removed_share)})"),
            ("kept", f"{balance.kept:,}"),
            ("compared with evaluation sets", _against(balance)),
        ]

    if CLUSTER in records:
        clusters = read_summary(ClusterSummary, records[CLUSTER].summary).centers
        rows.append(("clusters of the kept images", f"{clusters:,}"))
    return [*rows, ("pairs trained on", f"{distill.pairs:,}")]


def _against(balance: BalanceSummary) -> str:
    """Which evaluation sets the training images were compared with, and what was removed for them."""
    if balance.against is None:
        return "none; near-duplicates of test images may be among the training images"
    return "; ".join(f"{one.name}: {one.near:,} images near one of {one.images:,} removed" for one in balance.against)


def _training(settings: dict[str, Any], distill: DistillSummary, device: str) -> list[tuple[str, str]]:
    passes = ("passes over the pairs", f"{distill.epochs:.4g}")
    if distill.epoch_pairs is not None:
        few = f"{distill.epoch_pairs:,} pairs each, at most {settings['per_cluster']:,} of a cluster"
        passes = ("epochs", f"{distill.epochs:.4g} of {few}")
    rows = [("steps", f"{distill.steps:,}"), ("pairs seen", f"{distill.pairs_seen:,}"), passes]
    rows += [(name.replace("_", " "), str(settings[name])) for name in _SETTINGS if settings.get(name) is not None]
    if settings.get("schedule"):
        rows.append(("weights of the losses", "follow the schedule in the recipe below"))
    if distill.weights:
        known = {name.removeprefix("weight/"): weight for name, weight in distill.weights.items() if weight is not None}
        last = ", ".join(f"{name} {weight:.3g}" for name, weight in known.items())
        rows.append(("weights above", f"are proportions of the gradients; in the last step they meant {last}"))
    if settings.get("merged_captions"):
        rows.append(("captions read", "of each pair, and of the near-duplicates that were removed for it"))
    if distill.head_scale is not None:
        rows.append(("scale of the cluster logits (sigma)", f"{distill.head_scale:.4g}"))
    if settings.get("pretrained"):
        rows.append(("started from", settings["pretrained"]))
    return [*rows, ("arithmetic", f"{distill.precision} on {device}")]


def _compared(evaluate: StageRecord | None, scores: Sequence[_Table]) -> list[tuple[str, str]]:
    if evaluate is None or not scores:
        return []
    models = evaluate.settings["evaluate"]["compare"]
    return [(name, _reference(public_name(reference))) for name, reference in models.items()]


def _reference(reference: str) -> str:
    """A model as `public_name` gives it, with a note for the two schemes that are not on the Hub."""
    return f"{reference} (a model of the author's own)" if reference.startswith(("run:", "local-dir:")) else reference


def _scores(evaluate: Path) -> list[_Table]:
    """One table a protocol: a line for each set and metric, a column for each model."""
    scores, summaries = read_scores(evaluate / RESULTS), read_task_summaries(evaluate)
    tables: list[_Table] = []
    for task in PROTOCOLS:
        if own := [score for score in scores if score.task == task]:
            tables.append(_table(own, summaries.get(task)))
    return tables


def _table(scores: Sequence[Score], summary: TaskSummary | None) -> _Table:
    models = sorted(dict.fromkeys(score.model for score in scores), key=lambda model: model != STUDENT)
    rows = [
        [row.set, row.metric.replace("_", " "), f"{row.any.n:,}", units.in_percent(row.any.chance)]
        + [_interval(row.by_model.get(model)) for model in models]
        for row in score_rows(scores)
    ]
    missing = ", ".join(summary.missing) if summary else ""
    return _Table(PROTOCOLS[scores[0].task].title, ["set", "metric", "n", "chance", *models], rows, missing)


def _interval(score: Score | None) -> str:
    return (
        "-"
        if score is None
        else f"{units.in_percent(score.score)} [{units.in_percent(score.low)}, {units.in_percent(score.high)}]"
    )
