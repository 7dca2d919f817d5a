"""Every setting of every stage, with its limits and its default: the paper's, or `auto` where that is for 64 GPUs.

A recipe is a YAML file of these sections; flags of the same dotted names override it. Settings in
`machine` change how fast a result is made, but not the result, and never make a stage stale.

The docstring of a setting is its help: `clip-cid init` and `--help` print it.
"""

import difflib
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from clip_cid import os_errors, plain_yaml, units
from clip_cid.addresses import is_remote, path_of, without_secrets
from clip_cid.errors import ConfigError
from clip_cid.loss_table import LOSSES, Reading, rows_of
from clip_cid.stage_names import BALANCE, CLUSTER, EMBED, EVALUATE, TEXTS

Share = Annotated[float, Field(ge=0, le=1)]
Metric = Literal["cosine", "squared_euclidean", "euclidean"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
AUTO: Literal["auto"] = "auto"
"""A number that is chosen by the number of pairs, when the stage begins (`auto_numbers`)."""
_NUMBER_OR_AUTO, _LITERAL_AUTO = "constrained-int", "literal['auto']"  # as pydantic names the two
_PositiveOrAuto = PositiveInt | Literal["auto"]
ALLOW_PIPE = "CLIP_CID_ALLOW_PIPE"
"""The environment variable that lets a source `pipe:COMMAND` run its command: a recipe may be somebody else's."""
_MOST_PROBLEMS = 20  # that a message names
STUDENT = "student"
"""The name of a run's own model among those it compares."""
OWN_TEXT_TOWER, TEACHERS_TEXT_TOWER = "own", "teacher"
"""The values of `distill.text_tower` that name no model."""
LARGEST_FILE = "largest_file"
KEEP_RULES = ("nearest_centroid", "best_caption", "most_pixels", LARGEST_FILE)
"""The rules of `balance.keep` that name no field."""
OF_FIELD = "field:"
STORE_COLUMNS = ("key", "caption", "captions", "ok", "width", "height")
"""Columns that an embedding store has of its own."""
_LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


class _Removed(NamedTuple):
    """A setting of an earlier version."""

    hint: str
    without_effect: tuple[Any, ...]
    """The values that change nothing."""


_REMOVED = {
    "cluster.algorithm": _Removed("only one k-means is left, so delete this line of the recipe", ("faiss", "blocks")),
    "machine.fsdp": _Removed("each device holds the whole student, so delete this line of the recipe", (False,)),
}
_LIST_OF_KEYS = ".txt"
AUGMENTATIONS = ("color_jitter", "color_jitter_prob", "gray_scale_prob")


class Config(BaseModel):
    """A section: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    at_addresses: ClassVar[tuple[str, ...]] = ()
    """The paths that may also be addresses."""

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_stored(cls, value: Any, info: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > 63:
            raise PydanticCustomError("too_large", "input should fit into 64 bits")
        if any(re.search(r"[\0\ud800-\udfff]", text) for text in _texts_in(value)):
            raise PydanticCustomError("not_text", "input should be text without zero bytes, in UTF-8")
        address = os_errors.address_of(value) if isinstance(value, Path) else ""
        if address and not (info.field_name in cls.at_addresses and is_remote(address)):
            raise PydanticCustomError("address", "input should be a path on this machine, not {it}", {"it": address})
        return value


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = tuple(cast(dict[Any, Any], value).items())
    if isinstance(value, tuple):
        for part in cast(tuple[Any, ...], value):
            yield from _texts_in(part)
    elif isinstance(value, str | Path):
        yield str(value)


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _each_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted(value for value, times in Counter(values).items() if times > 1):
        raise PydanticCustomError("twice", "{names} is named twice", {"names": ", ".join(twice)})
    return values


def _not_taken(values: tuple[str, ...]) -> tuple[str, ...]:
    if taken := sorted(set(values) & set(STORE_COLUMNS)):
        raise PydanticCustomError(
            "taken", "{names} would hide a column the store has of its own", {"names": ", ".join(taken)}
        )
    return values


def _keep_rules(values: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [value for value in values if value not in KEEP_RULES and not value.startswith(OF_FIELD)]
    if unknown:
        raise PydanticCustomError(
            "keep",
            "a rule should be {rules} or field:NAME, not {it}",
            {"rules": ", ".join(KEEP_RULES), "it": unknown[0]},
        )
    return values


def is_list_of_keys(entry: str) -> bool:
    """Whether an entry of `balance.protect` is a file of keys, and not the name of a source."""
    return (path_of(entry) if is_remote(entry) else entry).endswith(_LIST_OF_KEYS)


def _text_tower(value: str) -> str:
    if value not in (OWN_TEXT_TOWER, TEACHERS_TEXT_TOWER) and not re.search(r"[:/]", value):
        raise PydanticCustomError(
            "text_tower", "a text tower should be own, teacher, or of a model as local-dir:PATH or NAME/TAG"
        )
    return value


def _not_at_an_address(value: str) -> str:
    if not value.startswith("run:") and re.search(r"(?:^|[:/])[a-z0-9]+://", value, re.IGNORECASE):
        raise PydanticCustomError(
            "model_address",
            "models are not read from addresses ({it}): fetch the file or the folder, or name hf-hub:ORG/NAME",
            {"it": without_secrets(value)},
        )
    return value


def _printable(value: str) -> str:
    if not (value.strip() and value.isprintable()):
        raise PydanticCustomError("name", "a name should be of characters that can be printed")
    return value


_ModelName = Annotated[str, AfterValidator(_printable)]
_Model = Annotated[str, AfterValidator(_not_at_an_address)]
"""A model or its weights, by name or path."""
_SetName = Annotated[str, Field(max_length=100), AfterValidator(_printable)]  # a part of names of files
_Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
"""A list of texts; one text alone is a list of one."""


def _as_text(path: Path) -> str:
    return os_errors.address_of(path) or str(path)


def _to_be_kept(place: str) -> str:
    """A command stays as it is: without its words it would be another one."""
    return without_secrets(place) if is_remote(place) else place


def _all_to_be_kept(places: tuple[str, ...]) -> list[str]:
    return [_to_be_kept(place) for place in places]


_Place = Annotated[str, PlainSerializer(_to_be_kept, return_type=str, when_used="json")]
"""A path or an address. A run folder keeps an address without its password and without what signs it."""
_Input = Annotated[
    Path, PlainSerializer(lambda path: without_secrets(_as_text(path)), return_type=str, when_used="json")
]
"""A path that may also be an address."""
_Places = Annotated[_Texts, PlainSerializer(_all_to_be_kept, return_type=list[str], when_used="json")]
"""A list of these."""


class PairsConfig(Config):
    """Where the image-text pairs are."""

    source: _Places = ()
    """WebDataset tars, CSV/TSV/JSONL/Parquet tables, or folders of images with .txt files (one caption a
    line), here or at an address (`s3://`, `gs://`, `az://`, `hf://`, `https://`). All must be of one
    kind. Brace ranges and wildcards are allowed. `pipe:COMMAND` reads a tar from a shell command, if `--allow-pipe` is given."""
    image_column: str = "image"
    """Table only: the column with the image paths, relative to the table. In Parquet it may also hold
    the images themselves, as bytes, lists of bytes, or the Hub's struct of bytes and path."""
    caption_column: str | None = "caption"
    """Table only: the column with the caption, or with a list of captions. null for images alone,
    with `captions: optional`."""
    key_column: str | None = None
    """Table only: the column with a unique key. When absent: the image path, or for images inside a
    Parquet file without paths its name and the row (`train-00000/12`)."""
    key_field: str | None = None
    """Tars and folders: the json field with a unique key, such as DataComp's `uid`, in the .json of
    each image. When absent, the name of the file is the key."""
    key_prefix: Literal["shard"] | None = None
    """shard puts the name of the tar, table or folder before the keys of its pairs (`00000/key`),
    for keys that repeat from one to the next."""
    repeated_rows: Literal["merge"] | None = None
    """Table only: merge makes one pair of all rows of one key, with the caption of each. When
    absent, a row whose key an earlier one has is broken."""
    captions_field: str = "captions"
    """Tars only: the json field with several captions of one image. Where it is absent, each line
    of the .txt is a caption, unless another json field holds the whole text too."""
    keep_fields: Annotated[_Texts, AfterValidator(_each_once), AfterValidator(_not_taken)] = ()
    """Json fields or table columns to store beside the embeddings, such as a known duplicate
    group."""
    captions: Literal["required", "optional"] = "required"
    """required: an image without a caption is broken. optional: it teaches the image tower alone, by
    clusters, `cosine_image` and `bank_image`."""
    max_bad_share: Share = 0.01
    """Stop when more than this share of the pairs is broken: unreadable image, empty caption or
    duplicate key."""
    max_pixels: PositiveInt = 89_478_485
    """Refuse an image that claims more pixels than this, as a decompression bomb."""

    @model_validator(mode="after")
    def _captions_are_somewhere(self) -> "PairsConfig":
        if self.caption_column is None and self.captions == "required":
            raise ValueError("caption_column: null needs pairs.captions: optional, which takes images without captions")
        return self

    @property
    def captions_are_optional(self) -> bool:
        return self.captions == "optional"

    @property
    def reading(self) -> dict[str, Any]:
        """The settings that decide what is read of given files, as plain values; one of later versions only if set."""
        unset = {"captions": not self.captions_are_optional, "key_field": self.key_field is None}
        later = {name for name, is_unset in unset.items() if is_unset}
        return self.model_dump(mode="json", exclude={"source", "max_bad_share", "max_pixels", *later})


class EmbedConfig(Config):
    """Teacher embeddings, computed once and stored (paper sections 3.1 to 3.3)."""

    at_addresses = ("existing",)

    teacher: _Model = "ViT-bigG-14"
    """An open_clip model name, `hf-hub:org/name`, `local-dir:path`, `run:path` for the student of a
    finished run, or `none` to train without a teacher."""
    pretrained: _Model | None = "laion2b_s39b_b160k"
    """The open_clip tag of the weights, or a checkpoint of open_clip's training (.pt); ignored for
    hf-hub:, local-dir: and run:."""
    precision: Precision = "auto"
    """Precision of the teacher: auto is bf16 on CUDA and fp32 elsewhere. Embeddings are always
    stored as float16."""
    existing: _Input | None = None
    """Use these embeddings instead of computing them: a store of ours, a clip-retrieval or DataComp
    folder, .npy files, Parquet, Arrow or Lance tables with a column of vectors, or tables (also CSV)
    with a column for each dimension; a path or an address. On the command line: `--embeddings`."""
    match: Literal["key", "order"] = "key"
    """How the embeddings of `existing` belong to the pairs. order: the first row is of the first pair
    and so on, whatever keys they have. Nothing can check that, so only use it where keys are lost."""
    normalize: bool = False
    """Scale imported embeddings to length one. When off, rows of another length are refused."""
    views: NonNegativeInt = 0
    """Also embed this many random crops of each image. Training then shows the student one of these
    crops, with the teacher's embedding of exactly that crop as target. Each takes a forward pass of
    the teacher and 2 bytes a dimension on disk. 0: the whole image is the only target."""
    view_crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.4
    """The crops of `views` keep at least this share of the image. Smaller ones differ more, but may
    no longer show what the caption says."""
    max_bad_share: Share | None = None
    """Leave out imported rows that are all zeros or not finite, if they are at most this share of
    all; they are counted and listed. When absent, one such row refuses the import."""


class BalanceConfig(Config):
    """Image semantic balance: keep one image of each set of near-duplicates (paper section 3.1)."""

    at_addresses = ("existing", "grow_from", "decisions")

    enabled: bool = True
    """Off keeps every pair, for comparisons."""
    metric: Metric = "cosine"
    """The scale of `threshold`: 1 - cos, squared Euclidean, or Euclidean distance of unit vectors
    (docs/decisions.md, D2)."""
    threshold: PositiveFloat = 0.07
    """Two images at this distance or nearer are put into one set."""
    max_threshold: PositiveFloat | None = None
    """Search for pairs up to this distance. Every smaller threshold is then answered in seconds.
    When absent: `threshold`, or twice that with target_removed."""
    target_removed: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `threshold`: take the smallest threshold (up to max_threshold) that removes this
    share of the images."""
    keep: Annotated[_Texts, Field(min_length=1), AfterValidator(_each_once), AfterValidator(_keep_rules)] = (
        "nearest_centroid",
    )
    """Which image of a set is kept: nearest_centroid (the paper's rule), best_caption (nearest to its
    image for the teacher), most_pixels, largest_file, or field:NAME (the highest number of one of
    pairs.keep_fields, or of a column beside imported embeddings). Of several rules the next decides between equals, and at last the paper's."""
    max_radius: PositiveFloat | None = None
    """Keep more images of a set, until every removed image is within this distance of the one kept
    for it. The paper does not do this."""
    classify: NonNegativeInt = 2_000
    """Compare the pixels of this many removed images, drawn at random, with the kept ones, to tell
    perceptual from semantic duplicates. 0 compares none."""
    merge_captions: bool = False
    """Give the captions of the removed images of a set to the kept one: captions.parquet lists them,
    and `clip-cid subset` writes them. The training reads the captions of the kept pair alone; of pairs
    in tables and folders, `subset --shards` makes tars with all, to be the pairs of another run."""
    protect: Annotated[_Places, AfterValidator(_each_once)] = ()
    """Images that are never removed: names of sources as in pairs.source, or a .txt with one key a
    line, here or at an address. A set that holds some of them keeps all of these and no other."""
    against: dict[_SetName, _Place] = {}
    """Name -> evaluation set, as in evaluate.sets, or its embeddings (a .npy or a store). Images
    within the threshold of one of its test images are removed, and listed with it."""
    decisions: _Input | None = None
    """A file of decisions that a person made with `clip-cid review`, here or at an address. Images that
    were said not to be duplicates are parted, the weakest link between them is cut; images to keep
    are kept, those to remove are removed."""
    grow_from: _Input | None = None
    """The balance folder of an earlier run on some of the same images: only pairs with a new image
    are compared. This run's own earlier results are always used."""
    truth_field: str | None = None
    """The field with the true duplicate group, one of pairs.keep_fields. Precision and recall of
    the sets are then reported."""
    existing: _Input | None = None
    """Use this .npy of kept rows instead of balancing. On the command line: `--kept`."""

    @property
    def protected_lists(self) -> tuple[Path, ...]:
        """The files of keys among `protect`; the other entries name sources."""
        return tuple(Path(entry) for entry in self.protect if is_list_of_keys(entry))

    @property
    def protected_sources(self) -> tuple[str, ...]:
        return tuple(entry for entry in self.protect if not is_list_of_keys(entry))


class ClusterConfig(Config):
    """Spherical k-means over the kept teacher image embeddings (paper section 3.2, Eq. 1)."""

    at_addresses = ("existing",)

    num_centers: _PositiveOrAuto = AUTO
    """K, the number of clusters. auto: one for 30 kept images, and not more than the paper's million
    (for 225 million images). 20 to 200 images a cluster are usual."""
    iterations: PositiveInt = 20
    """Rounds of assignment and update."""
    max_points_per_center: PositiveInt = 256
    """Train on at most this many images per center, drawn at random. All images are assigned at the
    end."""
    seed: NonNegativeInt = 0
    """Seed of the sample and of the first centers."""
    truth_field: str | None = None
    """The field with the class of an image, one of pairs.keep_fields. The purity of the clusters is
    then reported."""
    texts: bool = False
    """Cluster the text embeddings of the captions of the kept images too, for the losses that read
    clusters of texts. The paper clusters images only."""
    num_text_centers: PositiveInt | None = None
    """The number of clusters of texts. When absent: num_centers."""
    existing: _Input | None = None
    """Use this folder with centers.npy and labels.npy (with `texts` also text_centers.npy and
    text_labels.npy) instead of clustering. On the command line: `--clusters`."""

    @property
    def text_centers(self) -> int:
        """How many clusters of texts are made, if any."""
        return self.num_text_centers or settled(self.num_centers)


_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_WeightOfEach: type[Config] = create_model(
    "_WeightOfEach",
    __base__=Config,
    **cast(Any, {loss.name: (_Weight, Field(default=loss.weight, description=loss.help)) for loss in LOSSES}),
)


class LossWeights(_WeightOfEach):
    """Weights of the losses; 0 switches a loss off (paper Table 5)."""

    if TYPE_CHECKING:  # the fields come from the table

        def __getattr__(self, name: str) -> float: ...

    @property
    def switched_on(self) -> tuple[str, ...]:
        """The losses whose weight is above 0."""
        return tuple(loss.name for loss in LOSSES if getattr(self, loss.name) > 0)

    @property
    def learn_from_texts(self) -> bool:
        """Whether a loss that is switched on learns from texts without images."""
        return any(loss.learns_from_texts for loss in rows_of(self.switched_on))

    def any_reads(self, reading: Reading) -> bool:
        """Whether a loss that is switched on reads this."""
        return any(reading in loss.reads for loss in rows_of(self.switched_on))

    @property
    def any_reads_bank(self) -> bool:
        """Whether a loss that is switched on reads a draw of stored embeddings."""
        return any(loss.reads_bank for loss in rows_of(self.switched_on))


class Preset(NamedTuple):
    """A named preset of loss weights, and the settings that belong to it."""

    weights: dict[str, float]
    settings: Mapping[str, float] = MappingProxyType({})


_OF_TEXT = tuple(loss.name for loss in LOSSES if loss.trains_text_only)
_NOTHING = dict.fromkeys(LossWeights.model_fields, 0.0)
_CLIP_CID = {loss.name: loss.weight for loss in LOSSES}
PRESETS: dict[str, Preset] = {
    "clip-cid": Preset(_CLIP_CID),
    "best": Preset(_CLIP_CID | {"cosine_text": 100.0}),
    "paper-r1": Preset(
        _NOTHING | {"clip": 1.0, "cluster_cls": 0.999, "cluster_kl": 0.001, "instance_image": 0.5, "instance_text": 0.5}
    ),
    "paper-r2": Preset(
        _NOTHING | {"clip": 1.0, "cluster_cls": 0.001, "cluster_kl": 0.999, "instance_image": 0.5, "instance_text": 0.5}
    ),
    "clip-only": Preset(_NOTHING | {"clip": 1.0}),
    "siglip-only": Preset(_NOTHING | {"siglip": 1.0}),
    "open-clip": Preset(_NOTHING | {"clip": 1.0, "affinity": 1.0}),
    "clip-kd": Preset(_NOTHING | {"clip": 1.0, "affinity": 1.0, "feature": 2000.0, "icl": 1.0}),
    "tiny-clip": Preset(_NOTHING | {"affinity": 1.0}, {"teacher_scale": 50.0, "affinity_scale": 50.0}),
    "mobile-clip": Preset(_NOTHING | {"affinity": 1.0}),
    "mobile-clip-b": Preset(_NOTHING | {"clip": 0.25, "affinity": 0.75}),
}


class ValidationConfig(Config):
    """What is measured while the student learns."""

    share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the pairs held out of the training. Losses and image-text retrieval are measured on
    them."""
    every: PositiveInt | None = None
    """Pairs between two measurements. When absent: an epoch."""
    sets: dict[_SetName, _Place] = {}
    """Name -> labelled set, as in evaluate.sets. It is classified zero-shot at each measurement."""
    metric: Literal["retrieval", "zero_shot", "loss"] = "retrieval"
    """The number that decides which student is the best: mean recall on the held-out pairs, mean
    zero-shot score, or the held-out loss."""
    keep: Literal["last", "best"] = "last"
    """Which student the run keeps."""
    patience: PositiveInt | None = None
    """Stop after this many measurements without a better student. When absent: never."""

    @property
    def measures(self) -> bool:
        return self.share > 0 or bool(self.sets)


class DistillConfig(Config):
    """Train the student: CLIP loss, cluster-level and instance-level distillation (paper sections 3.2 and 3.3)."""

    student: _Model = "ViT-B-32"
    """An open_clip model name, one of our small models (`cid-tiny`, `cid-small`, `cid-conv`,
    `cid-resnet`), or the path of a model config in JSON."""
    pretrained: _Model | None = None
    """Start from these weights: an open_clip tag, a checkpoint of open_clip's training (.pt), the
    folder of an exported student, `run:path`, or `hf-hub:org/name`."""
    lock: Literal["none", "image", "text"] = "none"
    """Freeze one tower as it was loaded by `pretrained`: neither its weights nor its statistics
    change, and it has no dropout."""
    text_tower: Annotated[_Model, AfterValidator(_text_tower)] = OWN_TEXT_TOWER
    """Whose text tower the student has. `own`: it trains one. `teacher`: it keeps the teacher's as it
    is, and only its image tower learns, against the stored text embeddings. The student then fits an
    index of the teacher's text embeddings. Embeddings made elsewhere do not name their teacher: give
    a model as in evaluate.compare (`local-dir:path`, `hf-hub:org/name`, `name/tag`, `run:path`)."""
    alignment: Literal["native", "linear"] = "native"
    """How the student meets the teacher's space. `native`: its own projection has the teacher's
    width. `linear`: one more linear map per modality is learned."""
    epochs: _PositiveOrAuto = AUTO
    """Passes over the kept pairs. auto: the paper's 32, or fewer (at least 4) from three million pairs
    on, so that about a hundred million are seen."""
    per_cluster: PositiveInt | None = None
    """Take at most this many pairs of a cluster in an epoch, so that large clusters no longer lead. The
    pairs of a cluster take turns from epoch to epoch, and an epoch is shorter. When absent: all."""
    shuffle_window: PositiveInt | None = None
    """Read a shared disk in runs: shards (tars; 10,000 rows of a table or folder) come in a random
    order, pairs are shuffled among so many that follow each other there, and a batch is read front to
    back. Every pair is still seen once an epoch. Some twenty batches mix well. When absent: all pairs
    are shuffled together, which reads every image from another place."""
    steps: PositiveInt | None = None
    """Train for this many steps instead of epochs, whatever the number of pairs: for comparisons at
    equal steps."""
    batch_size: _PositiveOrAuto = AUTO
    """Pairs per step, over all processes together. auto: 1,024, or less where an epoch would have fewer
    than 16 steps, whatever the machine. Larger is better and takes memory; the paper's 32,768 are for
    64 GPUs (`clip-cid init --pairs N --gpus G`)."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate. A linear warm-up comes before it and a cosine decay after it."""
    warmup_steps: NonNegativeInt | Literal["auto"] = AUTO
    """Steps of the linear warm-up; must be fewer than the run has. auto: a tenth of them, at most 2,000."""
    weight_decay: NonNegativeFloat = 0.2
    """AdamW: weight decay. It does not apply to biases, norms, scales and other vectors, nor to the
    cluster head."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW: decay of the running mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """AdamW: decay of the running mean of the squared gradient."""
    eps: PositiveFloat = 1e-6
    """AdamW: added to the root of the mean squared gradient."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average (EMA) of the weights with this decay. Validation measures it,
    and the export holds it instead of the last weights."""
    weights: LossWeights = LossWeights()
    """Weights of the losses; those not named are of the preset clip-cid. In a recipe also the name of
    a preset: clip-cid, best, paper-r1, paper-r2, clip-only, siglip-only, open-clip, clip-kd, tiny-clip,
    mobile-clip, mobile-clip-b."""
    schedule: dict[str, tuple[tuple[Share, NonNegativeFloat], ...]] = {}
    """Name of a loss -> points (share of the run, factor). The weight of the loss is multiplied by
    the factor: linear between the points, constant before the first and after the last."""
    weigh_gradients_every: PositiveInt | None = None
    """Let the weights weigh gradients, not losses: every so many steps (50 is good) the norm of each
    loss's gradient in the embeddings is measured, and its weight multiplied so that these norms are
    in the proportion of the weights. When absent: the weights are as set."""
    texts: _Places = ()
    """Files with a text a line, which need no images: vocabularies, class names in prompts, captions.
    UTF-8, also packed (.gz). The teacher embeds each line once, and the losses that read a text
    alone (cosine_text, bank_text) learn from them too."""
    texts_per_step: PositiveInt | None = None
    """Lines of `texts` in a step, over all processes together. When absent: a quarter of batch_size."""
    head_scale: PositiveFloat = 16.0
    """sigma: the cluster logits are the cosines to the centers times this."""
    head_perplexity: Annotated[float, Field(gt=1)] | None = None
    """Instead of head_scale: choose sigma so that the teacher's distribution over all centers has
    this perplexity on average, that is, so many likely centers for an image."""
    head_lr: NonNegativeFloat = 0.0
    """Learning rate of the cluster head. 0 keeps it frozen at the centers."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the centers that take part in a step: those of the batch, and random negatives."""
    logq: Literal["none", "kl", "both"] = "kl"
    """Which of the two cluster losses corrects for the sampling of negatives (docs/decisions.md,
    D6)."""
    labels: PositiveInt = 1
    """How many clusters an image belongs to in `L_cls`: its own, and the next nearest centers. Above 1
    they are found before the first step, in one pass over all images (arXiv 2407.17331)."""
    ignore_near: Annotated[float, Field(gt=0, le=1)] | None = None
    """In `L_cls`: a center whose cosine to one of an image's own centers is above this is no negative
    for it. When absent: all other centers are negatives."""
    temperature: PositiveFloat = 1.0
    """tau: softens both distributions of `L_kl`."""
    bank_size: Annotated[int, Field(ge=2)] = 16_384
    """For weights.bank_image and bank_text: how many stored embeddings a batch is compared with. They
    are drawn anew from all kept pairs as the training goes on; where there are fewer, all are taken."""
    bank_scale: PositiveFloat = 16.0
    """For weights.bank_image and bank_text: the factor from cosines to logits, of student and teacher."""
    share_scale: bool = False
    """Let the instance losses use the student's own learned scale instead of one of their own."""
    teacher_scale: PositiveFloat | None = None
    """For weights.affinity: the teacher's factor from cosines to logits. When absent: the one
    stored with its embeddings, or 100 for imported embeddings."""
    affinity_scale: PositiveFloat | None = None
    """For weights.affinity: the student's factor from cosines to logits. When absent: its learned
    one."""
    crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Random crops keep at least this share of the image. The default is mild, because the stored
    embedding is of the whole image. With embed.views the crops are those of the views instead."""
    augmentation: dict[str, float] = {}
    """More of open_clip's training augmentation: color_jitter (its strength; the hue gets a quarter
    of it), color_jitter_prob and gray_scale_prob. The stored embedding is of the plain image."""
    precision: Precision = "auto"
    """Precision of the student: auto is bf16 on CUDA and fp32 elsewhere."""
    loss_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the products in the losses. bf16 rounds rows and centers to bfloat16 and adds up in
    float32: on CUDA many times as fast, and L_kl is off by some 0.1 %, its gradient by 0.5 %. On the
    CPU it gains nothing. auto is bf16 on CUDA and fp32 elsewhere."""
    skip_limit: NonNegativeInt = 10
    """A step with a loss or gradient that is not finite changes nothing. After more than this many
    in succession the training stops."""
    validation: ValidationConfig = ValidationConfig()
    """What is measured while the student learns."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    seed: NonNegativeInt = 0
    """Seed of weights, order, crops, captions and negatives."""

    @property
    def text_files(self) -> tuple[Path, ...]:
        return tuple(Path(path) for path in self.texts)

    @property
    def lines_per_step(self) -> int:
        """Lines of `texts` in a step."""
        return self.texts_per_step or max(1, settled(self.batch_size) // 4)

    @model_validator(mode="before")
    @classmethod
    def _weights_by_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        settings = cast(dict[str, Any], values)
        name = settings.get("weights", {})
        # Without a text tower that learns, what nobody asked for by its own name is left out.
        of_text = {} if settings.get("text_tower", OWN_TEXT_TOWER) == OWN_TEXT_TOWER else dict.fromkeys(_OF_TEXT, 0.0)
        if isinstance(name, dict):
            return settings | {"weights": of_text | cast(dict[str, Any], name)} if of_text else settings
        if not isinstance(name, str):
            return settings
        if name not in PRESETS:
            raise ValueError(f"weights: no preset named {name!r}; there are {', '.join(PRESETS)}")
        return {**PRESETS[name].settings, **settings, "weights": {**PRESETS[name].weights, **of_text}}

    @model_validator(mode="after")
    def _parts_fit(self) -> "DistillConfig":
        # The batch.
        comparing = [loss.name for loss in rows_of(self.weights.switched_on) if loss.compares_pairs]
        if self.batch_size == 1 and comparing:
            raise ValueError(
                f"batch_size: {self.batch_size}, but {', '.join(comparing)} compare the pairs of a batch with each"
                " other: set at least 2"
            )

        if self.shuffle_window is not None and self.batch_size != AUTO and self.shuffle_window < self.batch_size:
            raise ValueError(
                f"shuffle_window: {self.shuffle_window:,} pairs are shuffled together, fewer than a batch of"
                f" {self.batch_size:,} holds; set some twenty batches, or leave it out"
            )

        if self.keeps_text_tower:
            self._fits_text_tower()

        # The schedule of the weights.
        for name, points in self.schedule.items():
            if name not in LossWeights.model_fields:
                raise ValueError(f"schedule: no loss named {name!r}; there are {', '.join(LossWeights.model_fields)}")
            shares = [share for share, _ in points]
            if not points or shares != sorted(set(shares)):
                raise ValueError(f"schedule.{name}: needs points (share of the run, factor) of ascending shares")

        # The augmentation.
        if unknown := self.augmentation.keys() - AUGMENTATIONS:
            raise ValueError(f"augmentation: no {', '.join(sorted(unknown))}; there are {', '.join(AUGMENTATIONS)}")
        jitter = [name in self.augmentation for name in ("color_jitter", "color_jitter_prob")]
        if any(jitter) and not all(jitter):
            raise ValueError("augmentation: color_jitter and color_jitter_prob do nothing without each other")
        limits = {"color_jitter": 2.0}  # a hue is shifted by half a turn at most
        for name, value in self.augmentation.items():
            if not 0 <= value <= limits.get(name, 1.0):
                raise ValueError(f"augmentation.{name}: must be in [0, {limits.get(name, 1.0):g}], got {value:g}")

        # Only a number that is measured can decide which student is the best.
        watched = self.validation
        if (watched.keep == "best" or watched.patience) and not watched.measures:
            raise ValueError("validation: keep: best and patience need validation.share or validation.sets")
        needed = watched.sets if watched.metric == "zero_shot" else watched.share
        if watched.measures and not needed:
            name = "sets" if watched.metric == "zero_shot" else "share"
            raise ValueError(f"validation.metric: {watched.metric} is measured on validation.{name}, which is not set")
        if watched.patience and watched.keep == "last":
            raise ValueError(
                "validation.patience: the last student is not the best one then; set validation.keep: best"
            )
        return self

    @property
    def keeps_text_tower(self) -> bool:
        """Whether the text tower is the teacher's, and does not learn."""
        return self.text_tower != OWN_TEXT_TOWER

    @property
    def trains_logit_scale(self) -> bool:
        """Whether a loss reads the student's own factor from cosines to logits."""
        reads = self.weights.any_reads
        return (
            reads("logit_scale")
            or (reads("affinity_scale") and self.affinity_scale is None)
            or (reads("instance_scale") and self.share_scale)
        )

    def _fits_text_tower(self) -> None:
        where = f"text_tower: {self.text_tower}"
        if training := [name for name in _OF_TEXT if getattr(self.weights, name) > 0]:
            zeros = ", ".join(f"distill.weights.{name}: 0" for name in training)
            raise ValueError(f"{where} learns nothing, but {', '.join(training)} would train it; set {zeros}")
        if self.alignment != "native":
            raise ValueError(
                f"{where} is in the teacher's space, where the image tower has to be too; set alignment: native"
            )
        if self.texts:
            raise ValueError(f"{where} is kept as it is, so distill.texts teach nothing; leave them out")
        if self.lock != "none":
            raise ValueError(f"{where} is kept as it is, and the image tower has to learn; set lock: none")


class EvaluateConfig(Config):
    """Zero-shot, linear probe, neighbors and retrieval (docs/evaluation.md)."""

    sets: dict[_SetName, _Place] = {}
    """Name -> labelled set. It is `builtin:digits` (of scikit-learn), a folder in CLIP_benchmark's
    WebDataset layout or its URL, a folder with train/ and test/ of one folder a class, or a known
    set as it is published; see docs/evaluation_sets.md."""
    retrieval: dict[_SetName, _Places] = {}
    """Name -> pairs, as in pairs.source, on which image-text retrieval is measured."""
    zero_shot: bool = True
    """Zero-shot classification by the nearest prompt."""
    linear_probe: bool = True
    """Logistic regression on frozen features."""
    knn: bool = True
    """Vote of the 20 nearest training images. Scores for 10, 100 and 200 are written too."""
    features: Literal["before_projection", "after_projection"] = "before_projection"
    """The features for linear probe and neighbors. CLIP's protocol uses the output of the image tower
    before its projection."""
    student: bool = True
    """Off for a recipe without a student of its own: nothing is trained, and only the models of
    compare are measured."""
    compare: dict[_ModelName, _Model] = {}
    """Name -> model evaluated beside the student: `run:path`, `local-dir:path`, `hf-hub:org/name`,
    or `name/tag` of open_clip, where the tag may be a checkpoint (.pt)."""
    seed: NonNegativeInt = 0
    """Seed of hold-outs and intervals."""

    @model_validator(mode="after")
    def _has_a_model(self) -> "EvaluateConfig":
        if not self.student and not self.compare:
            raise ValueError(
                "evaluate.student: false, and evaluate.compare names no model, so there is none to evaluate"
            )
        if self.student and STUDENT in self.compare:
            raise ValueError(f"evaluate.compare: a model is named {STUDENT!r}, which is this run's own; rename it")
        return self


