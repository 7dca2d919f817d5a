"""The training loop: student, losses by name, one sum, one step."""

import dataclasses
import hashlib
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clip_cid import log
from clip_cid.errors import DataError, RunError
from clip_cid.method.collapse import CollapseAlarm
from clip_cid.method.objective import LARGEST_SCALE, Objective, weighted_sum
from clip_cid.recipe import DistillConfig, Precision
from clip_cid.run_folder import write_json
from clip_cid.training import checkpoint
from clip_cid.training.batches import Batch, Batches
from clip_cid.training.checkpoint import LineFile
from clip_cid.training.optimizer import learning_rate_share, make_optimizers, set_learning_rate, shorten_gradients
from clip_cid.training.stop_requests import stop_requests
from clip_cid.training.stopwatch import Stopwatch

CHECKPOINTS = "checkpoints"


class Distillation(nn.Module):
    """Everything that learns, in one module: the student and what the objective adds to it."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student: Any = student  # open_clip's models share an interface, but no base class that declares it
        self.objective = objective

    def forward(
        self, batch: Batch, *, precision: torch.dtype, generator: torch.Generator
    ) -> dict[str, Float[Tensor, ""]]:
        """The parts of the loss by name, unweighted."""
        with torch.autocast(batch.images.device.type, dtype=precision, enabled=precision != torch.float32):
            image = self.student.encode_image(batch.images)
            text = self.student.encode_text(batch.texts)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return self.objective(
            image,
            text,
            self.student.logit_scale.exp(),
            teacher_image=batch.teacher_image,
            teacher_text=batch.teacher_text,
            soft_centers=batch.soft_centers,
            labels=batch.labels,
            generator=generator,
        )

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the student's factor between 1 and 100, as CLIP does; the objective looks after its own."""
        self.student.logit_scale.clamp_(0, math.log(LARGEST_SCALE))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is, and whose it is."""

    steps: int
    key: str
    """Digest of everything that decides the result: a checkpoint of another key is not gone on from."""
    checkpoint_minutes: float
    max_bad_share: float
    """Stop when more than this share of the pairs cannot be read."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One step in plain numbers."""

    loss: float
    parts: dict[str, float]
    lr: float
    grad_norm: float
    """Length of the whole gradient before it is shortened."""


