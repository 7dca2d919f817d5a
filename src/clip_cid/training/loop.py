"""The training loop: student, losses by name, one sum, one step."""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_cid import log, tasks, units
from clip_cid.errors import RunError
from clip_cid.method.distill.collapse import CollapseAlarm
from clip_cid.method.distill.objective import weighted_sum
from clip_cid.recipe import DistillConfig, MachineConfig, Precision
from clip_cid.run_folder import write_json
from clip_cid.training import checkpoint
from clip_cid.training.average import Average
from clip_cid.training.bad_pairs import BadPairs
from clip_cid.training.batches import Batch, Batches
from clip_cid.training.model import Distillation, Seen, backward_in_pieces, step_seed
from clip_cid.training.optimizer import (
    learning_rate_share,
    make_optimizers,
    scheduled,
    set_learning_rate,
    shorten_gradients,
)
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.training.ranks.head_rows import HeadRows
from clip_cid.training.ranks.parallel import (
    forget_whole,
    is_spread,
    join_model,
    load_model,
    load_optimizer,
    running_statistics,
    whole,
)
from clip_cid.training.records import Records, make_listeners
from clip_cid.training.stop_requests import stop_requests
from clip_cid.training.stopwatch import Stopwatch
from clip_cid.training.validation import Best, Numbers, Validation

