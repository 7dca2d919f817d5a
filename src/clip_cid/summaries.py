"""The summary of each stage's results: a small dataclass, kept as JSON in the stage's `manifest.json`.

A stage returns its summary; the pipeline records it, and the report, the model card and the ablations read
it. These types lie below all of them, because a stage reads only the files of others.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, Union

from clip_cid import units
from clip_cid.errors import RunError
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, DRAW, EMBED, EVALUATE, REPORT, TEXTS

_PREFIX = "prefix"  # of the keys of a dictionary that stands among the summary's own keys


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The main numbers of a finished stage.

    A field without a default is always in the JSON. A field with the default None is absent from it while it is None; a
    new field must be of this kind, so that older manifests stay readable.
    """

    stage: ClassVar[str]

    def __str__(self) -> str:
        """The one line that people ask for."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EmbedSummary(Summary):
    stage = EMBED

    images: int
    """Rows of the embedding store, the unusable ones included."""
    ok: int
    """Rows with an embedding."""
    dim: int
    teacher: str
    bytes: int
    skipped: dict[str, int]
    """Reason -> unusable rows."""
    images_per_s: float | None
    """None if the embeddings were made elsewhere."""
    views: int | None = None
    """Crops of each image that are embedded beside it; None without any."""
    without_caption: int | None = None
    """Of the rows with an embedding those without a caption; absent if there are none."""

    def __str__(self) -> str:
        alone = f", {self.without_caption:,} without a caption" if self.without_caption else ""
        views = f", with {self.views:,} views of each" if self.views else ""
        reasons = ", ".join(f"{count:,} for {reason!r}" for reason, count in self.skipped.items() if count)
        left_out = f"; left out, as skipped.jsonl lists: {reasons}" if reasons else ""
        return f"{self.ok:,} of {self.images:,} images embedded in {self.dim} dimensions{alone}{views}{left_out}"


@dataclass(frozen=True, kw_only=True)
class Giant:
    """A large set of chained images, many of which are far from the kept one."""

    set: int
    """Its number in `set_of.npy`."""
    size: int
    share_of_rows: float
    beyond_threshold_share: float
    """Share of its removed images that are farther from the kept one than the threshold."""
    farthest: float
    """Distance from the kept image to the farthest other one."""
    widest: float
    """Distance between the two images that are farthest apart."""


@dataclass(frozen=True, kw_only=True)
class Chains:
    """How much chaining there is: a set joined link by link may hold images that are far apart."""

    beyond_threshold_share: float
    """Share of the removed images that are farther from the kept one than the threshold."""
    distance: dict[str, float]
    """Quantile -> distance of removed images to the kept one; empty when none was removed."""
    largest: int
    top_sizes: list[int]
    giants: list[Giant]
    """Largest first."""


@dataclass(frozen=True, kw_only=True)
class KindShare:
    """Removed images of one kind, among those whose kind is known."""

    images: int
    share: float | None
    """None if no kind is known."""
    low: float
    """The 95 % Wilson interval of the share."""
    high: float


@dataclass(frozen=True, kw_only=True)
class KindShares:
    """The kinds of removed duplicates, by the pixels of a sample."""

    drawn: int
    unknown: int
    """Drawn images whose picture, or whose kept picture, cannot be read."""
    perceptual: KindShare
    semantic: KindShare


@dataclass(frozen=True, kw_only=True)
class BalanceTruth:
    """The sets against the groups that the data names."""

    field: str
    precision: float
    recall: float
    redundant_share: float
    """Share of the images that repeat another one by the data's own groups."""


@dataclass(frozen=True, kw_only=True)
class AgainstSet:
    """What the comparison with an evaluation set came to."""

    name: str
    images: int
    """Of the set, compared."""
    unreadable: int
    """Of the set, not compared."""
    near: int
    """Rows within the threshold of one of its images, which were removed."""


@dataclass(frozen=True, kw_only=True)
class BalanceSummary(Summary):
    stage = BALANCE

    images: int
    ok: int
    kept: int
    removed: int
    removed_share: float
    """Of the images with an embedding."""
    sets_with_duplicates: int
    largest_set: int
    from_: str | None = None
    """Where the kept rows were made elsewhere: their file. The fields below are then absent."""
    threshold: dict[str, float] | None = None
    """Metric -> the threshold on its scale."""
    chains: Chains | None = None
    kinds: KindShares | None = None
    truth: BalanceTruth | None = None
    against: list[AgainstSet] | None = None
    """The comparisons with evaluation sets; absent where there was none."""

    def __str__(self) -> str:
        counts = f"{self.ok:,} images -> {self.kept:,} kept ({units.percent(self.removed_share)} removed)"
        if self.truth is None:
            return counts
        return f"{counts}, pair precision {self.truth.precision:.3f}, recall {self.truth.recall:.3f}"


