"""The settings of the pairs."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from clip_cid.recipe.section import Config
from clip_cid.recipe.values import Places, Share, Texts, each_once

ALLOW_PIPE = "CLIP_CID_ALLOW_PIPE"
"""The environment variable that lets a source `pipe:COMMAND` run its command: a recipe may be somebody else's."""
STORE_COLUMNS = ("key", "caption", "captions", "ok", "width", "height")
"""Columns that an embedding store has of its own."""


def _not_taken(values: tuple[str, ...]) -> tuple[str, ...]:
    if taken := sorted(set(values) & set(STORE_COLUMNS)):
        raise PydanticCustomError(
            "taken", "{names} would hide a column the store has of its own", {"names": ", ".join(taken)}
        )
    return values


class PairsConfig(Config):
    """Where the image-text pairs are."""

    source: Places = ()
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
    keep_fields: Annotated[Texts, AfterValidator(each_once), AfterValidator(_not_taken)] = ()
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