class Trainer:
    """Trains a `Distillation` on one device, from wherever an earlier, killed attempt at the same work stopped."""

    def __init__(
        self,
        model: Distillation,
        batches: Batches,
        settings: DistillConfig,
        plan: Plan,
        *,
        out: Path,
        device: torch.device,
    ) -> None:
        self.model = model.to(device)
        self.batches, self.settings, self.plan, self.out, self.device = batches, settings, plan, out, device
        self.precision = resolve_precision(settings.precision, device)
        self.optimizers = make_optimizers(model.student, model.objective, settings, steps=plan.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.step = 0
        self.watch = Stopwatch()
        self.bad_rows: set[int] = set()
        self.last_line: dict[str, Any] = {}
        self.alarm = CollapseAlarm(patience=2 * settings.warmup_steps)

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the numbers people will ask about.

        Raises:
            RunError: A loss or a gradient is not finite, or the process was asked to end (after a checkpoint).
            DataError: Too many pairs cannot be read.
            KeyboardInterrupt: Ctrl-C (after a checkpoint).
        """
        self._resume()
        size, steps = self.batches.batch_size, self.plan.steps
        own_random = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
        shown = log.progress("distill", steps * size, unit="pairs", start=self.step * size)
        with own_random, stop_requests() as stop, shown as bar:
            self.model.train()
            for batch in self.watch.waiting(self.batches.between(self.step, steps)):
                self._note_bad(batch.bad)
                measured = self._train_step(batch.to(self.device))
                self.step += 1
                bar.advance(size, note=f"loss {measured.loss:.3f}, waits for data {self.watch.wait_share:.0%}")
                if self.step % self.settings.log_every == 0 or self.step == steps:
                    self._record(measured)
                if stop.requested or self.step == steps or self.watch.since_save >= 60 * self.plan.checkpoint_minutes:
                    self._save()
                stop.obey(self.step)
        return self._summary()

    def _train_step(self, batch: Batch) -> Measured:
        share = learning_rate_share(self.step, warmup_steps=self.settings.warmup_steps, steps=self.plan.steps)
        set_learning_rate(self.optimizers, share)
        parts = self.model(batch, precision=self.precision, generator=self._randomness())
        loss = weighted_sum(parts, self.settings.weights.model_dump())
        self._stop_unless_finite("loss", loss, parts, batch)
        grad_norm = self._gradients(loss)
        # float16 overflows now and then: its scaler then skips the step and scales less, until there is nothing to scale
        if self.scaler.get_scale() <= 1:
            self._stop_unless_finite("gradient", grad_norm, parts, batch)
        if bool(torch.isfinite(grad_norm)):  # else none may move: the scaler alone would ask each optimizer by itself
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.model.clamp_scale()
        return Measured(
            loss=loss.item(),
            parts={name: part.item() for name, part in parts.items()},
            lr=share * self.settings.lr,
            grad_norm=grad_norm.item(),
        )

    def _gradients(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Backward, shortened to `grad_clip_norm`; returns the length before."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        longest = self.settings.grad_clip_norm
        return shorten_gradients(self.model.parameters(), math.inf if longest is None else longest)

    def _randomness(self) -> torch.Generator:
        """What this step draws (negatives here, dropout from the global state) is a function of seed and step alone."""
        digest = hashlib.blake2b(f"{self.settings.seed} step {self.step}".encode(), digest_size=7).digest()
        seed = int.from_bytes(digest)
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def _record(self, measured: Measured) -> None:
        """A line of metrics.jsonl: every part by name, so that a sick one shows; scales as the factors they are."""
        size = self.batches.batch_size
        seconds, waited, steps = self.watch.lap(self.step)
        self.last_line = {
            "step": self.step,
            "pairs_seen": self.step * size,
            "epoch": self.step * size / len(self.batches.training),
            "loss": measured.loss,
            **{f"loss/{name}": part for name, part in measured.parts.items()},
            "lr": measured.lr,
            "grad_norm": measured.grad_norm if math.isfinite(measured.grad_norm) else None,
            "logit_scale": self.model.student.logit_scale.exp().item(),
            **self.model.objective.diagnostics(),
            "pairs_per_s": steps * size / seconds,
            "data_wait_share": waited / seconds,
        }
        self._watch_for_collapse(measured)
        self.metrics.append(self.last_line)

    def _watch_for_collapse(self, measured: Measured) -> None:
        """Say once, and in the line of the step, that the training looks like a collapse; it goes on."""
        signs = ("mean_image_norm", "own_center", "head_drift", "centers")
        numbers = {name: self.last_line.get(name) for name in signs}
        message = self.alarm.update(self.step, cluster_kl=measured.parts.get("cluster_kl"), **numbers)
        if message is not None:
            self.last_line["collapse"] = message
            log.warn(
                f"distill   step {self.step:,} looks like a collapse: {message} (docs/method.md, signs_of_collapse)"
            )

    def _note_bad(self, bad: list[tuple[int, str]]) -> None:
        """Record each unreadable pair once; stop when there are too many."""
        training = self.batches.training
        for row, reason in bad:
            if row not in self.bad_rows:
                self.bad_rows.add(row)
                self.skipped.append(self._skipped_line(row, reason))
        total = len(training) + len(training.left_out)
        if len(self.bad_rows) > self.plan.max_bad_share * total:
            raise DataError(
                f"{len(self.bad_rows):,} of {total:,} pairs cannot be read; {self.skipped.path} lists them.",
                fix=f"Mend or remove them, or raise pairs.max_bad_share (now {self.plan.max_bad_share:g}).",
            )

    def _skipped_line(self, row: int, reason: str) -> dict[str, Any]:
        pairs = self.batches.training.pairs
        shard = next(shard for shard in pairs.shards if row < shard.first_row + shard.rows)
        return {"row": row, "key": pairs.key(row), "shard": shard.name, "reason": reason}

    def _save(self) -> None:
        frozen = self._frozen()
        state = {
            "key": self.plan.key,
            "model": {name: value for name, value in self.model.state_dict().items() if name not in frozen},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "metrics_bytes": self.metrics.sync(),
            "skipped_bytes": self.skipped.sync(),
            "last_line": self.last_line,
            "alarm": self.alarm.state_dict(),
            "seconds": self.watch.seconds,
            "waited": self.watch.waited,
        }
        checkpoint.save(self.out / CHECKPOINTS, self.step, state)
        self.watch.saved()

    def _resume(self) -> None:
        """Take up the newest whole checkpoint, or start; the files of lines are cut to where it saw them."""
        state = checkpoint.load_newest(self.out / CHECKPOINTS, key=self.plan.key)
        self.metrics = LineFile(self.out / "metrics.jsonl", size=state["metrics_bytes"] if state else 0)
        self.skipped = LineFile(self.out / "skipped.jsonl", size=state["skipped_bytes"] if state else 0)
        if state is None:
            self._note_bad(list(self.batches.training.left_out.items()))
            return
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        assert set(missing) == self._frozen()
        assert not unexpected
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.scaler.load_state_dict(state["scaler"])
        self.alarm.load_state_dict(state["alarm"])
        self.bad_rows = {int(line["row"]) for line in self.skipped.read()}
        self.step, self.last_line = state["step"], state["last_line"]
        self.watch = Stopwatch(seconds=state["seconds"], waited=state["waited"], step=self.step)
        log.info(f"distill   goes on after step {self.step:,} of {self.plan.steps:,}")

    def _frozen(self) -> set[str]:
        """Names of what never changes: a frozen head may be gigabytes, and comes from the centers again."""
        return {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}

    def _stop_unless_finite(self, what: str, value: Tensor, parts: dict[str, Tensor], batch: Batch) -> None:
        if bool(torch.isfinite(value)):
            return
        step, pairs = self.step + 1, self.batches.training.pairs
        path = self.out / f"nonfinite-step-{step}.json"
        found = {
            "step": step,
            "what": what,
            "value": str(value.item()),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "parts": {name: str(part.item()) for name, part in parts.items()},
            "logit_scale": str(self.model.student.logit_scale.exp().item()),
            **{name: str(value) for name, value in self.model.objective.diagnostics().items()},
            "pairs": [{"row": int(row), "key": pairs.key(int(row))} for row in batch.rows],
        }
        write_json(path, found)
        raise RunError(
            f"Step {step:,}: the {what} is {value.item()} ("
            + ", ".join(f"{name} {part}" for name, part in found["parts"].items())
            + f"; learning rate {found['lr']:.3g}).",
            fix=f"Lower distill.lr or lengthen the warm-up, or look into the batch: {path}",
        )

    def _summary(self) -> dict[str, Any]:
        seen = self.step * self.batches.batch_size
        return {
            "steps": self.step,
            "pairs": len(self.batches.training),
            "pairs_seen": seen,
            "epochs": seen / len(self.batches.training),
            "unreadable_pairs": len(self.bad_rows),
            "seconds": self.watch.seconds,
            "pairs_per_s": seen / self.watch.seconds,
            "data_wait_share": self.watch.wait_share,
            **{name: value for name, value in self.last_line.items() if name.startswith("loss")},
            "collapse_alarm": self.alarm.fired,
            "precision": str(self.precision).removeprefix("torch."),
            **_peak_memory(self.device),
        }


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the student; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory this process (and, on CUDA, this device) has held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        peak["peak_device_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak
