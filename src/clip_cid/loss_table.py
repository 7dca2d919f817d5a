"""The table of losses, one row each: it gives the recipe its weights and the objective its functions.

A new loss is a function in `method/distill/`, a row here and a row in docs/method.md. This module does not
import torch: a row names its function, and the objective imports it (docs/decisions.md, D45).
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Reading = Literal[
    "image",
    "text",
    "aligned_image",
    "aligned_text",
    "teacher_image",
    "teacher_text",
    "clusters",
    "text_clusters",
    "bank_images",
    "bank_texts",
    "bank_scale",
    "logit_scale",
    "logit_bias",
    "instance_scale",
    "affinity_scale",
    "teacher_scale",
]
"""The values of a batch that a loss may read.

- `image`, `text`: the student's embeddings; `aligned_image`, `aligned_text`: the same in the teacher's space.
- `teacher_image`, `teacher_text`: the teacher's stored embeddings.
- `clusters`: the cluster of each image, and the centers. `text_clusters`: the same of the texts.
- `bank_images`, `bank_texts`: stored embeddings of a draw of all pairs; `bank_scale`: the factor from cosines to logits.
- `logit_scale`, `logit_bias`: learned by the student. `instance_scale`: learned by the objective for the losses that
  cross the modalities. `affinity_scale`, `teacher_scale`: the two of `affinity`.