class DrawConfig(Config):
    """The figures of the paper, from the files of the run."""

    gallery_sets: PositiveInt = 24
    """How many removed sets the galleries show."""
    map_images: Annotated[int, Field(ge=30)] = 1_000
    """How many kept images the map of the embeddings shows."""
    images_of: str | None = None
    """The evaluation set whose images patch PCA and activation maps show. When absent: the first
    one that is there."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of what is shown."""


class ReportConfig(Config):
    """One self-contained HTML page."""

    title: str = "clip-cid report"
    """Headline of the page."""
    images: bool = True
    """Off leaves out pictures, captions and keys of the data: numbers only, for sharing."""
    blur: bool = False
    """Blur every picture of the data until the pointer is on it or it is clicked, and on paper: web
    data can hold disturbing pictures."""
    thumbnail_px: Annotated[int, Field(ge=16, le=512)] = 96
    """Long side of a thumbnail, in pixels."""


class MachineConfig(Config):
    """How the work is done. These settings do not change results, so none of them makes a stage stale."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps. auto takes CUDA where there is one."""
    threads: NonNegativeInt = 0
    """CPU threads of the computations. 0 leaves it to the libraries, most of which take one for
    each core."""
    workers: NonNegativeInt = 2
    """Processes that decode images; 0 decodes in the main process."""
    embed_batch: PositiveInt = 256
    """Images in a batch of the models in embed and evaluate."""
    distance_block: PositiveInt = 4096
    """Removed images in a batch that draw compares with the centers."""
    balance_processes: NonNegativeInt = 0
    """Processes that share the tasks of balance and cluster. 0 is one for each core where the work is
    expected to be long (for cluster as far as their memory goes), else one."""
    ray: str | None = None
    """A Ray cluster that does the tasks of embed, balance, cluster and evaluate: HOST:PORT, or auto for
    the one of this host. Every node must see the run folder and the pairs at the same path. When
    absent: processes of this machine. Needs `pip install "clip-cid[ray]"`; docs/scale.md starts a cluster."""
    micro_batch: PositiveInt | None = None
    """Pairs of a step that are in the student at once, for batches that do not fit into memory. The
    gradient is that of the whole batch; a step takes about a third longer."""
    grad_checkpointing: bool = False
    """Compute the student's activations again in the backward pass instead of storing them: less
    memory, and a step takes about a third longer."""
    compile: bool = False
    """torch.compile for the student; worth it for long runs."""
    loss_kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the losses from their logits: operations of PyTorch, or Triton kernels, each one
    pass over memory for a dozen. auto takes Triton on CUDA where it is installed."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Minutes between two checkpoints of the training."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the last checkpoints are kept; at least 2, in case the newest is damaged."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Also write the metrics for TensorBoard, into the folder of the training. auto does so where
    the package is installed."""
    callbacks: _Texts = ()
    """Python functions `package.module:name` that are called with every line of metrics.jsonl as a
    dict. docs/training.md sends them to Weights & Biases."""
    cache_dir: Path | None = None
    """Where what is read from addresses is kept. When absent: ~/.cache/clip_cid."""


class Recipe(Config):
    """The whole page."""

    pairs: PairsConfig = PairsConfig()
    embed: EmbedConfig = EmbedConfig()
    balance: BalanceConfig = BalanceConfig()
    cluster: ClusterConfig = ClusterConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    draw: DrawConfig = DrawConfig()
    report: ReportConfig = ReportConfig()
    machine: MachineConfig = MachineConfig()

    @property
    def has_teacher(self) -> bool:
        return self.embed.teacher != "none" or self.embed.existing is not None

    @property
    def uses_clusters(self) -> bool:
        """Whether a loss reads the clusters: their centers, and that of each image."""
        return self.distill.weights.any_reads("clusters")

    @property
    def uses_labels(self) -> bool:
        """Whether the training reads which cluster an image is in, for a loss or for the order of the pairs."""
        return self.uses_clusters or self.distill.per_cluster is not None

    @property
    def uses_several_labels(self) -> bool:
        """Whether the training first finds more labels of each image than its cluster."""
        return self.distill.weights.cluster_cls > 0 and self.distill.labels > 1

    @property
    def uses_text_clusters(self) -> bool:
        return self.distill.weights.any_reads("text_clusters")

    @property
    def uses_teacher_images(self) -> bool:
        """Whether a loss reads the teacher's image embeddings while the student learns."""
        return self.distill.weights.any_reads("teacher_image")

    @property
    def uses_teacher_texts(self) -> bool:
        """Whether a loss reads the teacher's text embeddings while the student learns."""
        settings, weights = self.distill, self.distill.weights
        as_students = weights.any_reads("text") or weights.any_reads("aligned_text") or settings.validation.share > 0
        read = any(loss.reads_teacher_texts for loss in rows_of(weights.switched_on))
        return read or (settings.keeps_text_tower and as_students)

    @property
    def uses_texts(self) -> bool:
        """Whether the student learns from texts without images."""
        return bool(self.distill.texts) and self.distill.weights.learn_from_texts

    def uses(self, stage: str) -> bool:
        """Whether this recipe has the stage: plain CLIP training has no embed, balance or cluster."""
        if not self.evaluate.student and stage != EVALUATE:
            return False
        used = {
            EMBED: self.has_teacher,
            BALANCE: self.has_teacher and self.balance.enabled,
            CLUSTER: self.has_teacher and (self.uses_labels or self.uses_text_clusters),
            TEXTS: self.uses_texts,
            EVALUATE: bool(self.evaluate.sets or self.evaluate.retrieval),
        }
        return used.get(stage, True)

    @model_validator(mode="after")
    def _teacher_fits(self) -> "Recipe":
        if self.has_teacher:
            return self
        if self.distill.keeps_text_tower:
            raise ValueError(
                f"distill.text_tower: {self.distill.text_tower}, but embed.teacher: none, so there are no embeddings of"
                " it to learn from; set distill.text_tower: own"
            )
        if self.uses_clusters or self.uses_teacher_images or self.uses_teacher_texts:
            raise ValueError(
                "embed.teacher: none, but distill.weights asks for distillation; set distill.weights: clip-only in a recipe"
            )
        if self.distill.per_cluster is not None:
            raise ValueError(
                "embed.teacher: none, but distill.per_cluster needs clusters of a teacher's embeddings; leave it out"
            )
        if self.pairs.captions_are_optional:
            raise ValueError(
                "embed.teacher: none, but pairs.captions: optional takes images that only a teacher can say something"
                " of; set pairs.captions: required"
            )
        if self.embed.views:
            raise ValueError(f"embed.views: {self.embed.views}, but embed.teacher: none, so nothing embeds them")
        return self

    @model_validator(mode="after")
    def _embeddings_fit(self) -> "Recipe":
        embed = self.embed
        if self.uses_texts and embed.existing is not None:
            raise ValueError(
                "distill.texts: the teacher embeds them, but embed.existing takes embeddings that were made elsewhere,"
                " and no teacher is loaded; leave out one of the two"
            )
        if embed.match == "order" and (embed.existing is None or not self.pairs.source):
            raise ValueError(
                "embed.match: order gives the rows of embed.existing to the pairs of pairs.source; name both, or leave"
                " it out"
            )

        # Views are crops that a teacher embeds, and the only ones.
        if embed.views and self.distill.crop_scale != DistillConfig().crop_scale:
            raise ValueError(
                f"distill.crop_scale: {self.distill.crop_scale:g} has no effect with embed.views: {embed.views},"
                " whose crops the student sees; leave it out, and set embed.view_crop_scale"
            )
        return self

    @model_validator(mode="after")
    def _losses_fit(self) -> "Recipe":
        switched_on = rows_of(self.distill.weights.switched_on)
        if not switched_on:
            raise ValueError("distill.weights: all are 0, so there is nothing to learn")

        # An image has at most as many labels as there are clusters.
        clusters, labels = self.cluster, self.distill.labels
        of_number = clusters.num_centers if clusters.existing is None else AUTO
        if self.uses_several_labels and of_number != AUTO and labels > of_number:
            raise ValueError(
                f"distill.labels: {labels:,} labels for an image, but cluster.num_centers is {of_number:,}"
            )

        # Clusters of texts are made only where they are asked for.
        if self.uses_text_clusters and not clusters.texts:
            readers = ", ".join(loss.name for loss in switched_on if "text_clusters" in loss.reads)
            raise ValueError(f"distill.weights: {readers} read clusters of texts; set cluster.texts: true")

        # An image without a caption has no place in comparisons of texts with centers.
        of_texts = [loss.name for loss in switched_on if loss.reads_captions and "clusters" in loss.reads]
        if self.pairs.captions_are_optional and (clusters.texts or of_texts):
            asks = "cluster.texts" if clusters.texts else f"distill.weights.{of_texts[0]}"
            raise ValueError(
                f"pairs.captions: optional, but {asks} needs a caption for every image; leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _balance_fits(self) -> "Recipe":
        balance = self.balance
        if LARGEST_FILE in balance.keep and not self.pairs.source:
            raise ValueError("balance.keep: largest_file reads the images; set pairs.source")
        if balance.max_threshold is not None and balance.target_removed is None:
            low, high = balance.threshold, balance.max_threshold
            if high < low:
                raise ValueError(f"balance.max_threshold: {high:g} is below balance.threshold {low:g}")
        return self

    @model_validator(mode="after")
    def _names_refer(self) -> "Recipe":
        if self.draw.images_of is not None and self.draw.images_of not in self.evaluate.sets:
            raise ValueError(f"draw.images_of: {self.draw.images_of!r} is not among evaluate.sets")
        fields: list[tuple[str, str | None]] = [
            ("balance.truth_field", self.balance.truth_field),
            ("cluster.truth_field", self.cluster.truth_field),
            *(("balance.keep", rule.removeprefix(OF_FIELD)) for rule in self.balance.keep if rule not in KEEP_RULES),
        ]
        for setting, field in fields:
            # Embeddings made elsewhere keep all columns of their metadata.
            if field is not None and field not in self.pairs.keep_fields and self.embed.existing is None:
                raise ValueError(f"{setting}: {field!r} is not among pairs.keep_fields, so it is not stored")
        return self


def settled(number: int | Literal["auto"]) -> int:
    """The value of a setting that may be `auto`, in a recipe that is settled (`auto_numbers.settle`)."""
    assert number != AUTO, "the recipe is not settled"
    return number


def auto_settings(recipe: Recipe) -> tuple[str, ...]:
    """The numbers that are still to be chosen."""
    clusters, training = recipe.cluster, recipe.distill
    values = {
        "cluster.num_centers": clusters.num_centers,
        "distill.epochs": training.epochs,
        "distill.batch_size": training.batch_size,
        "distill.warmup_steps": training.warmup_steps,
    }
    return tuple(setting for setting, value in values.items() if value == AUTO)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, its defaults filled in.

    Raises:
        ConfigError: The file is missing or not YAML, or settings are misspelt or out of limits; all
            are named at once.
    """
    return parse_recipe(_read_yaml(path), where=_named(path))


def read_run_recipe(path: Path) -> Recipe:
    """The recipe that a run has stored; also that of an earlier version.

    It holds every setting, so also those removed since, mostly at their defaults. Where these have no
    effect they are left out: a run stays readable.

    Raises:
        ConfigError: As `read_recipe`.
    """
    values = _read_yaml(path)
    if values == {} and not path.stat().st_size:
        raise ConfigError(
            f"{_named(path)}: this recipe of a run is empty, as after a power cut; its settings are lost.",
            fix="Give the recipe again with --recipe FILE. What was made with the same settings stays up to date.",
        )
    sections = cast(dict[str, Any], values) if isinstance(values, dict) else {}
    for name, removed in _REMOVED.items():
        section, setting = name.split(".")
        settings = sections.get(section)
        if isinstance(settings, dict) and setting in settings and settings[setting] in removed.without_effect:
            del settings[setting]
    return parse_recipe(values, where=_named(path))


def _named(path: Path) -> str:
    return units.shortened(str(path), 500)


def _read_yaml(path: Path) -> Any:
    where = _named(path)
    try:
        with path.open("rb") as handle:
            content = handle.read(plain_yaml.MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot read this recipe ({error.strerror}).",
            fix="`clip-cid init FILE --pairs N` writes one to start from.",
        ) from error

    if len(content) > plain_yaml.MOST_BYTES:
        raise ConfigError(
            f"{where}: more than {units.size(plain_yaml.MOST_BYTES)}, so this is not a recipe.",
            fix="Name a recipe, as `clip-cid init FILE` writes one; many sources are written as {00000..00331}.",
        )
    try:
        values = plain_yaml.parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: not text in UTF-8 (byte {error.start:,}).", fix="Save it as UTF-8 without other encodings."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{where}: not valid YAML: {units.shortened(str(error), 300)}", fix="Mend the line it names."
        ) from error
    return {} if values is None else values


def parse_recipe(values: Any, *, where: str) -> Recipe:
    """The recipe of plain values from YAML, JSON or flags; `where` names their origin in the error.

    Raises:
        ConfigError: Settings are misspelt or out of limits; all are named at once.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        every = [problem for problem in error.errors(include_url=False) if not _is_of_auto(problem)]
        problems = [_describe(problem) for problem in every[:_MOST_PROBLEMS]]
        if (more := len(every) - len(problems)) > 0:
            problems.append(f"and {more:,} more")
        raise ConfigError(
            "\n  ".join([f"{where}: {units.counted(len(every), 'problem')}", *problems]),
            fix="`clip-cid init FILE` writes a recipe with every setting explained.",
        ) from error


def dump_recipe(recipe: Recipe) -> str:
    """The full recipe as YAML; reading it gives an equal recipe."""
    return as_yaml(recipe.model_dump(mode="json"))


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, in their order."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)


def commented_recipe(recipe: Recipe | None = None, *, reasons: Mapping[str, str] = MappingProxyType({})) -> str:
    """A recipe for `clip-cid init`: every setting, with its explanation and its limits.

    Args:
        recipe: Its values; by default the defaults.
        reasons: Setting -> why it has its value, where that is not the default.
    """
    lines = _comment(
        "A clip-cid recipe: every setting with its value and, behind it, what else it may be."
        " Delete what you do not change."
    )
    lines.append("")

    for section in Recipe.model_fields:
        model: Config = getattr(recipe or Recipe(), section)
        commented = _commented_section(model, reasons, f"{section}.", indent="  ")
        lines += [*_comment(type(model).__doc__), f"{section}:", *commented, ""]
    return "\n".join(lines)


def one_line(text: str | None) -> str:
    """A docstring of several lines as one line of help."""
    return " ".join((text or "").split())


def _comment(text: str | None, *, indent: str = "") -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(one_line(text), 100, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def _commented_section(model: Config, reasons: Mapping[str, str], prefix: str, *, indent: str) -> list[str]:
    lines: list[str] = []
    schemas = type(model).model_json_schema()["properties"]
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        lines += _comment(field.description, indent=indent)
        if prefix + name in reasons:
            lines += _comment(f"Chosen: {reasons[prefix + name]}.", indent=indent)
        if isinstance(value, Config):
            lines += [f"{indent}{name}:", *_commented_section(value, reasons, f"{prefix}{name}.", indent=indent + "  ")]
        else:
            plain = model.model_dump(mode="json")[name]
            text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            limits = _limits(schemas[name])
            lines.append(f"{indent}{name}: {text}" + (f"  # {limits}" if limits else ""))
    return lines


def _limits(schema: dict[str, Any]) -> str:
    """The values a setting accepts, or the limits of its number; empty if there are none."""
    for kind in schema.get("anyOf", [schema]):  # a setting that may be absent is its kind or null
        limits = [f"{words} {kind[name]:,}" for name, words in _LIMITS.items() if name in kind]
        if shown := kind.get("enum", limits):
            return ", ".join(shown)
    return ""


def _is_of_auto(problem: Any) -> bool:
    """Whether it says that a number is not `auto`, beside the problem that it says of the number."""
    return bool(problem["loc"]) and problem["loc"][-1] == _LITERAL_AUTO


def _describe(problem: Any) -> str:
    """One of pydantic's problems in our words; a misspelt name gets the nearest right one."""
    location = tuple(units.shortened(str(part), 100) for part in problem["loc"])
    or_auto = ""
    if location and location[-1] == _NUMBER_OR_AUTO:
        location, or_auto = location[:-1], ", or auto"
    name = ".".join(location)
    if name in _REMOVED:
        return f"{name}: this setting was removed; {_REMOVED[name].hint}"
    if problem["type"] == "extra_forbidden":
        known = _names_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{name}: no such setting; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return units.shortened(message, 500)
    try:
        got = units.shortened(repr(problem["input"]), 200)
    except ValueError:
        got = "a number of more digits than Python writes"
    return f"{name or 'recipe'}: {message[:1].lower()}{units.shortened(message[1:], 500)}{or_auto}, got {without_secrets(got)}"


def _names_at(location: tuple[str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