@dataclass(frozen=True, kw_only=True)
class KmeansRound:
    """A round of k-means, over its training sample."""

    objective: float
    """Mean squared distance to the nearest center, with the centers the round began with."""
    imbalance: float
    """1 is even: the mean size of an image's cluster over the mean size."""
    empty: float
    """Clusters without an image."""


@dataclass(frozen=True, kw_only=True)
class ClusterTruth:
    """The purity of the clusters by the classes that the data names."""

    field: str
    share: float
    """Share of the images that have the most frequent class of their cluster."""
    shuffled: float
    """The same with classes assigned to the images at random."""
    rows: int
    """Images whose class is known."""
    classes: int


@dataclass(frozen=True, kw_only=True)
class TextClusters:
    """The clusters of the captions, as `ClusterSummary` has those of the images."""

    texts: int
    centers: int
    empty: int
    singletons: int
    smallest: int
    median: float
    largest: int
    gini: float
    size_quantiles: dict[str, int]
    within_cosine: float | None
    all_pairs_cosine: float | None
    margin_quantiles: dict[str, float]
    margin_sample: int
    objective: float | None = None
    history: list[KmeansRound] | None = None


@dataclass(frozen=True, kw_only=True)
class ClusterSummary(Summary):
    stage = CLUSTER

    images: int
    centers: int
    empty: int
    singletons: int
    smallest: int
    median: float
    largest: int
    gini: float
    """Gini coefficient of the sizes: 0 is even, 1 is all images in one cluster."""
    size_quantiles: dict[str, int]
    within_cosine: float | None
    """Mean over the pairs of images in one cluster; None if no cluster holds two."""
    all_pairs_cosine: float | None
    margin_quantiles: dict[str, float]
    margin_sample: int
    from_: str | None = None
    """Where the clusters were made elsewhere: their folder. Objective and history are then absent."""
    objective: float | None = None
    history: list[KmeansRound] | None = None
    truth: ClusterTruth | None = None
    texts: TextClusters | None = None
    """With `cluster.texts`."""

    def __str__(self) -> str:
        of_texts = "" if self.texts is None else f", {self.texts.texts:,} texts in {self.texts.centers:,}"
        return f"{self.images:,} images in {self.centers:,} clusters{of_texts}"


@dataclass(frozen=True, kw_only=True)
class TextsSummary(Summary):
    stage = TEXTS

    texts: int
    dim: int
    teacher: str
    empty: int
    """Lines without a text."""
    repeated: int
    """Lines whose text an earlier one has."""
    truncated: int
    """Texts that are longer than the teacher's context."""

    def __str__(self) -> str:
        return f"{self.texts:,} texts embedded in {self.dim} dimensions"


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers in the towers of the student."""

    image: int
    text: int
    """All that is not the image tower's."""


@dataclass(frozen=True, kw_only=True)
class DistillSummary(Summary):
    stage = DISTILL

    steps: int
    pairs: int
    """Pairs to train on."""
    epoch_pairs: int | None = None
    """How many of them an epoch has, where a cluster gives few (`distill.per_cluster`)."""
    pairs_seen: int
    epochs: float
    unreadable_pairs: int
    skipped_steps: int
    texts_seen: int | None = None
    """Texts of `distill.texts`, beside the captions; absent without them."""
    processes: int
    seconds: float
    pairs_per_s: float
    data_wait_share: float
    losses: dict[str, float | None] = field(metadata={_PREFIX: "loss"})
    """`loss` and its parts, `loss/clip` and so on, of the last line of `metrics.jsonl`; None if not finite."""
    weights: dict[str, float | None] = field(default_factory=dict[str, float | None], metadata={_PREFIX: "weight/"})
    """`weight/clip` and so on of the last line, where the weights follow the gradients."""
    best_step: int | None = None
    """The step of the best student, with the number by which it is the best."""
    best_retrieval: float | None = None
    best_zero_shot: float | None = None
    best_loss: float | None = None
    collapse_alarm: bool
    precision: str
    peak_memory_gib: float
    peak_device_memory_gib: float | None = None
    head_scale: float | None = None
    """sigma; absent without clusters."""
    teacher_perplexity: float | None = None
    parameters: Parameters
    device: str

    def __str__(self) -> str:
        return f"{self.steps:,} steps, {self.pairs_seen:,} pairs seen"


