"""A training so small that a step takes milliseconds."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import AugmentationCfg, image_transform
from PIL import Image
from torch import Tensor

from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.sets.evaluation_sets import EvaluationSet
from clip_cid.data.sets.labelled_images import Contents, LabelledImages
from clip_cid.method.distill.cluster_distillation import Shard
from clip_cid.method.distill.objective import Objective, weighted_sum
from clip_cid.models.clip import Clip
from clip_cid.recipe import PRESETS, DistillConfig, MachineConfig, PairsConfig
from clip_cid.training.bank import Bank
from clip_cid.training.batches import Batch, Batches, PairDataset, TrainingPairs
from clip_cid.training.lines import Lines
from clip_cid.training.loop import Plan, Trainer
from clip_cid.training.model import Distillation, Outputs
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.training.validation import HeldOut, Validation

DIM, CENTERS, TEXT_CENTERS, BATCH = 16, 12, 10, 8
STORED = {"cosine_image": 3.0, "cosine_text": 2.0, "bank_image": 5.0, "bank_text": 4.0}
OF_TEXT_CLUSTERS = {
    "text_cluster_cls": 1.5,
    "text_cluster_kl": 2.5,
    "cross_cluster_image": 3.5,
    "cross_cluster_text": 0.5,
}
EVERY_PART: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "the paper's, a head that learns": {"head_lr": 1e-3, "sample_rate": 1.0},
    "the paper's, mapped": {"alignment": "linear"},
    "the paper's, one scale": {"share_scale": True},
    "several labels": {"labels": 3, "ignore_near": 0.3},
    "clusters of texts": {"weights": OF_TEXT_CLUSTERS, "alignment": "linear"},
    "clusters of texts, a head that learns": {"weights": OF_TEXT_CLUSTERS, "head_lr": 1e-3, "sample_rate": 0.75},
    "CLIP's": {"weights": "clip-only"},
    "SigLIP's": {"weights": "siglip-only"},
    "open_clip's distillation": {"weights": "open-clip"},
    "CLIP-KD's": {"weights": "clip-kd", "alignment": "linear"},
    "TinyCLIP's": {"weights": "tiny-clip"},
    "those of stored vectors": {"weights": STORED, "alignment": "linear", "bank_size": 13},
    "the teacher's texts": {"weights": "clip-kd", "text_tower": "teacher"},
}
WEIGHTS = (
    PRESETS["clip-cid"].weights
    | {"siglip": 1.0, "affinity": 1.0, "feature": 2000.0, "icl": 1.0}
    | STORED
    | OF_TEXT_CLUSTERS
)
"""What a loss weighs in each of `EVERY_PART` that has it."""


def make_pairs(folder: Path, count: int = 21) -> Pairs:
    """Plain colors with two captions each; 21 pairs and batches of 8 cross the border of every epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:03d}.png"
        if not path.exists():
            color = random.integers(0, 200, 3) + random.integers(0, 56, (20, 24, 3))
            Image.fromarray(color.astype(np.uint8)).save(path)
            path.with_suffix(".txt").write_text(f"{number:02d} in one way\nno {number:02d}, otherwise\n")
    return open_pairs(PairsConfig(source=(str(folder),)))


