"""The settings of the distill stage."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from clip_cid.loss_table import rows_of
from clip_cid.recipe.losses import OF_TEXT, PRESETS, LossWeights
from clip_cid.recipe.section import Config
from clip_cid.recipe.validation import ValidationConfig
from clip_cid.recipe.values import AUTO, Model, Places, PositiveOrAuto, Precision, Share, settled

OWN_TEXT_TOWER, TEACHERS_TEXT_TOWER = "own", "teacher"
"""The values of `distill.text_tower` that name no model."""
AUGMENTATIONS = ("color_jitter", "color_jitter_prob", "gray_scale_prob")


def _text_tower(value: str) -> str:
    if value not in (OWN_TEXT_TOWER, TEACHERS_TEXT_TOWER) and not re.search(r"[:/]", value):
        raise PydanticCustomError(
            "text_tower", "a text tower should be own, teacher, or of a model as local-dir:PATH or NAME/TAG"
        )
    return value


class DistillConfig(Config):
    """Train the student: CLIP loss, cluster-level and instance-level distillation (paper sections 3.2 and 3.3)."""

    student: Model = "ViT-B-32"
    """An open_clip model name, one of our small models (`cid-tiny`, `cid-small`, `cid-conv`,
    `cid-resnet`), or the path of a model config in JSON."""
    pretrained: Model | None = None
    """Start from these weights: an open_clip tag, a checkpoint of open_clip's training (.pt), the
    folder of an exported student, `run:path`, or `hf-hub:org/name`."""
    lock: Literal["none", "image", "text"] = "none"
    """Freeze one tower as it was loaded by `pretrained`: neither its weights nor its statistics
    change, and it has no dropout."""
    text_tower: Annotated[Model, AfterValidator(_text_tower)] = OWN_TEXT_TOWER
    """Whose text tower the student has. `own`: it trains one. `teacher`: it keeps the teacher's as it
    is, and only its image tower learns, against the stored text embeddings. The student then fits an
    index of the teacher's text embeddings. Embeddings made elsewhere do not name their teacher: give
    a model as in evaluate.compare (`local-dir:path`, `hf-hub:org/name`, `name/tag`, `run:path`)."""
    alignment: Literal["native", "linear"] = "native"
    """How the student meets the teacher's space. `native`: its own projection has the teacher's
    width. `linear`: one more linear map per modality is learned."""
    epochs: PositiveOrAuto = AUTO
    """Passes over the kept pairs. auto: the paper's 32, or fewer (at least 4) from three million pairs
    on, so that about a hundred million are seen."""
    per_cluster: PositiveInt | None = None
    """Take at most this many pairs of a cluster in an epoch, so that large clusters no longer lead. The
    pairs of a cluster take turns from epoch to epoch, and an epoch is shorter. When absent: all."""
    merged_captions: bool = False
    """Read the captions of removed near-duplicates beside those of the pair that was kept for them: in
    an epoch one of all, with the teacher's embedding of that very caption. Needs
    balance.merge_captions. Held-out pairs are measured on their own captions."""
    shuffle_window: PositiveInt | None = None
    """Read a shared disk in runs: shards (tars; 10,000 rows of a table or folder) come in a random
    order, pairs are shuffled among so many that follow each other there, and a batch is read front to
    back. Every pair is still seen once an epoch. Some twenty batches mix well. When absent: all pairs
    are shuffled together, which reads every image from another place."""
    steps: PositiveInt | None = None
    """Train for this many steps instead of epochs, whatever the number of pairs: for comparisons at
    equal steps."""
    batch_size: PositiveOrAuto = AUTO
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
    texts: Places = ()
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
        of_text = {} if settings.get("text_tower", OWN_TEXT_TOWER) == OWN_TEXT_TOWER else dict.fromkeys(OF_TEXT, 0.0)
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
        if training := [name for name in OF_TEXT if getattr(self.weights, name) > 0]:
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
