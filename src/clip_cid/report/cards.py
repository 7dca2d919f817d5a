"""The facts at the head of the page."""

from dataclasses import dataclass

from clip_cid import units
from clip_cid.models.public_names import public_name
from clip_cid.models.references import LOCAL, RUN
from clip_cid.recipe import Recipe
from clip_cid.report.run_records import RunRecords
from clip_cid.summaries import BalanceSummary


@dataclass(frozen=True)
class Card:
    """One fact."""

    label: str
    value: str
    note: str = ""


def cards(records: RunRecords, recipe: Recipe) -> list[Card]:
    """Data, teacher, student and time."""
    embed, distill = records.embed, records.distill
    shown: list[Card] = []
    if records.balance is not None:
        shown += balance_cards(records.balance, recipe)
    elif embed is not None:
        shown.append(Card("pairs in", f"{embed.images:,}", f"{embed.ok:,} usable, none removed"))

    if recipe.has_teacher:
        teacher = recipe.embed.teacher if recipe.embed.existing is None else str(recipe.embed.existing)
        dim = embed.dim if embed is not None else "?"
        shown.append(Card("teacher", _short_name(teacher), f"{dim} dimensions"))
    if embed is None and distill is not None:
        shown.append(Card("pairs in", f"{distill.pairs:,}", "plain CLIP training, without a teacher"))
    if distill is not None:
        length = f"{distill.steps:,} steps, {distill.pairs_seen:,} pairs seen"
        shown.append(Card("student", _short_name(recipe.distill.student), length))

    stages = records.by_stage.values()
    slowest = max(stages, key=lambda record: record.seconds)
    note = f"{units.duration(slowest.seconds)} of it {slowest.stage}, on {slowest.device}"
    return [*shown, Card("wall time", units.duration(sum(record.seconds for record in stages)), note)]


def balance_cards(balance: BalanceSummary, recipe: Recipe) -> list[Card]:
    """What went into the balance, what is left, and the threshold."""
    skipped = balance.images - balance.ok
    shown = [
        Card("pairs in", f"{balance.images:,}", f"{skipped:,} skipped" if skipped else "all usable"),
        Card("kept", f"{balance.kept:,}"),
        Card("removed", f"{balance.removed:,}", f"{units.percent(balance.removed_share)} of the usable ones"),
        Card(
            "sets of duplicates",
            f"{balance.sets_with_duplicates:,}",
            f"the largest has {balance.largest_set:,} images",
        ),
    ]
    if balance.threshold is None:
        return [*shown, Card("threshold", "none", "the kept rows were made elsewhere")]

    scales = {name.replace("_", " "): f"{value:.4g}" for name, value in balance.threshold.items()}
    chosen = recipe.balance.metric.replace("_", " ")
    others = ", ".join(f"{value} {name}" for name, value in scales.items() if name != chosen)
    return [*shown, Card(f"threshold, {chosen}", scales[chosen], f"= {others}")]


def _short_name(reference: str) -> str:
    """The last part of a path or of a reference to one."""
    return public_name(reference).split("/")[-1].removeprefix(RUN).removeprefix(LOCAL)
