"""The whole objective: named parts, and their weighted sum."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clip_cid.method.distill.center_pass import SoftCenters
from clip_cid.method.distill.cluster_distillation import CenterHead, Shard
from clip_cid.method.distill.contrastive import Side, contrastive_loss, instance_loss
from clip_cid.method.distill.fused_cluster_loss import LogQ
from clip_cid.method.distill.peer_losses import affinity_loss, feature_loss, one_way_instance_loss, siglip_loss
from clip_cid.method.products import at_least_float32, autocast_off

PARTS = (
    "clip",
    "siglip",
    "cluster_cls",
    "cluster_kl",
    "instance_image",
    "instance_text",
    "affinity",
    "feature",
    "icl",
)
CLUSTER = ("cluster_cls", "cluster_kl")
OF_IMAGES = (*CLUSTER, "instance_image", "feature", "icl")
"""Parts that compare the student's images with vectors of the teacher; for these they are read in its space."""
OF_TEXTS = ("instance_text", "feature", "icl")
CROSSED = ("instance_image", "instance_text", "icl")
"""Parts that share a learned scale."""
LARGEST_SCALE = 100.0
FIRST_SCALE = 1 / 0.07

Gather = Callable[[Tensor], Side]


@dataclass(frozen=True)
class Targets:
    """What the teacher and the clustering say about the rows of this rank; absent where no part asks for it."""

    teacher_image: Float[Tensor, "rows teacher"] | None = None
    """Stored embeddings; no gradient flows into them."""
    teacher_text: Float[Tensor, "rows teacher"] | None = None
    """Stored embeddings of the captions the student saw."""
    labels: Int[Tensor, " rows"] | None = None
    """Cluster of each image."""
    soft_centers: SoftCenters | None = None
    """All that `L_kl` needs of the teacher, where it was computed beforehand."""