def unit_rows(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_store(folder: Path, pairs: Pairs) -> EmbeddingStore:
    """Teacher embeddings of both captions of every pair."""
    if not (folder / "store.json").exists():
        count = len(pairs)
        writer = StoreWriter(folder, teacher={"reference": "noise"}, dim=DIM, fields=(), num_shards=1)
        rows = ShardRows(
            name="all",
            images=unit_rows(count, seed=1),
            texts=unit_rows(count, seed=2),
            more_texts=unit_rows(count, seed=3),
            ok=np.ones(count, dtype=bool),
            keys=pairs.keys(0, count),
            captions=[pairs.read(row).captions for row in range(count)],
            sizes=[(24, 20)] * count,
            fields={},
            skipped=[],
        )
        writer.add(rows)
        writer.finish()
    return EmbeddingStore.open(folder)


def training_pairs(folder: Path) -> TrainingPairs:
    pairs = make_pairs(folder / "pairs")
    store = make_store(folder / "store", pairs)
    rows = np.arange(len(pairs))
    labels = np.random.default_rng(4).integers(0, CENTERS, len(pairs))
    text_labels = np.random.default_rng(6).integers(0, TEXT_CENTERS, 2 * len(pairs))
    of_texts: dict[str, Any] = {"text_labels": text_labels, "first_texts": 2 * rows}
    return TrainingPairs(pairs, rows, labels, store, rows, store.num_captions, **of_texts)


def with_lines(training: TrainingPairs, *, count: int = 11, per_step: int = 4) -> TrainingPairs:
    """The same pairs with texts without images beside them."""
    texts = pa.array([f"{number} alone" for number in range(count)], pa.large_string())
    embeddings = unit_rows(count, seed=6).astype(np.float16)
    return dataclasses.replace(training, lines=Lines(texts, embeddings, per_step))


def tokenize(captions: list[str]) -> Tensor:
    """A letter is a token; 63 ends a text, because CLIP reads at the largest."""
    return torch.tensor([[*(1 + ord(letter) % 62 for letter in f"{text:7.7}"), 63] for text in captions])


def make_dataset(training: TrainingPairs, seed: int = 0) -> PairDataset:
    transform: Any = image_transform(16, is_train=True, aug_cfg=AugmentationCfg(scale=(0.5, 1.0)))
    return PairDataset(training, transform=transform, tokenizer=tokenize, max_pixels=10_000, seed=seed)


def make_batches(
    training: TrainingPairs,
    *,
    workers: int = 0,
    seed: int = 0,
    ranks: Ranks = ALONE,
    settings: DistillConfig | None = None,
) -> Batches:
    bank = None
    if settings is not None and settings.weights.any_reads_bank:
        bank = Bank(training, settings, ranks.device).at
    return Batches(
        training,
        make_dataset(training, seed),
        batch_size=BATCH,
        seed=seed,
        workers=workers,
        pin=False,
        ranks=ranks,
        bank=bank,
        per_cluster=None if settings is None else settings.per_cluster,
        shuffle_window=None if settings is None else settings.shuffle_window,
    )


def make_student(*, seed: int = 0, patch_dropout: float = 0.0, with_bias: bool = False) -> CLIP:
    vision = CLIPVisionCfg(image_size=16, patch_size=4, width=32, layers=1, head_width=16, patch_dropout=patch_dropout)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    torch.manual_seed(seed)
    return CLIP(DIM, vision, text, init_logit_bias=-10.0 if with_bias else None)


def make_clip(student: CLIP) -> Clip:
    """What a measurement needs beside the student's weights."""
    preprocess: Any = image_transform(16, is_train=False)
    return Clip(student, {"embed_dim": DIM}, {"size": 16}, tokenize, preprocess, "tiny")


class Stripes:
    """Three kinds of pictures; one cannot be read."""

    def name(self, row: int) -> str:
        return f"picture {row}"

    def load(self, row: int) -> Image.Image:
        if row == 4:
            raise BadSample("broken")
        return Image.fromarray(np.random.default_rng(row).integers(0, 80 * (1 + row % 3), (16, 16, 3), dtype=np.uint8))


def stripes(count: int = 30) -> EvaluationSet:
    labels = np.arange(count) % 3
    split = LabelledImages("stripes/test", labels, Contents(Path(), (), reading="1"), Stripes())
    return EvaluationSet("stripes", "here", ("aab", "zyx", "mno"), ("{c}", "q{c}"), "top1", {"test": split})


def make_validation(
    held_out: HeldOut | None, settings: DistillConfig, *, sets: Sequence[EvaluationSet] = (), ranks: Ranks = ALONE
) -> Validation:
    batches, clip = None, make_clip(make_student())
    if held_out is not None:
        dataset = PairDataset(held_out.pairs, transform=clip.preprocess, tokenizer=tokenize, max_pixels=10_000, seed=0)
        size = held_out.batch_size
        batches = Batches(held_out.pairs, dataset, batch_size=size, seed=0, workers=0, pin=False, ranks=ranks)
    return Validation(clip, batches, sets, settings.weights.model_dump(), settings.seed, ranks)


def make_settings(**changes: Any) -> DistillConfig:
    """All losses of the paper, random negatives in each step, a head that moves."""
    values: dict[str, Any] = {
        "batch_size": BATCH,
        "lr": 1e-3,
        "warmup_steps": 2,
        "head_lr": 1e-3,
        "sample_rate": 0.75,
        "log_every": 3,
    }
    # Weights that are not named are those of CLIP-CID, whatever the default of recipes becomes.
    if not isinstance(weights := changes.pop("weights", {}), str):
        weights = PRESETS["clip-cid"].weights | weights
    return DistillConfig.model_validate({**values, "weights": weights, **changes})


def make_trainer(
    folder: Path,
    out: Path,
    *,
    settings: DistillConfig | None = None,
    steps: int = 10,
    minutes: float = 60.0,
    workers: int = 0,
    patch_dropout: float = 0.25,
    training: TrainingPairs | None = None,
    max_bad_share: float = 0.01,
    ranks: Ranks = ALONE,
    validation: Validation | None = None,
    **machine: Any,
) -> Trainer:
    settings = settings or make_settings()
    out.mkdir(parents=True, exist_ok=True)
    model = make_model(settings, patch_dropout=patch_dropout, ranks=ranks)
    training = training or training_pairs(folder)
    batches = make_batches(training, workers=workers, seed=settings.seed, ranks=ranks, settings=settings)
    plan = Plan(steps=steps, key="tiny", max_bad_share=max_bad_share)
    how = MachineConfig.model_validate({"tensorboard": "off", "checkpoint_minutes": minutes, **machine})
    return Trainer(model, batches, settings, plan, out=out, ranks=ranks, machine=how, validation=validation)


class _PowerCut(BaseException):
    """Nothing that the product catches."""


@contextmanager
def power_cut(step: int) -> Iterator[None]:
    """Each training within ends before this step (the first is 0), with a checkpoint of that moment."""
    train_step = Trainer._train_step

    def interrupted(self: Trainer, batch: Batch) -> Any:
        if self.step == step:
            self._save()
            raise _PowerCut
        return train_step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(_PowerCut):
            yield


def make_model(settings: DistillConfig, *, patch_dropout: float = 0.0, ranks: Ranks = ALONE) -> Distillation:
    centers, shard = torch.from_numpy(unit_rows(CENTERS, seed=5)), None
    if settings.head_lr > 0 and ranks.size > 1:
        first, stop = Shard.bounds(CENTERS, ranks.rank, ranks.size)
        centers, shard = centers[first:stop], Shard(first, CENTERS, dist.distributed_c10d._get_default_group())
    objective = Objective(
        losses=settings.weights.switched_on,
        student_dim=DIM,
        teacher_dim=DIM,
        alignment=settings.alignment,
        centers=centers,
        shard=shard,
        text_centers=torch.from_numpy(unit_rows(TEXT_CENTERS, seed=7)),
        head_scale=settings.head_scale,
        train_head=settings.head_lr > 0,
        sample_rate=settings.sample_rate,
        logq=settings.logq,
        ignore_near=settings.ignore_near,
        affinity_scale=settings.affinity_scale,
        bank_scale=settings.bank_scale,
        share_scale=settings.share_scale,
        stored_texts=settings.keeps_text_tower,
        precision=settings.loss_precision,
    )
    bias = settings.weights.any_reads("logit_bias")
    student = make_student(seed=settings.seed, patch_dropout=patch_dropout, with_bias=bias)
    return Distillation(student, objective, lock=settings.lock)


def with_labels(batch: Batch, settings: DistillConfig) -> Batch:
    """With as many labels an image as the settings ask for."""
    if settings.labels == 1 or batch.labels is None:
        return batch
    return dataclasses.replace(batch, labels=(batch.labels[:, None] + torch.arange(settings.labels)) % CENTERS)


def exact(batch: Batch) -> Batch:
    """In float64, where what differs is not rounding."""
    doubles = {
        field.name: value.double()
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor) and value.is_floating_point()
    }
    return dataclasses.replace(batch, **doubles)


def loss_of(model: Distillation, batch: Batch, seen: Outputs) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return weighted_sum(model.objective(seen, batch.targets, generator=generator), WEIGHTS)
