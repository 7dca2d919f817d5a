"""The whole objective: the modules trained beside the student, the losses by name, and their weighted sum."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clip_cid.loss_table import Loss, Reading, rows_of
from clip_cid.method.distill.arithmetic import LossKernels, LossPrecision, loss_precision
from clip_cid.method.distill.center_pass import SoftCenters
from clip_cid.method.distill.cluster_distillation import CenterHead, SampledCenters, Shard
from clip_cid.method.distill.cluster_passes import ClusterPass, passes_of
from clip_cid.method.distill.contrastive import Side
from clip_cid.method.distill.fused_cluster_loss import LogQ
from clip_cid.method.products import at_least_float32, autocast_off

LARGEST_SCALE = 100.0
FIRST_SCALE = 1 / 0.07

Gather = Callable[[Tensor], Side]


@dataclass(frozen=True)
class Targets:
    """Targets from the teacher and the clustering for the rows of this rank; absent if no loss reads them."""

    teacher_image: Float[Tensor, "rows teacher"] | None = None
    """Stored embeddings; no gradient flows into them."""
    teacher_text: Float[Tensor, "rows teacher"] | None = None
    """Stored embeddings of the captions the student saw."""
    labels: Int[Tensor, "rows ..."] | None = None
    """Cluster of each image, or several nearest centers."""
    soft_centers: SoftCenters | None = None
    """All that `L_kl` needs of the teacher, if it was computed beforehand."""
    bank_images: Float[Tensor, "bank teacher"] | None = None
    """Stored embeddings of a draw of all pairs, not of these rows; the same on every rank."""
    bank_texts: Float[Tensor, "bank teacher"] | None = None
    captioned: Bool[Tensor, " rows"] | None = None
    """Whether each row has a caption; absent if all have."""
    teacher_lines: Float[Tensor, "lines teacher"] | None = None
    """Stored embeddings of the texts without images that the student read beside these rows."""
    text_labels: Int[Tensor, " rows"] | None = None
    """Cluster of each caption the student saw."""


class Objective(nn.Module):
    r"""The losses of `L_total`, `L_cluster` and `L_instance` in docs/method.md, and all that learns beside the student.

    .. math:: L_{total} = w_{clip} L_{clip} + w_{cls} L_{cls} + w_{kl} L_{kl} + \beta\, [ I(v_t, u_s) + I(u_t, v_s) ]

    It computes the named losses, rows of `clip_cid.loss_table`, and builds only what these read;
    `weighted_sum` applies their weights. A loss that compares vectors of student and teacher reads the
    student in the teacher's space. The student is there already (`native`, both widths equal), or learns a
    linear map per modality, which no other loss reads (`linear`); `alignment` in docs/method.md.

    Args:
        losses: Names of the losses to compute.
        student_dim: Width of the student's embeddings.
        teacher_dim: Width of the teacher's embeddings and of the centers, for the losses that compare vectors.
        alignment: How the student's embeddings reach the teacher's width.
        centers: Unit rows, for the losses of the clusters; with `shard` this rank's.
        shard: Which of all centers these are; absent if they are all of them.
        text_centers: Unit rows, for the losses of the clusters of texts; all of them on every rank. They never move.
        head_scale: sigma, cosine against the centers to logits.
        scales: sigma of a pass over the centers, by the name of the pass (`cluster_passes`); else `head_scale`.
        train_head: Whether the centers of the images move.
        sample_rate: Share of the centers in a step.
        logq: Which losses of the clusters correct for the sampling.
        ignore_near: Centers nearer than this cosine to a label of an image are no negatives of it in `L_cls`; of the
            images' centers only.
        temperature: tau of `L_kl`.
        teacher_scale: The teacher's factor from cosines to logits, for `affinity`.
        affinity_scale: The student's for `affinity`; absent, its own `logit_scale`.
        bank_scale: S of the losses against the bank.
        share_scale: Whether the losses that cross the modalities use the student's `logit_scale` instead of one of
            their own.
        stored_texts: Whether the student's text tower is the teacher's, so that its text embeddings are the stored
            ones; `L_clip` is then that of locked-text tuning. `text_tower` in docs/method.md.
        precision: Of the products in the losses; `loss_precision` in docs/method.md.

    Raises:
        ValueError: There are no losses, one is unknown, or what a loss reads is missing or of another width.
    """

    def __init__(
        self,
        *,
        losses: Iterable[str],
        student_dim: int,
        teacher_dim: int | None = None,
        alignment: Literal["native", "linear"] = "native",
        centers: Float[Tensor, "centers dim"] | None = None,
        shard: Shard | None = None,
        text_centers: Float[Tensor, "text_centers text_dim"] | None = None,
        scales: Mapping[str, float] = MappingProxyType({}),
        head_scale: float = 16.0,
        train_head: bool = False,
        sample_rate: float = 1.0,
        logq: LogQ = "kl",
        ignore_near: float | None = None,
        temperature: float = 1.0,
        teacher_scale: float = 100.0,
        affinity_scale: float | None = None,
        bank_scale: float = 16.0,
        share_scale: bool = False,
        stored_texts: bool = False,
        precision: LossPrecision = "auto",
    ) -> None:
        super().__init__()
        self.losses = rows_of(losses)
        if not self.losses:
            raise ValueError("there are no losses, so there is nothing to learn")
        self._functions = {loss.name: loss.resolve() for loss in self.losses if not loss.reads_centers}
        self._passes, self._scales = passes_of({loss.name for loss in self.losses}), dict(scales)
        self.sample_rate, self.logq, self.temperature = sample_rate, logq, temperature
        self.ignore_near = ignore_near
        self.teacher_scale, self.affinity_scale, self.bank_scale = teacher_scale, affinity_scale, bank_scale
        self.stored_texts = stored_texts
        self.precision: LossPrecision = precision
        self.kernels: LossKernels = "auto"
        """Of whoever trains: they are a matter of the machine."""
        if stored_texts and (alignment != "native" or any(loss.trains_text_only for loss in self.losses)):
            raise ValueError("stored_texts needs alignment native and no loss that trains the text tower alone")
        self._last: dict[str, Tensor] = {}

        # The maps into the teacher's space.
        self.image_map: nn.Linear | None = None
        self.text_map: nn.Linear | None = None
        images, texts = self._any_reads("aligned_image"), self._any_reads("aligned_text")
        if images or texts:
            width = _aligned_width(student_dim, teacher_dim, alignment)
            if alignment == "linear":
                self.image_map = _linear_map(student_dim, width) if images else None
                self.text_map = _linear_map(student_dim, width) if texts else None

        # The cluster heads.
        self.head: CenterHead | None = None
        self.text_head: CenterHead | None = None
        if self._any_reads("clusters"):
            sparse = train_head and sample_rate < 1
            rows = _checked_centers(centers, teacher_dim, "centers")
            self.head = CenterHead(rows, scale=head_scale, trainable=train_head, sparse=sparse, shard=shard)
        if self._any_reads("text_clusters"):
            self.text_head = CenterHead(_checked_centers(text_centers, teacher_dim, "text_centers"), scale=head_scale)

        # The scale of the losses that cross the modalities.
        own_scale = self._any_reads("instance_scale") and not share_scale
        self.instance_logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log()) if own_scale else None

    def read(
        self,
        image: Float[Tensor, "rows student"] | None,
        text: Float[Tensor, "rows student"] | None,
        lines: Float[Tensor, "lines student"] | None = None,
    ) -> dict[str, Tensor]:
        """The values that losses read beside the student's own outputs, row by row.

        Everything of the objective that learns, except the head, acts here: gradients of rows lead to all of it.

        Args:
            image: Unit rows.
            text: Unit rows.
            lines: Unit rows of texts without images.

        Returns:
            `aligned_image`, `aligned_text` and `aligned_lines` where a map is learned, `instance_scale` where it is
            learned.
        """
        outputs: dict[str, Tensor] = {}
        for name, rows, linear in (
            ("aligned_image", image, self.image_map),
            ("aligned_text", text, self.text_map),
            ("aligned_lines", lines, self.text_map),
        ):
            if rows is not None and linear is not None:
                with autocast_off(rows):
                    outputs[name] = F.normalize(linear(at_least_float32(rows)), dim=1)
        if self.instance_logit_scale is not None:
            outputs["instance_scale"] = self.instance_logit_scale.exp()
        return outputs

    def forward(
        self,
        outputs: Mapping[str, Tensor],
        targets: Targets,
        *,
        gather: Gather = Side.whole,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The losses by name, unweighted, each a scalar.

        Over ranks a loss is this rank's share: the mean over the ranks is the loss of the whole batch.

        Args:
            outputs: The student's `image` and (unless they are stored) `text`, unit rows; its `lines` if it read texts
                without images, from which the losses that read a text alone learn as well; its `logit_scale`, `exp` already taken; `logit_bias`
                if it has one; and what `read` returned for these.
            targets: For the same rows.
            gather: From a rank's rows to those of all ranks; its gradient is the sum over the ranks.
            generator: Where the negative centers come from; in the same state on every rank.

        Raises:
            ValueError: What a loss reads is missing.
        """
        with autocast_off(outputs["image"]), loss_precision(self.precision, self.kernels):
            batch = _Batch(
                outputs,
                targets,
                gather,
                self.affinity_scale,
                self.teacher_scale,
                self.bank_scale,
                self.stored_texts,
            )
            self._last = {"mean_image_norm": torch.linalg.vector_norm(batch.image.all.detach().mean(dim=0))}
            if targets.captioned is not None:
                self._last["captioned"] = targets.captioned.float().mean()

            # The passes over the centers come first: the order in which losses are computed is that in which their
            # gradients are added up, and it decides the last bits.
            computed = self._cluster_losses(batch, generator)

            for loss in self.losses:
                if loss.name in self._functions:
                    read = batch.with_lines if loss.learns_from_texts else batch
                    computed[loss.name] = read.compute(loss, self._functions[loss.name])

        return {loss.name: computed[loss.name] for loss in self.losses}

    def diagnostics(self) -> dict[str, float]:
        """`signs_of_collapse` in docs/method.md, of the last `forward`.

        `mean_image_norm`: length of the mean of the student's image embeddings, near 1 for a collapsed
        student. `own_center`: share of images whose own center (or one of several) is the student's first among those
        of the step. `centers`, `negatives`: how many took part, and how many
        of them at random; with `text_` before them the same of the clusters of texts. `head_drift`: how far the centers
        moved. `instance_scale`: the learned factor. `captioned`: share of the images that
        have a caption, where it is optional.
        """
        numbers = {name: float(value) for name, value in self._last.items()}
        if self.head is not None:
            numbers["head_drift"] = self.head.drift()
        if self.instance_logit_scale is not None:
            numbers["instance_scale"] = float(self.instance_logit_scale.detach().exp())
        return numbers

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Clamp the learned scale in place: clamping its use instead would stop its gradient beyond the limit."""
        if self.instance_logit_scale is not None:
            self.instance_logit_scale.clamp_(max=math.log(LARGEST_SCALE))

    def _any_reads(self, reading: Reading) -> bool:
        return any(reading in loss.reads for loss in self.losses)

    def _cluster_losses(self, batch: "_Batch", generator: torch.Generator | None) -> dict[str, Tensor]:
        """The losses of the clusters, from one sample of each set of centers."""
        heads = {"clusters": self.head, "text_clusters": self.text_head}
        drawn: dict[str, tuple[CenterHead, SampledCenters]] = {}
        for name, head in heads.items():
            if head is not None:
                labels: Side = getattr(batch, name)
                sample = head.sample(labels.all, rate=self.sample_rate, generator=generator)
                if head.shard is None:  # a rank reads its own rows only
                    sample = replace(sample, labels=sample.labels[labels.first : labels.first + len(labels.own)])
                drawn[name] = head, sample

        computed: dict[str, Tensor] = {}
        for one in self._passes:
            computed |= self._over_centers(one, *drawn[one.centers], batch)

        for name, (_, sample) in drawn.items():
            prefix = _prefix(name)
            self._last[f"{prefix}centers"] = torch.tensor(len(sample.index))
            self._last[f"{prefix}negatives"] = sample.num_negatives
        return computed

    def _over_centers(
        self, one: ClusterPass, head: CenterHead, sample: SampledCenters, batch: "_Batch"
    ) -> dict[str, Tensor]:
        """The losses of one pass.

        If every rank has all centers, each reads its own rows only. If the centers are spread over ranks,
        every rank reads all rows, and has the losses of the whole batch.
        """
        student: Side = getattr(batch, one.student)
        compares = any(loss.name == one.name for loss in self.losses)

        # The rows to read, and what to compare them with.
        teacher = batch.targets.soft_centers if one.name == "cluster_kl" else None
        if head.shard is None:
            rows = student.own
            if teacher is None and compares:
                teacher = _stored(getattr(batch.targets, one.teacher), one.teacher)
        else:
            rows = student.all
            if compares:
                teacher = getattr(batch, one.teacher).all

        losses = head(
            rows,
            sample,
            teacher=teacher,
            temperature=self.temperature,
            logq=self.logq,
            ignore_near=self.ignore_near if one.cls == "cluster_cls" else None,
            scale=self._scales.get(one.name),
        )
        if one.cls is None:
            assert losses.kl is not None
            return {one.name: losses.kl}
        self._last[f"{_prefix(one.centers)}own_center"] = losses.own_center
        return {one.cls: losses.cls} | ({} if losses.kl is None else {one.name: losses.kl})


@dataclass
class _Batch:
    """The values that losses read: an attribute for each `Reading`, gathered once, and only if it is read."""

    outputs: Mapping[str, Tensor]
    targets: Targets
    gather: Gather
    fixed_affinity_scale: float | None
    fixed_teacher_scale: float
    fixed_bank_scale: float
    stored_texts: bool

    @cached_property
    def image(self) -> Side:
        return self.gather(at_least_float32(self.outputs["image"]))

    @cached_property
    def text(self) -> Side:
        return self.teacher_text if self.stored_texts else self.gather(at_least_float32(self.outputs["text"]))

    @cached_property
    def aligned_image(self) -> Side:
        mapped = self.outputs.get("aligned_image")
        return self.image if mapped is None else self.gather(at_least_float32(mapped))

    @cached_property
    def aligned_text(self) -> Side:
        mapped = self.outputs.get("aligned_text")
        return self.text if mapped is None else self.gather(at_least_float32(mapped))

    @cached_property
    def teacher_image(self) -> Side:
        return self.gather(_stored(self.targets.teacher_image, "teacher_image"))

    @cached_property
    def teacher_text(self) -> Side:
        return self.gather(_stored(self.targets.teacher_text, "teacher_text"))

    @cached_property
    def clusters(self) -> Side:
        return self.gather(_given(self.targets.labels, "labels"))

    @cached_property
    def text_clusters(self) -> Side:
        return self.gather(_given(self.targets.text_labels, "text_labels"))

    @cached_property
    def with_lines(self) -> "_Batch":
        """The texts alone, with those without images behind the captions of each rank."""
        if "lines" not in self.outputs:
            return self
        texts = {
            text: torch.cat([self.outputs[text], self.outputs[lines]])
            for text, lines in (("text", "lines"), ("aligned_text", "aligned_lines"))
            if lines in self.outputs
        }
        captions = _given(self.targets.teacher_text, "teacher_text")
        lines = _given(self.targets.teacher_lines, "teacher_lines")
        captioned = self.targets.captioned
        if captioned is not None:
            captioned = torch.cat([captioned, captioned.new_ones(len(lines))])
        texts_alone = torch.cat([captions, lines])
        targets = Targets(teacher_text=texts_alone, bank_images=self.targets.bank_images, captioned=captioned)
        return replace(self, outputs={**self.outputs, **texts}, targets=targets)

    @property
    def bank_images(self) -> Tensor:
        return _stored(self.targets.bank_images, "bank_images")

    @property
    def bank_texts(self) -> Tensor:
        return _stored(self.targets.bank_texts, "bank_texts")

    def compute(self, loss: Loss, function: Callable[..., Tensor]) -> Tensor:
        """A loss of the rows that take part in it."""
        values = [getattr(self, name) for name in loss.reads]
        if self.with_caption is None or not loss.reads_captions:
            return function(*values)
        return self.with_caption.mean(function, values)

    @cached_property
    def with_caption(self) -> "_Captioned | None":
        """The rows with a caption; None if all have one."""
        captioned = self.targets.captioned
        return None if captioned is None else _Captioned(self.gather(captioned.long()))

    @property
    def logit_scale(self) -> Tensor:
        return self.outputs["logit_scale"]

    @property
    def logit_bias(self) -> Tensor:
        return _given(self.outputs.get("logit_bias"), "logit_bias")

    @property
    def instance_scale(self) -> Tensor:
        return self.outputs.get("instance_scale", self.logit_scale)

    @property
    def affinity_scale(self) -> Tensor:
        fixed = self.fixed_affinity_scale
        return self.logit_scale if fixed is None else torch.full_like(self.logit_scale, fixed)

    @property
    def teacher_scale(self) -> Tensor:
        return torch.full_like(self.logit_scale, self.fixed_teacher_scale)

    @property
    def bank_scale(self) -> float:
        return self.fixed_bank_scale


class _Captioned:
    """The rows with a caption, for the losses that read one.

    Args:
        captioned: 1 for a row with a caption, else 0.
    """

    def __init__(self, captioned: Side) -> None:
        self._all = captioned.all.nonzero().flatten()
        alone = captioned.own is captioned.all  # then the host waits for a device once
        self._own = self._all if alone else captioned.own.nonzero().flatten()
        self._first = 0 if alone else int(captioned.all[: captioned.first].sum())
        ranks = len(captioned.all) // len(captioned.own)
        self._share = len(self._own) * ranks / max(len(self._all), 1)

    def mean(self, function: Callable[..., Tensor], values: Sequence[Side | Tensor | float]) -> Tensor:
        """A loss over these rows: the mean over the ranks is the mean over all such rows; 0 if there is none.

        Ranks with other numbers of rows exchange the same gradients, even one that has none.
        """
        if not len(self._all):
            return torch.stack([value.own.sum() for value in values if isinstance(value, Side)]).sum() * 0
        return self._share * function(*(self._of(value) if isinstance(value, Side) else value for value in values))

    def _of(self, side: Side) -> Side:
        every = side.all[self._all]
        if len(self._own):
            return Side(side.own[self._own], every, self._first)
        # A row of another rank stands in, with a weight of 0 and without a way back to that rank.
        return Side(every[:1].detach() + 0 * side.own.sum(), every, 0)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    r"""The number to minimize; `L_total` and, over the losses of the clusters, `L_cluster` in docs/method.md.

    .. math:: L_{cluster} = w_{cls} L_{cls} + w_{kl} L_{kl}

    Raises:
        ValueError: There are no losses, or a loss has no weight.
    """
    if not losses or not losses.keys() <= weights.keys():
        raise ValueError(f"weights must name every loss, got losses {sorted(losses)} and weights {sorted(weights)}")
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def _prefix(clusters: str) -> str:
    """How the diagnostics of a set of centers begin."""
    return "text_" if clusters == "text_clusters" else ""


def _checked_centers(centers: Tensor | None, teacher_dim: int | None, name: str) -> Tensor:
    if centers is None or centers.shape[1] != teacher_dim:
        shape = None if centers is None else tuple(centers.shape)
        raise ValueError(f"{name} must be (K, {teacher_dim}) for the losses of the clusters, got {shape}")
    return centers


def _aligned_width(student_dim: int, teacher_dim: int | None, alignment: str) -> int:
    """The width of the teacher's space, in which student and teacher are to be compared."""
    if teacher_dim is None:
        raise ValueError("teacher_dim is needed by the losses that compare student and teacher vectors")
    if alignment == "native" and student_dim != teacher_dim:
        raise ValueError(f"alignment native needs a student as wide as the teacher, {teacher_dim}, got {student_dim}")
    return teacher_dim


def _linear_map(student_dim: int, teacher_dim: int) -> nn.Linear:
    """A map that starts orthogonal: it keeps the student's cosines if the teacher's space is not narrower."""
    linear = nn.Linear(student_dim, teacher_dim, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear


def _stored(embedding: Tensor | None, name: str) -> Tensor:
    """A stored embedding at exactly unit length: float16 storage moves it by some 1e-4."""
    return F.normalize(at_least_float32(_given(embedding, name).detach()), dim=1)


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is missing, and a loss that is computed reads it")
    return value