class Objective(nn.Module):
    r"""Everything that learns beside the student, and the parts of `L_total`, `L_cluster` and `L_instance` in docs/method.md.

    .. math:: L_{total} = w_{clip} L_{clip} + w_{cls} L_{cls} + w_{kl} L_{kl} + \beta\, [ I(v_t, u_s) + I(u_t, v_s) ]

    The other parts are those of peers (`peer_losses.py`), for comparison on equal terms. A part whose weight is 0 is
    neither built nor computed. Parts that compare vectors of student and teacher read the student in the teacher's
    space: as it is (`native`, both widths equal), or through a learned linear map per modality that no other part sees
    (`linear`); `alignment` in docs/method.md.

    Args:
        weights: By the names in `PARTS`; absent is 0.
        student_dim: Width of the student's embeddings.
        teacher_dim: Width of the teacher's embeddings and of the centers; not needed by `clip` and `siglip`.
        alignment: How the student's embeddings reach the teacher's width.
        centers: Unit rows; needed by the cluster parts; with `shard` this rank's.
        shard: Which of all centers these are; absent where they are all of them.
        head_scale: sigma, cosine against the centers to logits.
        train_head: Whether the centers in the head move.
        sample_rate: Share of the centers in a step.
        logq: Which of the cluster parts corrects for the sampling.
        temperature: tau of `L_kl`.
        teacher_scale: The teacher's factor from cosines to logits, for `affinity`.
        affinity_scale: The student's for `affinity`; absent, its own `logit_scale`.
        share_scale: Whether the crossed parts use the student's `logit_scale` instead of one of their own.

    Raises:
        ValueError: A weight is unknown or negative, all are 0, or what a part needs is missing or of another width.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float],
        student_dim: int,
        teacher_dim: int | None = None,
        alignment: Literal["native", "linear"] = "native",
        centers: Float[Tensor, "centers dim"] | None = None,
        shard: Shard | None = None,
        head_scale: float = 16.0,
        train_head: bool = False,
        sample_rate: float = 1.0,
        logq: LogQ = "kl",
        temperature: float = 1.0,
        teacher_scale: float = 100.0,
        affinity_scale: float | None = None,
        share_scale: bool = False,
    ) -> None:
        super().__init__()
        self.weights = _checked_weights(weights)
        self.sample_rate, self.logq, self.temperature = sample_rate, logq, temperature
        self.teacher_scale, self.affinity_scale = teacher_scale, affinity_scale
        self.head: CenterHead | None = None
        self.image_map: nn.Linear | None = None
        self.text_map: nn.Linear | None = None
        self.instance_logit_scale: nn.Parameter | None = None
        self._last: dict[str, Tensor] = {}
        if self._uses(*OF_IMAGES, *OF_TEXTS):
            if teacher_dim is None:
                raise ValueError("teacher_dim is needed by the parts that compare student and teacher vectors")
            if alignment == "native" and student_dim != teacher_dim:
                raise ValueError(
                    f"alignment native needs a student as wide as the teacher, {teacher_dim}, got {student_dim}"
                )
            if alignment == "linear":
                self.image_map = _linear_map(student_dim, teacher_dim) if self._uses(*OF_IMAGES) else None
                self.text_map = _linear_map(student_dim, teacher_dim) if self._uses(*OF_TEXTS) else None
        if self._uses(*CLUSTER):
            if centers is None or centers.shape[1] != teacher_dim:
                shape = None if centers is None else tuple(centers.shape)
                raise ValueError(f"centers must be (K, {teacher_dim}) for the cluster parts, got {shape}")
            sparse = train_head and sample_rate < 1
            self.head = CenterHead(centers, scale=head_scale, trainable=train_head, sparse=sparse, shard=shard)
        if self._uses(*CROSSED) and not share_scale:
            self.instance_logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())

    def read(
        self, image: Float[Tensor, "rows student"] | None, text: Float[Tensor, "rows student"] | None
    ) -> dict[str, Tensor]:
        """What the losses see beside the student's own outputs, row by row.

        Everything of the objective that learns, but the head, acts here: gradients of rows lead to all of it.

        Args:
            image: Unit rows.
            text: Unit rows.

        Returns:
            `teacher_space_image` and `teacher_space_text` where a map is learned, `instance_scale` where it is.
        """
        found: dict[str, Tensor] = {}
        maps = ("teacher_space_image", image, self.image_map), ("teacher_space_text", text, self.text_map)
        for name, rows, linear in maps:
            if rows is not None and linear is not None:
                with autocast_off(rows):
                    found[name] = F.normalize(linear(at_least_float32(rows)), dim=1)
        if self.instance_logit_scale is not None:
            found["instance_scale"] = self.instance_logit_scale.exp()
        return found

    def forward(
        self,
        seen: Mapping[str, Tensor],
        targets: Targets,
        *,
        gather: Gather = Side.whole,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The parts by name, unweighted, each a scalar; only those with a weight above 0.

        Over ranks a part is this rank's share: the mean over the ranks is the part of the whole batch.

        Args:
            seen: The student's `image` and `text`, unit rows; its `logit_scale`, `exp` already taken; `logit_bias` where
                it has one; and what `read` returned for these.
            targets: For the same rows.
            gather: From a rank's rows to those of all ranks; its gradient is the sum over the ranks.
            generator: Where the negative centers come from; in the same state on every rank.

        Raises:
            ValueError: What a part needs is missing.
        """
        with autocast_off(seen["image"]):
            sides = _Sides(seen, targets, gather)
            self._last = {"mean_image_norm": torch.linalg.vector_norm(sides.image.all.detach().mean(dim=0))}
            parts = self._cluster_parts(self.head, sides, targets, generator) if self.head is not None else {}
            parts |= {name: self._part(name, sides, seen) for name in PARTS if name not in CLUSTER and self._uses(name)}
        return {name: parts[name] for name in PARTS if name in parts}

    def diagnostics(self) -> dict[str, float]:
        """`signs_of_collapse` in docs/method.md, of the last `forward`; a collapsed student has a mean image norm near 1.

        `mean_image_norm`: length of the mean of the student's image embeddings. `own_center`: share of images whose own
        center is the student's first among those of the step. `centers`, `negatives`: how many took part, and how many
        of them at random. `head_drift`: how far the centers moved. `instance_scale`: the learned factor.
        """
        found = {name: float(value) for name, value in self._last.items()}
        if self.head is not None:
            found["head_drift"] = self.head.drift()
        if self.instance_logit_scale is not None:
            found["instance_scale"] = float(self.instance_logit_scale.detach().exp())
        return found

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Hold the learned scale at its limit in place: clamping its use instead would leave it no gradient beyond."""
        if self.instance_logit_scale is not None:
            self.instance_logit_scale.clamp_(max=math.log(LARGEST_SCALE))

    def _uses(self, *parts: str) -> bool:
        return any(self.weights[part] > 0 for part in parts)

    def _part(self, name: str, sides: "_Sides", seen: Mapping[str, Tensor]) -> Tensor:
        scale = seen["logit_scale"]
        crossed = seen.get("instance_scale", scale)
        if name == "clip":
            return contrastive_loss(sides.image, sides.text, scale)
        if name == "siglip":
            return siglip_loss(sides.image, sides.text, scale, _given(seen.get("logit_bias"), "logit_bias"))
        if name == "instance_image":
            return instance_loss(sides.near_image, sides.teacher_text, crossed)
        if name == "instance_text":
            return instance_loss(sides.near_text, sides.teacher_image, crossed)
        if name == "affinity":
            own = scale if self.affinity_scale is None else torch.full_like(scale, self.affinity_scale)
            teacher = sides.teacher_image, sides.teacher_text, torch.full_like(scale, self.teacher_scale)
            return affinity_loss(sides.image, sides.text, own, *teacher)
        student = sides.near_image, sides.near_text, sides.teacher_image, sides.teacher_text
        return feature_loss(*student) if name == "feature" else one_way_instance_loss(*student, crossed)

    def _cluster_parts(
        self, head: CenterHead, sides: "_Sides", targets: Targets, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Both cluster parts on one sample of the centers.

        Where every rank has all centers it asks for its own rows only. Where each has some of them, all rows pass by
        each, and every rank has the parts of the whole batch.
        """
        labels = sides.gather(_given(targets.labels, "labels"))
        sample = head.sample(labels.all, rate=self.sample_rate, generator=generator)
        teacher = targets.soft_centers
        if head.shard is None:
            image = sides.near_image.own
            sample = replace(sample, labels=sample.labels[labels.first : labels.first + len(image)])
            if teacher is None and self._uses("cluster_kl"):
                teacher = _stored(targets.teacher_image, "teacher_image")
        else:
            image = sides.near_image.all
            if self._uses("cluster_kl"):
                teacher = sides.teacher_image.all
        found = head(image, sample, teacher=teacher, temperature=self.temperature, logq=self.logq)
        self._last["own_center"] = found.own_center
        self._last["centers"] = torch.tensor(len(sample.index))
        self._last["negatives"] = torch.tensor(sample.num_negatives)
        parts = {"cluster_cls": found.cls} if self._uses("cluster_cls") else {}
        if found.kl is not None and self._uses("cluster_kl"):
            parts["cluster_kl"] = found.kl
        return parts