CHECKPOINTS = "checkpoints"
_SLOW_DATA = 0.1  # of the time: more waiting than this is said once


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is, and whose it is."""

    steps: int
    key: str
    """Digest of everything that decides the result: a checkpoint of another key is not gone on from."""
    max_bad_share: float
    """Stop when more than this share of the pairs cannot be read."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One step in plain numbers, of the whole batch."""

    loss: float
    parts: dict[str, float]
    lr: float
    grad_norm: float
    """Length of the whole gradient before it is shortened."""
    part_norms: dict[str, float]
    """Length of what each weighted part asks of the embeddings; of the steps that are written down."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Trainer:
    """Trains a `Distillation` from wherever an earlier, killed attempt at the same work stopped."""

    def __init__(
        self,
        model: Distillation,
        batches: Batches,
        settings: DistillConfig,
        plan: Plan,
        *,
        out: Path,
        ranks: Ranks = ALONE,
        machine: MachineConfig | None = None,
        validation: Validation | None = None,
    ) -> None:
        self.model = model.to(ranks.device)
        self.batches, self.settings, self.plan, self.out = batches, settings, plan, out
        self._statistics = running_statistics(model.student)
        self.ranks, self.validation = ranks, validation
        self.machine = machine = machine or MachineConfig()
        self.precision = resolve_precision(settings.precision, ranks.device)
        if machine.compile:
            model.compile()
        self.joint = join_model(model, ranks, fsdp=machine.fsdp)
        self.optimizers = make_optimizers(model.student, model.objective, settings, steps=plan.steps)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == torch.float16)
        self.average = Average(model.student, decay=settings.ema_decay) if settings.ema_decay else None
        self.best = Best(settings.validation.metric, settings.validation.patience)
        self.head_rows = HeadRows(model.objective.head, self.optimizers, out / CHECKPOINTS, ranks)
        self.step, self.skipped_steps, self._in_succession = 0, 0, 0
        self.watch = Stopwatch()
        self.bad = BadPairs(batches.training, out / "skipped.jsonl", max_share=plan.max_bad_share)
        self.last_line: dict[str, Any] = {}
        self.alarm = CollapseAlarm(patience=2 * settings.warmup_steps)

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the numbers people will ask about.

        Raises:
            RunError: Too many steps in succession are not finite, ranks differ, or the process was asked to end
                (after a checkpoint).
            DataError: Too many pairs cannot be read.
            KeyboardInterrupt: Ctrl-C (after a checkpoint).
        """
        self._resume()
        size, steps = self.batches.batch_size, self.plan.steps
        device = self.ranks.device
        own_random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        shown = log.progress("distill", steps * size, unit="pairs", start=self.step * size)
        with own_random, stop_requests() as stop, shown as bar, contextlib.ExitStack() as batches:
            self.joint.train()
            waiting = self.watch.waiting(self.batches.between(self.step, self._last_step))
            for batch in batches.enter_context(contextlib.closing(waiting)):
                self.bad.note(batch.bad)
                measured = self._train_step(batch.to(device))
                self.step += 1
                bar.advance(size, note=self._note(measured))
                if self._is_recorded(self.step):
                    self._record(measured)
                if self._measures_now() and self._measure():
                    break
                stop.number = self._save_if_due(stop.number)
                stop.obey(self.step)
        return self._summary()

    def rehearse(self, batch: Batch) -> Generator[Measured]:
        """The first step again and again, on one batch: what a step costs, in a training that is then thrown away."""
        self._resume()
        self.joint.train()
        while True:
            yield self._train_step(batch.to(self.ranks.device))

    @property
    def _last_step(self) -> int:
        """Where to stop; a training that had stopped early does not begin again."""
        return self.step if self.best.is_past else self.plan.steps

    def _train_step(self, batch: Batch) -> Measured:
        share = learning_rate_share(self.step, warmup_steps=self.settings.warmup_steps, steps=self.plan.steps)
        set_learning_rate(self.optimizers, share)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        parts: dict[str, Tensor] = {}
        norms: dict[str, float] = {}

        def loss_of(seen: Seen) -> Tensor:
            weights = self._weights()
            parts.update(self._parts(seen, batch))
            if self._is_recorded(self.step + 1):
                norms.update(self._part_norms(parts, seen, weights))
            return self.scaler.scale(weighted_sum(parts, weights))

        statistics = [value.clone() for value in self._statistics]
        seed = step_seed(self.settings.seed, self.step, self.ranks.rank)
        backward_in_pieces(
            self.joint, batch, loss_of, micro_batch=self.machine.micro_batch, precision=self.precision, seed=seed
        )
        grad_norm = self._shortened()
        values = torch.stack([part.detach().float() for part in parts.values()]).tolist()
        numbers = self.ranks.mean(dict(zip(parts, values, strict=True)))
        weights = self._weights()
        total = sum(weights[name] * value for name, value in numbers.items())
        measured = Measured(total, numbers, share * self.settings.lr, grad_norm.item(), norms)
        if not measured.is_finite:
            for value, before in zip(self._statistics, statistics, strict=True):
                value.copy_(before)
        self._move(measured, batch)
        return measured

    def _parts(self, seen: Seen, batch: Batch) -> dict[str, Tensor]:
        generator = torch.Generator(self.ranks.device).manual_seed(step_seed(self.settings.seed, self.step))
        return self.model.objective(seen, batch.targets, gather=self.ranks.gather, generator=generator)

    def _weights(self) -> dict[str, float]:
        """The weights of this step."""
        weights, share = self.settings.weights.model_dump(), self.step / self.plan.steps
        return {
            name: weight * scheduled(self.settings.schedule.get(name, ()), share) for name, weight in weights.items()
        }

    def _part_norms(self, parts: Mapping[str, Tensor], seen: Seen, weights: Mapping[str, float]) -> dict[str, float]:
        """How hard each part pulls at the embeddings (those of the student and those in the teacher's space)."""
        rows = [value for value in seen.values() if value.ndim]
        squares: list[Tensor] = []
        for name, part in parts.items():
            pulls = torch.autograd.grad(weights[name] * part, rows, retain_graph=True, allow_unused=True)
            squares.append(torch.stack([pull.square().sum() for pull in pulls if pull is not None]).sum())
        lengths = self.ranks.sum(torch.stack(squares)).sqrt() / self.ranks.size
        return dict(zip(parts, lengths.tolist(), strict=True))

    def _shortened(self) -> Tensor:
        """Shorten the gradient to `grad_clip_norm`; returns its length before."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        head = self.model.objective.head
        spread = head is not None and head.shard is not None
        parameters = [
            (parameter, is_spread(name, parameter, spread)) for name, parameter in self.model.named_parameters()
        ]
        longest = self.settings.grad_clip_norm
        return shorten_gradients(parameters, math.inf if longest is None else longest, self.ranks)

    def _move(self, measured: Measured, batch: Batch) -> None:
        """Let the optimizers move, unless something is not finite: then nothing does, and it is counted.

        Float16 overflows now and then and is no illness: its scaler then scales less, until there is nothing to scale.
        """
        if measured.is_finite:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.model.clamp_scales()
            if self.average is not None:
                self.average.update()
            self._in_succession = 0
        elif not math.isfinite(measured.loss) or self.scaler.get_scale() <= 1:
            self._skip(measured, batch)
        if self.scaler.is_enabled():
            self._rescale(measured.is_finite)

    def _rescale(self, finite: bool) -> None:
        """As `GradScaler.update`, which knows of overflow only what the optimizers that were stepped have found."""
        if finite:
            self.scaler.update()
        else:
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
            # a scale that is given leaves the count of finite steps as it was
            self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})

    def _skip(self, measured: Measured, batch: Batch) -> None:
        """The weights stay; what is needed to look into it and to do it again is kept.

        Raises:
            RunError: It has happened too often in succession.
        """
        if self._in_succession == 0:
            self._save()  # before this step, so that the same command does it again
            self.first_skipped = self._dump(measured, batch)
        self._in_succession += 1
        self.skipped_steps += 1
        what = "gradient" if math.isfinite(measured.loss) else "loss"
        log.warn(f"distill   step {self.step + 1:,} is skipped: its {what} is not finite ({self.first_skipped})")
        if self._in_succession > self.settings.skip_limit:
            raise RunError(
                f"{self._in_succession} steps in succession are not finite, the last of them step {self.step + 1:,}: "
                f"the {what} is {measured.grad_norm if what == 'gradient' else measured.loss} ("
                + ", ".join(f"{name} {part}" for name, part in measured.parts.items())
                + f"; learning rate {measured.lr:.3g}).",
                fix=f"The same command does the first of them again; its batch is in {self.first_skipped}. "
                "Lower distill.lr, lengthen the warm-up, or mend the data.",
            )

    def _dump(self, measured: Measured, batch: Batch) -> Path:
        """Step, parts and the pairs of the batch, over all ranks."""
        pairs = self.batches.training.pairs
        rows = [int(row) for part in self.ranks.all(batch.rows.tolist()) for row in part]
        path = self.out / f"nonfinite-step-{self.step + 1}.json"
        found = {
            "step": self.step + 1,
            "seed": step_seed(self.settings.seed, self.step),
            "what": "gradient" if math.isfinite(measured.loss) else "loss",
            "loss": str(measured.loss),
            "grad_norm": str(measured.grad_norm),
            "lr": measured.lr,
            "parts": {name: str(part) for name, part in measured.parts.items()},
            "logit_scale": str(whole(self.model.student.logit_scale.detach()).exp().item()),
            **{name: str(value) for name, value in self.model.objective.diagnostics().items()},
            "pairs": [{"row": row, "key": pairs.key(row)} for row in rows],
        }
        if self.ranks.is_first:
            write_json(path, found)
        return path

    def _is_recorded(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.plan.steps

    def _note(self, measured: Measured) -> str:
        parts = " ".join(f"{name} {value:.3f}" for name, value in measured.parts.items())
        waiting, memory = units.percent(self.watch.wait_share, 0), units.memory(tasks.peak_memory())
        return f"loss {measured.loss:.3f} ({parts}), waits for data {waiting}, {memory}"

    def _record(self, measured: Measured) -> None:
        """A line of metrics.jsonl: every part by name, so that a sick one shows; scales as the factors they are."""
        size = self.batches.batch_size
        seconds, waited, steps = self.watch.lap(self.step)
        own = {**self.model.objective.diagnostics(), "data_wait_share": waited / seconds}
        self.last_line = {
            "step": self.step,
            "pairs_seen": self.step * size,
            "epoch": self.step * size / len(self.batches.training),
            "loss": _finite(measured.loss),
            **{f"loss/{name}": _finite(part) for name, part in measured.parts.items()},
            "lr": measured.lr,
            "grad_norm": _finite(measured.grad_norm),
            **{f"grad_norm/{name}": _finite(length) for name, length in measured.part_norms.items()},
            "logit_scale": whole(self.model.student.logit_scale.detach()).exp().item(),
            **{name: _finite(value) for name, value in self.ranks.mean(own).items()},
            "pairs_per_s": steps * size / seconds,
            "skipped_steps": self.skipped_steps,
            **_memory(self.ranks.device),
        }
        self._watch_for_collapse(measured)
        if self.records is not None:
            self.records.append(self.last_line)
        if self.watch.is_slow(_SLOW_DATA):
            log.warn(
                f"distill   {units.percent(self.watch.wait_share, 0)} of the time goes into waiting for pairs to be read"
                f" and decoded; raise machine.workers (now {self.machine.workers}), or store smaller images"
            )

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

    def _measures_now(self) -> bool:
        if self.validation is None:
            return False
        size = self.batches.batch_size
        every = self.settings.validation.every or len(self.batches.training)
        before, now = ((step * size) // every for step in (self.step - 1, self.step))
        return now > before or self.step == self.plan.steps

    def _measure(self) -> bool:
        """Measure the student; returns whether the training ends here."""
        assert self.validation is not None
        with self.watch.pause(), self._averaged():
            numbers = self.validation.measure(self.joint, self.model, precision=self.precision, note_bad=self.bad.note)
            better = self.best.is_new(numbers, self.step)
            if better and self.settings.validation.keep == "best":
                self._save_best(numbers)
        if self.records is not None:
            about = {"step": self.step, "pairs_seen": self.step * self.batches.batch_size}
            self.records.append(about | {name: _finite(value) for name, value in numbers.items()})
        names = ("val/loss", "val/retrieval", "val/zero_shot")
        shown = ", ".join(f"{name[4:]} {numbers[name]:.3f}" for name in names if name in numbers)
        log.info(f"distill   step {self.step:,}: {shown} on what it has not learned{' (the best)' if better else ''}")
        if not self.best.is_past:
            return False
        log.info(f"distill   stops early: no better {self.best.metric} than at step {self.best.step:,}")
        self._save()
        return True

    @contextlib.contextmanager
    def _averaged(self) -> Generator[None]:
        """The student has the weights to leave, for as long as the block lasts."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            yield
        forget_whole(self.joint)  # or the next step would see the average

    def _save_best(self, numbers: Numbers) -> None:
        state = whole(dict(self.model.student.state_dict()))
        if self.ranks.is_first:
            about = {"key": self.plan.key, "step": self.step, "numbers": numbers}
            checkpoint.save_best(self.out / CHECKPOINTS, {**about, "student": state})

    def student_state(self) -> dict[str, Tensor]:
        """The weights to leave: plain tensors, on every rank; the average or the best where the recipe asks for it."""
        if self.settings.validation.keep == "best":
            return checkpoint.load_best(self.out / CHECKPOINTS, key=self.plan.key)["student"]
        with self._averaged():
            state = whole(dict(self.model.student.state_dict()))
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    def objective_state(self) -> dict[str, Tensor]:
        """What was learned beside the student: plain tensors; every rank calls it, the rows of all have only the first."""
        rows = self.head_rows.names
        learned = {
            name: value
            for name, value in self.model.objective.named_parameters()
            if value.requires_grad and f"objective.{name}" not in rows
        }
        state = {name: value.detach().cpu().clone() for name, value in whole(learned).items()}
        if self.ranks.is_first:
            state |= self.head_rows.of_all(self.step)
        return state

    def _save_if_due(self, stop: int) -> int:
        """All ranks save together: at the end, when the first one finds it is time, and when any is asked to end.

        Args:
            stop: The signal that asks this rank to end; 0 for none.

        Returns:
            The signal that asks any of them to.
        """
        due = self.watch.since_save >= 60 * self.machine.checkpoint_minutes
        due = due and self._in_succession == 0  # the newest is from before the steps that are skipped
        told = 2 * stop + (due and self.ranks.is_first)
        stop, due = divmod(self.ranks.largest(told), 2)
        if due or stop or self.step == self.plan.steps:
            self._save()
        return stop

    def _save(self) -> None:
        self.bad.gather(self.ranks)
        self.head_rows.save(self.step)
        elsewhere, model = self._elsewhere(), self.model.state_dict()
        state = {
            "key": self.plan.key,
            "model": whole({name: value for name, value in model.items() if name not in elsewhere}),
            "optimizers": [whole(self.head_rows.without_rows(optimizer)) for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "best": dataclasses.asdict(self.best),
            "skipped_steps": self.skipped_steps,
            "last_line": self.last_line,
            "alarm": self.alarm.state_dict(),
            "seconds": self.watch.seconds,
            "waited": self.watch.waited,
        }
        if self.ranks.is_first and self.records is not None:
            lines = {"metrics_bytes": self.records.sync(), "skipped_bytes": self.bad.sync()}
            checkpoint.save(self.out / CHECKPOINTS, self.step, {**state, **lines}, keep=self.machine.keep_checkpoints)
        self.head_rows.drop_old()
        self.ranks.wait()
        self.watch.saved()

    def _resume(self) -> None:
        """Take up the newest whole checkpoint, or start; the files of lines are cut to where it saw them."""
        with self.ranks.first_alone():
            state = checkpoint.load_newest(self.out / CHECKPOINTS, key=self.plan.key)
            self._open_files(state)
        self.ranks.agree("a checkpoint", None if state is None else state["step"])
        if state is None:
            self.bad.note(list(self.batches.training.left_out.items()))
            return
        missing = load_model(self.model, state["model"])
        assert missing == self._elsewhere()
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, kept)
        self.head_rows.load(state["step"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best = Best(**state["best"])
        self.alarm.load_state_dict(state["alarm"])
        self.step, self.last_line, self.skipped_steps = state["step"], state["last_line"], state["skipped_steps"]
        self.watch = Stopwatch(seconds=state["seconds"], waited=state["waited"], step=self.step)
        log.info(f"distill   goes on after step {self.step:,} of {self.plan.steps:,}")

    def _open_files(self, state: Mapping[str, Any] | None) -> None:
        """The first rank keeps the record; the others only read which pairs are known to be broken."""
        step = state["step"] if state else 0
        self.records: Records | None = None
        if self.ranks.is_first:
            listeners = make_listeners(
                self.machine.callbacks, self.machine.tensorboard, self.out / "tensorboard", step=step
            )
            size = state["metrics_bytes"] if state else 0
            self.records = Records(self.out / "metrics.jsonl", size=size, listeners=listeners)
        self.bad.open(state["skipped_bytes"] if state else 0)

    def _elsewhere(self) -> set[str]:
        """Names of what is not in the file of a checkpoint.

        It is what never changes (a frozen head may be gigabytes, and comes from the centers again), and the rows of a
        head that learns.
        """
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return frozen | self.head_rows.names

    def _summary(self) -> dict[str, Any]:
        seen = self.step * self.batches.batch_size
        best = {"best_step": self.best.step, f"best_{self.best.metric}": self.best.value}
        return {
            "steps": self.step,
            "pairs": len(self.batches.training),
            "pairs_seen": seen,
            "epochs": seen / len(self.batches.training),
            "unreadable_pairs": len(self.bad),
            "skipped_steps": self.skipped_steps,
            "processes": self.ranks.size,
            "seconds": self.watch.seconds,
            "pairs_per_s": seen / self.watch.seconds,
            "data_wait_share": self.watch.wait_share,
            **{name: value for name, value in self.last_line.items() if name.startswith("loss")},
            **(best if self.best.value is not None else {}),
            "collapse_alarm": self.alarm.fired,
            "precision": str(self.precision).removeprefix("torch."),
            **{f"peak_{name}": value for name, value in _memory(self.ranks.device).items()},
        }


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the student; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _memory(device: torch.device) -> dict[str, float]:
    """The most memory this process (and, on CUDA, this device) has held so far, in GiB."""
    peak = {"memory_gib": units.gib(tasks.peak_memory())}
    if device.type == "cuda":
        peak["device_memory_gib"] = units.gib(torch.cuda.max_memory_allocated(device))
    return peak
