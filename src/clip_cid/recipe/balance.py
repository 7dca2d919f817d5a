"""The settings of the balance stage."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat
from pydantic_core import PydanticCustomError

from clip_cid.addresses import is_remote, path_of
from clip_cid.recipe.section import Config
from clip_cid.recipe.values import Input, Place, Places, SetName, Texts, each_once

Metric = Literal["cosine", "squared_euclidean", "euclidean"]
LARGEST_FILE = "largest_file"
KEEP_RULES = ("nearest_centroid", "best_caption", "most_pixels", LARGEST_FILE)
"""The rules of `balance.keep` that name no field."""
OF_FIELD = "field:"
_LIST_OF_KEYS = ".txt"


def _keep_rules(values: tuple[str, ...]) -> tuple[str, ...]:
    of_field = [value for value in values if value.startswith(OF_FIELD) and value != OF_FIELD]
    unknown = [value for value in values if value not in (*KEEP_RULES, *of_field)]
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
    keep: Annotated[Texts, Field(min_length=1), AfterValidator(each_once), AfterValidator(_keep_rules)] = (
        "nearest_centroid",
    )
    """Which image of a set is kept: nearest_centroid (the paper's rule), best_caption (nearest to its
    image for the teacher), most_pixels, largest_file, or field:NAME (the highest number of one of
    pairs.keep_fields, or of a column beside imported embeddings). Of several rules the next decides
    between equals, and at last the paper's."""
    max_radius: PositiveFloat | None = None
    """Keep more images of a set, until every removed image is within this distance of the one kept
    for it. The paper does not do this."""
    classify: NonNegativeInt = 2_000
    """Compare the pixels of this many removed images, drawn at random, with the kept ones, to tell
    perceptual from semantic duplicates. 0 compares none."""
    merge_captions: bool = False
    """Give the captions of the removed images of a set to the kept one: captions.parquet lists them,
    `clip-cid subset` writes them, and the training reads them with distill.merged_captions."""
    protect: Annotated[Places, AfterValidator(each_once)] = ()
    """Images that are never removed: names of sources as in pairs.source, or a .txt with one key a
    line, here or at an address. A set that holds some of them keeps all of these and no other."""
    against: dict[SetName, Place] = {}
    """Name -> evaluation set, as in evaluate.sets, or its embeddings (a .npy or a store). Images
    within the threshold of one of its test images are removed, and listed with it."""
    decisions: Input | None = None
    """A file of decisions that a person made with `clip-cid review`, here or at an address. Images that
    were said not to be duplicates are parted, the weakest link between them is cut; images to keep
    are kept, those to remove are removed."""
    grow_from: Input | None = None
    """The balance folder of an earlier run on some of the same images: only pairs with a new image
    are compared. This run's own earlier results are always used."""
    truth_field: str | None = None
    """The field with the true duplicate group, one of pairs.keep_fields. Precision and recall of
    the sets are then reported."""
    existing: Input | None = None
    """Use this .npy of kept rows instead of balancing. On the command line: `--kept`."""

    @property
    def protected_lists(self) -> tuple[Path, ...]:
        """The files of keys among `protect`; the other entries name sources."""
        return tuple(Path(entry) for entry in self.protect if is_list_of_keys(entry))

    @property
    def protected_sources(self) -> tuple[str, ...]:
        return tuple(entry for entry in self.protect if not is_list_of_keys(entry))