@dataclass(frozen=True)
class Latency:
    """The time of a batch, in milliseconds."""

    batch: int
    image_ms: float
    text_ms: float


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a model takes: parameters, floating-point operations, and time on one machine."""

    model: str
    key: str
    """Of its weights and of the machine: equal keys need no new measurement."""
    machine: str
    image_parameters: int
    text_parameters: int
    image_flops: int | None
    """Of the forward pass of an image; None if a part of the model cannot be counted."""
    text_flops: int | None
    latency: list[Latency]
    """By batch; one that does not fit into the memory is absent."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSummary(Summary):
    stage = EVALUATE

    models: dict[str, dict[str, float | None]]
    """Model -> mean score by task; None if it was not measured on all sets."""
    mean_of: dict[str, str]
    """Task -> over how many sets, as `2/4`."""
    missing: dict[str, str]
    """Set -> why it was not measured."""
    headline: str
    costs: list[ModelCost] | None = None
    """Of each model; None in results of before it was measured."""

    def __str__(self) -> str:
        return self.headline


@dataclass(frozen=True, kw_only=True)
class DrawSummary(Summary):
    stage = DRAW

    figures: dict[str, Any]
    """Figure -> the numbers in its caption."""
    left_out: dict[str, str]
    """Figure -> why it was not drawn."""

    def __str__(self) -> str:
        return f"{len(self.figures)} figures"


@dataclass(frozen=True, kw_only=True)
class ReportSummary(Summary):
    stage = REPORT

    page: str
    """Its place in the run folder; earlier versions wrote the whole path."""
    bytes: int
    picture_bytes: int
    no_pictures: str | None
    """Why the page has no pictures, if it has none."""

    def __str__(self) -> str:
        return self.page


AnySummary = TypeVar("AnySummary", bound=Summary)


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain values, in the order of its fields."""
    return _plain(summary)


def read_summary(kind: type[AnySummary], values: dict[str, Any]) -> AnySummary:
    """The summary in a stage's manifest; keys that this version does not know are ignored.

    Raises:
        RunError: It is of another version: a number is missing.
    """
    try:
        return _typed(kind, values)
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(
            f"the summary of the {kind.stage} stage is not of this version ({type(error).__name__}: {error}).",
            fix=f"Run `clip-cid {kind.stage} RUN --force` to make the stage again.",
        ) from error


def costs_in(values: dict[str, Any]) -> list[ModelCost]:
    """The costs in the summary of an evaluation; none in one of an older version.

    Raises:
        RunError: They are of another version.
    """
    try:
        return [_typed(ModelCost, cost) for cost in values.get("costs") or []]
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(
            f"the costs in the summary of the {EVALUATE} stage are not of this version ({error}).",
            fix=f"Run `clip-cid {EVALUATE} RUN --force` to make the stage again.",
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if not dataclasses.is_dataclass(value):
        return value
    plain: dict[str, Any] = {}
    for part in dataclasses.fields(value):
        entry = getattr(value, part.name)
        if _PREFIX in part.metadata:
            plain |= entry
        elif entry is not None or part.default is dataclasses.MISSING:
            plain[_key(part)] = _plain(entry)
    return plain


def _typed(kind: Any, value: Any) -> Any:
    """A plain value as `kind`: a dataclass, a list of them, either or None, or what needs no change."""
    if value is None:
        return None
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value)
    if typing.get_origin(kind) in (Union, types.UnionType):
        (kind,) = (choice for choice in typing.get_args(kind) if choice is not types.NoneType)
        return _typed(kind, value)
    if typing.get_origin(kind) is list:
        return [_typed(typing.get_args(kind)[0], entry) for entry in value]
    return value


def _dataclass(kind: Any, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for part in dataclasses.fields(kind):
        if prefix := part.metadata.get(_PREFIX):
            arguments[part.name] = {key: value for key, value in values.items() if key.startswith(prefix)}
        elif part.default is dataclasses.MISSING or _key(part) in values:
            arguments[part.name] = _typed(hints[part.name], values[_key(part)])
    return kind(**arguments)


def _key(part: "dataclasses.Field[Any]") -> str:
    return part.name.removesuffix("_")  # `from` is a word of Python
