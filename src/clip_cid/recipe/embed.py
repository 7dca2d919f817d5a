"""The settings of the embed stage."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from clip_cid.recipe.section import Config
from clip_cid.recipe.values import Input, Model, Precision, Share


class EmbedConfig(Config):
    """Teacher embeddings, computed once and stored (paper sections 3.1 to 3.3)."""

    at_addresses = ("existing",)

    teacher: Model = "ViT-bigG-14"
    """An open_clip model name, `hf-hub:org/name`, `local-dir:path`, `run:path` for the student of a
    finished run, or `none` to train without a teacher."""
    pretrained: Model | None = "laion2b_s39b_b160k"
    """The open_clip tag of the weights, or a checkpoint of open_clip's training (.pt); ignored for
    hf-hub:, local-dir: and run:."""
    precision: Precision = "auto"
    """Precision of the teacher: auto is bf16 on CUDA and fp32 elsewhere. Embeddings are always
    stored as float16."""
    existing: Input | None = None
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