class _Sides:
    """The rows of a batch as the parts want them, each gathered once and only if a part asks."""

    def __init__(self, seen: Mapping[str, Tensor], targets: Targets, gather: Gather) -> None:
        self.seen, self.targets, self.gather = seen, targets, gather

    @cached_property
    def image(self) -> Side:
        return self.gather(at_least_float32(self.seen["image"]))

    @cached_property
    def text(self) -> Side:
        return self.gather(at_least_float32(self.seen["text"]))

    @cached_property
    def near_image(self) -> Side:
        """In the teacher's space."""
        mapped = self.seen.get("teacher_space_image")
        return self.image if mapped is None else self.gather(at_least_float32(mapped))

    @cached_property
    def near_text(self) -> Side:
        mapped = self.seen.get("teacher_space_text")
        return self.text if mapped is None else self.gather(at_least_float32(mapped))

    @cached_property
    def teacher_image(self) -> Side:
        return self.gather(_stored(self.targets.teacher_image, "teacher_image"))

    @cached_property
    def teacher_text(self) -> Side:
        return self.gather(_stored(self.targets.teacher_text, "teacher_text"))


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    r"""The number to minimize; `L_total` and, over its cluster parts, `L_cluster` in docs/method.md.

    .. math:: L_{cluster} = w_{cls} L_{cls} + w_{kl} L_{kl}

    Raises:
        ValueError: There are no parts, or a part has no weight.
    """
    if not parts or not parts.keys() <= weights.keys():
        raise ValueError(f"weights must name every part, got parts {sorted(parts)} and weights {sorted(weights)}")
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum()


def _checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    if unknown := weights.keys() - set(PARTS):
        raise ValueError(f"weights must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if not all(0 <= weight < math.inf for weight in weights.values()):
        raise ValueError(f"weights must be finite and at least 0, got {dict(weights)}")
    if not any(weights.values()):
        raise ValueError("weights are all 0, so there is nothing to learn")
    return {part: float(weights.get(part, 0.0)) for part in PARTS}


def _linear_map(student_dim: int, teacher_dim: int) -> nn.Linear:
    """Orthogonal at first, so that the student's cosines are the same in the teacher's space (if that is no narrower)."""
    linear = nn.Linear(student_dim, teacher_dim, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear


def _stored(embedding: Tensor | None, name: str) -> Tensor:
    """A stored embedding at exactly unit length: float16 storage moves it by some 1e-4."""
    return F.normalize(at_least_float32(_given(embedding, name).detach()), dim=1)


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is needed by a part whose weight is above 0")
    return value