"""


_OF_A_TEXT = frozenset({"aligned_text", "teacher_text", "bank_images", "bank_scale"})
"""What can be read of a text that has no image."""


@dataclass(frozen=True)
class Loss:
    """One loss: its name, its function and the function's arguments, and its weight."""

    name: str
    weight: float
    """By default: that of the preset `clip-cid`."""
    equation: str
    """Its name in docs/method.md."""
    function: str
    """`module:name` in `clip_cid.method.distill`."""
    reads: tuple[Reading, ...]
    """The arguments of the function, in this order. `cluster_passes` says which losses of centers come of one call."""
    help: str
    """The recipe's help for its weight."""
    needs_float64: bool = False
    """Whether it is summed in float64, which not every device supports."""
    compares_pairs: bool = False
    """Whether it compares the pairs of a batch with each other: with one pair there is nothing to learn."""

    @property
    def reads_targets(self) -> bool:
        """Whether it needs a teacher or a clustering."""
        return not {"teacher_image", "teacher_text", "clusters", "text_clusters"}.isdisjoint(self.reads)

    @property
    def reads_teacher_texts(self) -> bool:
        """Whether it needs stored text embeddings, of its rows or of the bank, or what was made of them."""
        return not {"teacher_text", "bank_texts", "text_clusters"}.isdisjoint(self.reads)

    @property
    def reads_centers(self) -> bool:
        """Whether it is computed by a pass over centers, which gives several losses."""
        return not {"clusters", "text_clusters"}.isdisjoint(self.reads)

    @property
    def reads_bank(self) -> bool:
        """Whether it needs a draw of stored embeddings."""
        return not {"bank_images", "bank_texts"}.isdisjoint(self.reads)

    @property
    def trains_text_only(self) -> bool:
        """Whether it trains the text tower and not the image tower."""
        return "aligned_text" in self.reads and "aligned_image" not in self.reads

    @property
    def reads_captions(self) -> bool:
        """Whether it reads a text of its rows, so that rows without a caption take no part."""
        return not {"text", "aligned_text", "teacher_text"}.isdisjoint(self.reads)

    @property
    def learns_from_texts(self) -> bool:
        """Whether it reads texts one by one, so that it can learn from those of `distill.texts`, too."""
        return "teacher_text" in self.reads and _OF_A_TEXT.issuperset(self.reads)

    def resolve(self) -> Callable[..., Any]:
        """The function itself; imports torch."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"clip_cid.method.distill.{module}"), name)


LOSSES = (
    Loss(
        name="clip",
        weight=1.0,
        equation="L_clip",
        function="contrastive:contrastive_loss",
        reads=("image", "text", "logit_scale"),
        help="Weight of `L_clip`.",
        compares_pairs=True,
    ),
    Loss(
        name="siglip",
        weight=0.0,
        equation="L_siglip",
        function="peer_losses:siglip_loss",
        reads=("image", "text", "logit_scale", "logit_bias"),
        help="Weight of SigLIP's sigmoid loss, which replaces `clip` (set its weight to 0). It gives the student a"
        " logit bias.",
        compares_pairs=True,
    ),
    Loss(
        name="cluster_cls",
        weight=1.0,
        equation="L_cls",
        function="fused_cluster_loss:cluster_losses",
        reads=("aligned_image", "clusters"),
        needs_float64=True,
        help="Weight of `L_cls`, the cluster classification.",
    ),
    Loss(
        name="cluster_kl",
        weight=1.0,
        equation="L_kl",
        function="fused_cluster_loss:cluster_losses",
        reads=("aligned_image", "clusters", "teacher_image"),
        needs_float64=True,
        help="Weight of `L_kl`, the alignment of the cluster distributions.",
    ),
    Loss(
        name="instance_image",
        weight=0.5,
        equation="L_instance",
        function="contrastive:instance_loss",
        reads=("aligned_image", "teacher_text", "instance_scale"),
        help="Weight of the half of `L_instance` that compares the student's images with the teacher's texts (the"
        " paper's beta).",
        compares_pairs=True,
    ),
    Loss(
        name="instance_text",
        weight=0.5,
        equation="L_instance",
        function="contrastive:instance_loss",
        reads=("aligned_text", "teacher_image", "instance_scale"),
        help="Weight of the half of `L_instance` that compares the student's texts with the teacher's images (the"
        " paper's beta).",
        compares_pairs=True,
    ),
    Loss(
        name="affinity",
        weight=0.0,
        equation="L_affinity",
        function="peer_losses:affinity_loss",
        reads=("image", "text", "affinity_scale", "teacher_image", "teacher_text", "teacher_scale"),
        needs_float64=True,
        help="Weight of the divergence from the teacher's image-text similarities within the batch (open_clip's"
        " distillation, CLIP-KD's CRD, TinyCLIP, MobileCLIP).",
        compares_pairs=True,
    ),
    Loss(
        name="feature",
        weight=0.0,
        equation="L_feature",
        function="peer_losses:feature_loss",
        reads=("aligned_image", "aligned_text", "teacher_image", "teacher_text"),
        help="Weight of the mean squared difference of the embeddings (CLIP-KD's FD, which gives it 2000).",
    ),
    Loss(
        name="icl",
        weight=0.0,
        equation="L_icl",
        function="peer_losses:one_way_instance_loss",
        reads=("aligned_image", "aligned_text", "teacher_image", "teacher_text", "instance_scale"),
        help="Weight of the instance loss with the student as query only (CLIP-KD's ICL).",
        compares_pairs=True,
    ),
    Loss(
        name="cosine_image",
        weight=0.0,
        equation="L_cosine",
        function="stored_losses:cosine_loss",
        reads=("aligned_image", "teacher_image"),
        help="Weight of 1 - cosine between the student's image and the teacher's. The same weight fits any width.",
    ),
    Loss(
        name="cosine_text",
        weight=0.0,
        equation="L_cosine",
        function="stored_losses:cosine_loss",
        reads=("aligned_text", "teacher_text"),
        help="Weight of 1 - cosine between the student's text and the teacher's.",
    ),
    Loss(
        name="bank_image",
        weight=0.0,
        equation="L_bank",
        function="stored_losses:bank_loss",
        reads=("aligned_image", "teacher_image", "bank_texts", "bank_scale"),
        needs_float64=True,
        help="Weight of the divergence between student and teacher in how an image picks among `bank_size` stored"
        " texts.",
    ),
    Loss(
        name="bank_text",
        weight=0.0,
        equation="L_bank",
        function="stored_losses:bank_loss",
        reads=("aligned_text", "teacher_text", "bank_images", "bank_scale"),
        needs_float64=True,
        help="Weight of the divergence between student and teacher in how a text picks among `bank_size` stored"
        " images.",
    ),
    Loss(
        name="text_cluster_cls",
        weight=0.0,
        equation="L_cls",
        function="fused_cluster_loss:cluster_losses",
        reads=("aligned_text", "text_clusters"),
        needs_float64=True,
        help="Weight of the classification of the student's text among the clusters of texts. Needs cluster.texts.",
    ),
    Loss(
        name="text_cluster_kl",
        weight=0.0,
        equation="L_kl",
        function="fused_cluster_loss:cluster_losses",
        reads=("aligned_text", "text_clusters", "teacher_text"),
        needs_float64=True,
        help="Weight of the alignment of text distributions over the clusters of texts. Needs cluster.texts.",
    ),
    Loss(
        name="cross_cluster_image",
        weight=0.0,
        equation="L_kl",
        function="fused_cluster_loss:cluster_losses",
        reads=("aligned_image", "text_clusters", "teacher_image"),
        needs_float64=True,
        help="Weight of the alignment of image distributions over the clusters of texts. Needs cluster.texts.",
    ),
    Loss(
        name="cross_cluster_text",
        weight=0.0,
        equation="L_kl",
        function="fused_cluster_loss:cluster_losses",
        reads=("aligned_text", "clusters", "teacher_text"),
        needs_float64=True,
        help="Weight of the alignment of text distributions over the clusters of images.",
    ),
)
"""All losses, in the order in which they are summed and written."""


def rows_of(names: Iterable[str]) -> tuple[Loss, ...]:
    """The rows of these losses, in the order of the table.

    Raises:
        ValueError: A name is not in the table.
    """
    names = set(names)
    if unknown := names - {loss.name for loss in LOSSES}:
        known = ", ".join(loss.name for loss in LOSSES)
        raise ValueError(f"losses must be of {known}, got {', '.join(sorted(unknown))}")
    return tuple(loss for loss in LOSSES if loss.name in names)
