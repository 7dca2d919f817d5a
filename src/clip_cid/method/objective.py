"""The whole objective: named parts, and their weighted sum."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clip_cid.method.center_pass import SoftCenters
from clip_cid.method.cluster_distillation import CenterHead
from clip_cid.method.contrastive import contrastive_loss
from clip_cid.method.fused_cluster_loss import LogQ
from clip_cid.method.instance_distillation import instance_loss
from clip_cid.method.precision import at_least_float32, autocast_off

PARTS = ("clip", "cluster_cls", "cluster_kl", "instance")
LARGEST_SCALE = 100.0
FIRST_SCALE = 1 / 0.07


class Objective(nn.Module):
    r"""Everything that learns beside the student, and the parts of `L_total`, `L_cluster` and `L_instance` in docs/method.md.

    .. math:: L_{total} = w_{clip} L_{clip} + w_{cls} L_{cls} + w_{kl} L_{kl} + \beta\, [ I(v_t, u_s) + I(u_t, v_s) ]

    A part whose weight is 0 is neither built nor computed. The cluster and the instance parts compare student and
    teacher vectors, so they read the student in the teacher's space: as it is (`native`, both widths equal), or through
    a learned linear map per modality that no other part sees (`linear`); `alignment` in docs/method.md.

    Args:
        weights: By the names in `PARTS`; absent is 0.
        student_dim: Width of the student's embeddings.
        teacher_dim: Width of the teacher's embeddings and of the centers; not needed by `clip` alone.
        alignment: How the student's embeddings reach the teacher's width.
        centers: Unit rows; needed by the cluster parts.
        head_scale: sigma, cosine against the centers to logits.
        train_head: Whether the centers in the head move.
        sample_rate: Share of the centers in a step.
        logq: Which of the cluster parts corrects for the sampling.
        temperature: tau of `L_kl`.

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
        head_scale: float = 16.0,
        train_head: bool = False,
        sample_rate: float = 1.0,
        logq: LogQ = "kl",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights = _checked_weights(weights)
        self.sample_rate, self.logq, self.temperature = sample_rate, logq, temperature
        self.head: CenterHead | None = None
        self.image_map: nn.Linear | None = None
        self.text_map: nn.Linear | None = None
        self.instance_logit_scale: nn.Parameter | None = None
        self._last: dict[str, Tensor] = {}
        if self._uses("cluster_cls", "cluster_kl", "instance"):
            if teacher_dim is None:
                raise ValueError("teacher_dim is needed by the cluster and instance parts")
            if alignment == "native" and student_dim != teacher_dim:
                raise ValueError(
                    f"alignment native needs a student as wide as the teacher, {teacher_dim}, got {student_dim}"
                )
            if alignment == "linear":
                self.image_map = _linear_map(student_dim, teacher_dim)
        if self._uses("cluster_cls", "cluster_kl"):
            if centers is None or centers.shape[1] != teacher_dim:
                shape = None if centers is None else tuple(centers.shape)
                raise ValueError(f"centers must be (K, {teacher_dim}) for the cluster parts, got {shape}")
            sparse = train_head and sample_rate < 1
            self.head = CenterHead(centers, scale=head_scale, trainable=train_head, sparse=sparse)
        if self._uses("instance"):
            if alignment == "linear" and teacher_dim is not None:
                self.text_map = _linear_map(student_dim, teacher_dim)
            self.instance_logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())

    def forward(
        self,
        student_image: Float[Tensor, "batch student"],
        student_text: Float[Tensor, "batch student"],
        logit_scale: Float[Tensor, ""],
        *,
        teacher_image: Float[Tensor, "batch teacher"] | None = None,
        teacher_text: Float[Tensor, "batch teacher"] | None = None,
        soft_centers: SoftCenters | None = None,
        labels: Int[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The parts by name, unweighted, each a float32 scalar; only those with a weight above 0.

        Args:
            student_image: Unit rows, the batch over all ranks; the others likewise.
            student_text: Unit rows.
            logit_scale: The student's factor s, `exp` already taken, as open_clip's models return it.
            teacher_image: Stored embeddings; no gradient flows into them.
            teacher_text: Stored embeddings of the captions the student saw.
            soft_centers: All that `L_kl` needs of the teacher, where it was computed beforehand.
            labels: Cluster of each image.
            generator: Where the negative centers come from.

        Raises:
            ValueError: What a part needs is missing.
        """
        with autocast_off(student_image):
            image, text = at_least_float32(student_image), at_least_float32(student_text)
            parts: dict[str, Tensor] = {}
            self._last = {"mean_image_norm": torch.linalg.vector_norm(image.detach().mean(dim=0))}
            if self._uses("clip"):
                parts["clip"] = contrastive_loss(image, text, logit_scale)
            if self._uses("cluster_cls", "cluster_kl", "instance"):
                image = _in_teacher_space(image, self.image_map)
            if self.head is not None:
                teacher = soft_centers
                if teacher is None and self._uses("cluster_kl"):
                    teacher = _stored(teacher_image, "teacher_image")
                parts |= self._cluster_parts(self.head, image, teacher, _given(labels, "labels"), generator)
            if self.instance_logit_scale is not None:
                text = _in_teacher_space(text, self.text_map)
                stored = _stored(teacher_image, "teacher_image"), _stored(teacher_text, "teacher_text")
                parts["instance"] = instance_loss(image, text, *stored, self._instance_scale(self.instance_logit_scale))
        return parts

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

    def _uses(self, *parts: str) -> bool:
        return any(self.weights[part] > 0 for part in parts)

    def _cluster_parts(
        self,
        head: CenterHead,
        image: Float[Tensor, "batch dim"],
        teacher: Float[Tensor, "batch dim"] | SoftCenters | None,
        labels: Int[Tensor, " batch"],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Both cluster parts on one sample of the centers."""
        sample = head.sample(labels, rate=self.sample_rate, generator=generator)
        found = head(image, sample, teacher=teacher, temperature=self.temperature, logq=self.logq)
        self._last["own_center"] = found.own_center
        self._last["centers"] = torch.tensor(len(sample.index))
        self._last["negatives"] = torch.tensor(sample.num_negatives)
        parts: dict[str, Tensor] = {}
        if self._uses("cluster_cls"):
            parts["cluster_cls"] = found.cls
        if found.kl is not None and self._uses("cluster_kl"):
            parts["cluster_kl"] = found.kl
        return parts

    @staticmethod
    def _instance_scale(log_scale: nn.Parameter) -> Tensor:
        """Held at its limit in place: clamping the result instead would leave a scale above the limit no gradient."""
        with torch.no_grad():
            log_scale.clamp_(max=math.log(LARGEST_SCALE))
        return log_scale.exp()


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


def _in_teacher_space(embedding: Float[Tensor, "batch student"], linear: nn.Linear | None) -> Tensor:
    return embedding if linear is None else F.normalize(linear(embedding), dim=1)


def _stored(embedding: Tensor | None, name: str) -> Tensor:
    """A stored embedding at exactly unit length: float16 storage moves it by some 1e-4."""
    return F.normalize(at_least_float32(_given(embedding, name).detach()), dim=1)


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is needed by a part whose weight is above 0")
    return value
