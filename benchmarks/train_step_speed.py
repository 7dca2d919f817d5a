"""What a training step costs: CLIP's loss alone, all losses of CLIP-CID, and open_clip's own loop on the same work.

    python benchmarks/train_step_speed.py                                    a small ViT, batch 256, K = 10,000 at rate 0.1
    python benchmarks/train_step_speed.py --student cid-tiny --batch 128
    python benchmarks/train_step_speed.py --device cuda --student ViT-B-32 --batch 1024 --dim 1280 --precision bf16

Every variant trains its own copy of one student on the same pixels and tokens, already decoded (the data wait of a real
run is a line of its metrics.jsonl). Variants take turns within a round of one process; seconds are wall clock of
`--steps` steps, and a ratio is the median of the ratios within a round.

- open_clip: `open_clip_train.train.train_one_epoch`, its ClipLoss, and AdamW as its `main` makes it.
- open_clip, fused: the same with `fused=True`, which its command line does not offer.
- clip: this trainer with `weights: clip-only`, lines of metrics included.
- clip-cid: this trainer with all four kinds of losses, the centers sampled, frozen, embeddings read from a float16 file.
- best: clip-cid, and the cosine loss of the texts.
- best, bank: the losses against a bank of `--bank` pairs too.
- clip-cid, all centers: the same at rate 1, with the soft centers computed before.
- clip, in 4 pieces: `machine.micro_batch` a quarter of the batch.
- online teacher: clip-cid with a teacher of `--teacher` that reads every batch, as other trainers do.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from open_clip_train.train import train_one_epoch

from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.method.distill.objective import Objective
from clip_cid.models.student import build_student
from clip_cid.recipe import PRESETS, DistillConfig, MachineConfig
from clip_cid.training.batches import BankRows, Batch, SoftTargets, unit_teacher_rows
from clip_cid.training.loop import Plan, Trainer
from clip_cid.training.model import Distillation
from clip_cid.training.ranks.distributed import Ranks

SMALL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
EXCLUDED = ("bn", "ln", "bias", "logit_scale")  # what open_clip's main keeps from decaying, by name


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    student: str = "small"
    """`small` (32 px, patch 4, width 128, 4 + 4 layers), or a model as in distill.student."""
    batch: int = 256
    dim: int = 512
    """Width of the teacher's and the student's embeddings."""
    centers: int = 10_000
    rate: float = 0.1
    bank: int = 16_384
    steps: int = 3
    """Steps of a variant in a round."""
    rounds: int = 7
    threads: int = 0
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    teacher: str = ""
    """An open_clip architecture for the online teacher; left out when empty."""
    out: Path | None = None


class Bench:
    """The work, and one function a variant that trains for some steps."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device(options.device)
        random = np.random.default_rng(0)
        clip = self.student()
        size = clip.image_side
        self.rows = 8 * options.batch
        self.images = torch.from_numpy(random.normal(size=(options.batch, 3, size, size)).astype(np.float32))
        length = clip.model_cfg["text_cfg"].get("context_length", 77)
        self.texts = torch.from_numpy(random.integers(1, 40_000, size=(options.batch, length)))
        self.texts[:, -1] = 49407
        self.store = {name: self._stored(name, random) for name in ("image", "text")}
        centers = random.normal(size=(options.centers, options.dim)).astype(np.float32)
        self.centers = F.normalize(torch.from_numpy(centers), dim=1)
        self.labels = torch.from_numpy(random.integers(0, options.centers, size=options.batch))
        self._made: dict[str, Callable[[], None]] = {}

    def student(self) -> Any:
        name = self.options.student
        if name == "small":
            name = str(self.folder / "small.json")
            Path(name).write_text(json.dumps(SMALL))
        return build_student(name, embed_dim=self.options.dim, seed=0)

    def _stored(self, name: str, random: np.random.Generator) -> np.ndarray:
        rows = random.normal(size=(self.rows, self.options.dim))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        path = self.folder / f"{name}.npy"
        np.save(path, rows.astype(np.float16))
        return np.load(path, mmap_mode="r")

    def run(self, name: str) -> None:
        if name not in self._made:
            self._made[name] = self._open_clip(fused="fused" in name) if "open_clip" in name else self._ours(name)
        self._made[name]()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _open_clip(self, *, fused: bool) -> Callable[[], None]:
        options = self.options
        model: Any = self.student().model.to(self.device)
        model.output_dict = True
        named = list(model.named_parameters())
        plain = [value for name, value in named if value.ndim < 2 or any(part in name for part in EXCLUDED)]
        decay = [value for name, value in named if not (value.ndim < 2 or any(part in name for part in EXCLUDED))]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.2}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=fused or None)
        args = Namespace(
            device=options.device, precision={"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}[options.precision],
            distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=1.0, horovod=False, rank=0, local_rank=0,
            log_every_n_steps=10, world_size=1, batch_size=options.batch, wandb=False, log_local=False, distributed=False,
        )  # fmt: skip
        scaler = torch.amp.GradScaler(options.device) if options.precision == "fp16" else None

        class Loader(list[Any]):
            num_batches, num_samples = options.steps, options.steps * options.batch

        batches = Loader([(self.images, self.texts)] * options.steps)
        data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
        loss = open_clip.ClipLoss()
        return lambda: train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, args)

    def _ours(self, name: str) -> Callable[[], None]:
        options = self.options
        plain, dense = name.startswith("clip,") or name == "clip", "all centers" in name
        weights = dict(PRESETS["clip-only" if plain else "best" if name.startswith("best") else "clip-cid"].weights)
        if "bank" in name:
            weights |= {"bank_image": 2.0, "bank_text": 2.0}
        settings = DistillConfig.model_validate(
            {
                "batch_size": options.batch, "lr": 1e-4, "warmup_steps": 0, "precision": options.precision,
                "sample_rate": 1.0 if dense else options.rate, "weights": weights,
            }
        )  # fmt: skip
        machine = MachineConfig(tensorboard="off", micro_batch=options.batch // 4 if "pieces" in name else None)
        objective = Objective(
            losses=settings.weights.switched_on, student_dim=options.dim, teacher_dim=options.dim,
            centers=None if plain else self.centers, sample_rate=settings.sample_rate,
        )  # fmt: skip
        out = self.folder / name.replace(" ", "-")
        out.mkdir()
        model = Distillation(self.student().model, objective)
        batches: Any = SimpleNamespace(batch_size=options.batch, epoch_size=self.rows, training=_Rows(self.rows))
        trainer = Trainer(
            model, batches, settings, Plan(10**6, "benchmark", 0.0), out=out, ranks=Ranks(device=self.device),
            machine=machine,
        )  # fmt: skip
        trainer._resume()
        trainer.learner.joint.train()
        soft = self._soft_targets() if dense else None
        online = self._teacher() if "online" in name else None
        bank = self._bank() if settings.weights.any_reads_bank else None

        def steps() -> None:
            for _ in range(options.steps):
                batch = self._batch(trainer.step, plain=plain, soft=soft)
                if online is not None:
                    batch = online(batch)
                if bank is not None:
                    batch = dataclasses.replace(batch, bank=bank)
                measured = trainer._train_step(batch.to(trainer._copies))
                trainer.progress.step += 1
                if trainer._is_recorded(trainer.step):
                    trainer._record(measured)

        return steps

    def _batch(self, step: int, *, plain: bool, soft: SoftTargets | None) -> Batch:
        rows = np.random.default_rng(step).permutation(self.rows)[: self.options.batch]
        batch = Batch(rows, [], self.images, self.texts)
        if plain:
            return batch
        read = {name: unit_teacher_rows(store[rows], rows, name) for name, store in self.store.items()}
        return dataclasses.replace(
            batch,
            teacher_image=read["image"],
            teacher_text=read["text"],
            labels=self.labels,
            soft_centers=None if soft is None else soft.of(rows),
        )

    def _bank(self) -> BankRows:
        random = np.random.default_rng(1)
        rows = random.normal(size=(2, self.options.bank, self.options.dim)).astype(np.float32)
        images, texts = F.normalize(torch.from_numpy(rows), dim=2).to(self.device)
        return BankRows(images, texts)

    def _soft_targets(self) -> SoftTargets:
        teacher = unit_teacher_rows(np.asarray(self.store["image"]), np.arange(self.rows), "image")
        found = soft_centers(teacher, self.centers, scale=16.0)
        return SoftTargets(found.mean.numpy(), found.entropy.numpy(), found.sharpness)

    def _teacher(self) -> Callable[[Batch], Batch]:
        teacher: Any = build_student(self.options.teacher, embed_dim=self.options.dim).model.to(self.device).eval()
        size = teacher.visual.image_size
        size = size if isinstance(size, int) else size[0]
        images = F.interpolate(self.images, size=(size, size)).to(self.device)
        texts = self.texts[:, -1:].expand(-1, teacher.context_length).contiguous().to(self.device)

        @torch.no_grad()
        def read(batch: Batch) -> Batch:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision != "fp32"):
                image, text = teacher.encode_image(images), teacher.encode_text(texts)
            rows = {
                "teacher_image": F.normalize(image.float(), dim=1),
                "teacher_text": F.normalize(text.float(), dim=1),
            }
            return dataclasses.replace(batch, **rows)

        return read


class _Rows:
    """As many pairs as there are stored rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.left_out: dict[int, str] = {}
        self.lines = None

    def __len__(self) -> int:
        return self._rows


def interleaved(options: Options, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds a step of each variant in each round; the variants take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in names:  # allocators, caches and clocks settle
            bench.run(name)
        for number in range(options.rounds):
            for name in names if number % 2 else names[::-1]:
                began = time.perf_counter()
                bench.run(name)
                seconds[name].append((time.perf_counter() - began) / options.steps)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def main(options: Options) -> None:
    """Measure, print a table and write the numbers."""
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ["open_clip", "open_clip, fused", "clip", "clip-cid", "best", "best, bank", "clip-cid, all centers"]
    names += ["clip, in 4 pieces"]
    names += ["online teacher"] if options.teacher else []
    seconds = interleaved(options, names)
    print(
        f"\nbatch {options.batch}, {options.student}, width {options.dim}, K = {options.centers:,}, {options.precision}"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, {options.rounds} rounds\n")
    print("| variant | ms a step | / clip | / open_clip |\n|---|---|---|---|")
    for name in names:
        ratios = [ratio(seconds, name, base) for base in ("clip", "open_clip")]
        print(f"| {name} | {1000 * statistics.median(seconds[name]):.1f} | {ratios[0]:.3f} | {ratios[1]:.3f} |")
    if options.out is not None:
        options.out.write_text(json.dumps({"options": str(options), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
