"""The training loop: steps, metrics, validation and checkpoints; it resumes where an attempt stopped."""

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_cid import log, tasks, units
from clip_cid.devices import Copies, one_ahead
from clip_cid.errors import RunError
from clip_cid.method.distill.collapse import CollapseAlarm
from clip_cid.recipe import DistillConfig, MachineConfig, settled
from clip_cid.run_folder import write_json
from clip_cid.training import checkpoint, room
from clip_cid.training.batches import Batch, Batches
from clip_cid.training.metrics import finite, peak_memory, sick_step, step_numbers
from clip_cid.training.model import Distillation
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.training.ranks.head_rows import HeadRows
from clip_cid.training.records import EMPTY, BadPairs, Records, make_listeners
from clip_cid.training.so_far import METRICS
from clip_cid.training.state import Part, Progress, learner_parts
from clip_cid.training.step import Learner, Measured
from clip_cid.training.stop_requests import stop_requests
from clip_cid.training.stopwatch import Stopwatch
from clip_cid.training.validation import Best, Validation

CHECKPOINTS = "checkpoints"
_LAST = ("loss", "weight/")  # of the last line of metrics.jsonl, in the summary
_SLOW_DATA = 0.1  # of the time: a larger share spent waiting for data is logged once


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is, and whose it is."""

    steps: int
    key: str
    """Digest of everything that decides the result: a checkpoint of another key is not resumed."""
    max_bad_share: float
    """Stop when more than this share of the pairs cannot be read."""


class Trainer:
    """Trains a `Distillation`, and resumes what an earlier, killed attempt at the same training has saved."""

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
        self.model, self.batches, self.settings, self.plan, self.out = model, batches, settings, plan, out
        self.ranks, self.validation, self.machine = ranks, validation, machine or MachineConfig()
        self.learner = Learner(model, settings, steps=plan.steps, ranks=ranks, machine=self.machine)
        self.head_rows = HeadRows(model.objective.head, self.learner.optimizers, out / CHECKPOINTS, ranks)

        self._copies = Copies(ranks.device)
        self.progress, self._in_succession = Progress(), 0
        self.watch = Stopwatch()
        self.best = Best(settings.validation.metric, settings.validation.patience)
        self.alarm = CollapseAlarm(patience=2 * settled(settings.warmup_steps))
        self.bad = BadPairs(batches.training, out / "skipped.jsonl", max_share=plan.max_bad_share)
        self.records: Records | None = None  # of the main process, from `_resume` on

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.progress.step

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary's numbers.

        Raises:
            RunError: The disk has no room for it, too many steps in succession are not finite, ranks differ, or the process was asked to end
                (after a checkpoint).
            DataError: Too many pairs cannot be read.
            KeyboardInterrupt: Ctrl-C (after a checkpoint).
        """
        self._resume()
        if self.ranks.is_main and self.step < self._last_step:
            needed = room.checkpoints_bytes(self.model, self.settings, self.machine) + room.student_bytes(self.model)
            room.check_room(self.out, self.out / CHECKPOINTS, needed)

        size, steps, device = self.batches.batch_size, self.plan.steps, self.ranks.device
        own_random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        shown = log.progress("distill", steps * size, unit="pairs", start=self.step * size)

        with own_random, stop_requests() as stop, shown as bar, contextlib.ExitStack() as batches:
            self.learner.joint.train()
            waiting = self.watch.waiting(self.batches.between(self.step, self._last_step))
            waiting = batches.enter_context(contextlib.closing(waiting))
            for batch in one_ahead(waiting, lambda batch: batch.to(self._copies), device):
                self.bad.note(batch.bad)
                measured = self._train_step(batch)
                self.progress.step += 1
                bar.advance(size, note=self._note(measured))
                if self._is_recorded(self.step):
                    self._record(measured)
                if self._validates_now() and self._validate():
                    break
                stop.number = self._save_if_due(stop.number)
                stop.obey(self.step)

        return self._summary()

    def rehearse(self, batch: Batch) -> Generator[Measured]:
        """Make the first steps on one batch, to measure their cost; this training is then discarded."""
        self._resume()
        self.learner.joint.train()
        while True:
            yield self._train_step(batch.to(self._copies))
            self.progress.step = min(self.step + 1, self.plan.steps - 1)

    def student_state(self) -> dict[str, Tensor]:
        """The final weights, on the CPU: the EMA's or the best, if the recipe says so."""
        if self.settings.validation.keep == "best":
            return checkpoint.load_best(self.out / CHECKPOINTS, key=self.plan.key)["student"]
        with self._with_ema():
            return {name: value.detach().cpu().clone() for name, value in self.model.student.state_dict().items()}

    def objective_state(self) -> dict[str, Tensor]:
        """The objective's trained state, on the CPU; only the main process has the rows of a head that learns."""
        rows = self.head_rows.names
        state = {
            name: value.detach().cpu().clone()
            for name, value in self.model.objective.named_parameters()
            if value.requires_grad and f"objective.{name}" not in rows
        }
        return state | self.head_rows.of_all(self.step) if self.ranks.is_main else state

    @property
    def _last_step(self) -> int:
        """Where to stop; a training that had stopped early does not begin again."""
        return self.step if self.best.is_past else self.plan.steps

    # A step

    def _train_step(self, batch: Batch) -> Measured:
        """Losses, gradient, move. A step that is not finite moves nothing, and is counted."""
        measured = self.learner.compute_gradient(batch, self.step, with_part_norms=self._is_recorded(self.step + 1))
        if measured.is_finite:
            self.learner.update()
            self._in_succession = 0
        elif not self.learner.is_overflow(measured):
            self._skip(measured, batch)
        self.learner.rescale(finite=measured.is_finite)
        return measured

    def _skip(self, measured: Measured, batch: Batch) -> None:
        """Keep the weights, and save what is needed to inspect the step and to repeat it.

        Raises:
            RunError: It has happened too often in succession.
        """
        if self._in_succession == 0:
            self._save()  # before this step, so that the same command does it again
            self._first_skipped = self._write_sick_step(measured, batch)
        self._in_succession += 1
        self.progress.skipped_steps += 1

        what = measured.sick_part
        log.warn(f"distill   step {self.step + 1:,} is skipped: its {what} is not finite ({self._first_skipped})")
        if self._in_succession > self.settings.skip_limit:
            raise RunError(
                f"{self._in_succession} steps in succession are not finite, the last of them step {self.step + 1:,}: "
                f"the {what} is {measured.grad_norm if what == 'gradient' else measured.loss} ("
                + ", ".join(f"{name} {part}" for name, part in measured.parts.items())
                + f"; learning rate {measured.lr:.3g}).",
                fix=f"The same command repeats the first of them; its batch is in {self._first_skipped}. "
                "Lower distill.lr, lengthen the warm-up, or repair the data.",
            )

    def _write_sick_step(self, measured: Measured, batch: Batch) -> Path:
        """Step, losses and the pairs of the batch, over all ranks."""
        rows = [int(row) for part in self.ranks.all(batch.rows.tolist()) for row in part]
        pairs, path = self.batches.training.pairs, self.out / f"nonfinite-step-{self.step + 1}.json"
        if self.ranks.is_main:
            write_json(path, sick_step(measured, self.learner, step=self.step, rows=rows, pairs=pairs))
        return path

    # Records

    def _is_recorded(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.plan.steps

    def _note(self, measured: Measured) -> str:
        parts = " ".join(f"{name} {value:.3f}" for name, value in measured.parts.items())
        waiting, memory = units.percent(self.watch.wait_share, 0), units.memory(tasks.peak_memory())
        return f"loss {measured.loss:.3f} ({parts}), waits for data {waiting}, {memory}"

    def _record(self, measured: Measured) -> None:
        """Add a line to metrics.jsonl; scales as the factors they are."""
        seconds, waited, steps = self.watch.lap(self.step)
        own = {**self.model.objective.diagnostics(), "data_wait_share": waited / seconds}
        line = {
            **self._position(),
            "epoch": self.step * self.batches.batch_size / self.batches.epoch_size,
            **step_numbers(measured, self.learner),
            **{name: finite(value) for name, value in self.ranks.mean(own).items()},
            "pairs_per_s": steps * self.batches.batch_size / seconds,
            "skipped_steps": self.progress.skipped_steps,
            **peak_memory(self.ranks.device),
        }
        self.progress.last_line = line
        self._watch_for_collapse(measured)
        if self.records is not None:
            self.records.append(line)

        if self.watch.is_slow(_SLOW_DATA):
            log.warn(
                f"distill   {units.percent(self.watch.wait_share, 0)} of the time is spent waiting for pairs to be"
                f" read and decoded; raise machine.workers (now {self.machine.workers}), or store smaller images"
            )

    def _position(self) -> dict[str, int]:
        return {"step": self.step, "pairs_seen": self.step * self.batches.batch_size, **self._texts_seen()}

    def _texts_seen(self) -> dict[str, int]:
        lines = self.batches.training.lines
        return {} if lines is None else {"texts_seen": self.step * lines.per_step}

    def _watch_for_collapse(self, measured: Measured) -> None:
        """Warn once, and in the line of the step, that the training looks like a collapse; it continues."""
        line = self.progress.last_line
        signs = {name: line.get(name) for name in ("mean_image_norm", "own_center", "head_drift", "centers")}
        message = self.alarm.update(self.step, cluster_kl=measured.parts.get("cluster_kl"), **signs)
        if message is not None:
            line["collapse"] = message
            log.warn(
                f"distill   step {self.step:,} looks like a collapse: {message} (docs/method.md, signs_of_collapse)"
            )

    def _summary(self) -> dict[str, Any]:
        pairs_seen, epoch_pairs = self.step * self.batches.batch_size, self.batches.epoch_size
        best = {"best_step": self.best.step, f"best_{self.best.metric}": self.best.value}

        return {
            "steps": self.step,
            "pairs": len(self.batches.training),
            **({} if self.settings.per_cluster is None else {"epoch_pairs": epoch_pairs}),
            "pairs_seen": pairs_seen,
            "epochs": pairs_seen / epoch_pairs,
            "unreadable_pairs": len(self.bad),
            "skipped_steps": self.progress.skipped_steps,
            **self._texts_seen(),
            "processes": self.ranks.size,
            "seconds": self.watch.seconds,
            "pairs_per_s": pairs_seen / self.watch.seconds,
            "data_wait_share": self.watch.wait_share,
            **{name: value for name, value in self.progress.last_line.items() if name.startswith(_LAST)},
            **(best if self.best.value is not None else {}),
            "collapse_alarm": self.alarm.fired,
            "precision": str(self.learner.precision).removeprefix("torch."),
            **{f"peak_{name}": value for name, value in peak_memory(self.ranks.device).items()},
        }

    # Measurements on the way

    def _validates_now(self) -> bool:
        if self.validation is None:
            return False
        size = self.batches.batch_size
        every = self.settings.validation.every or self.batches.epoch_size
        before, now = ((step * size) // every for step in (self.step - 1, self.step))
        return now > before or self.step == self.plan.steps

    def _validate(self) -> bool:
        """Measure the student; returns whether the training ends here."""
        assert self.validation is not None
        with self.watch.pause(), self._with_ema():
            numbers = self.validation.measure(
                self.learner.joint, self.model, precision=self.learner.precision, note_bad=self.bad.note
            )
            better = self.best.is_new(numbers, self.step)
            if better and self.settings.validation.keep == "best" and self.ranks.is_main:
                about = {"key": self.plan.key, "step": self.step, "numbers": numbers}
                student = dict(self.model.student.state_dict())
                checkpoint.save_best(self.out / CHECKPOINTS, {**about, "student": student})
        if self.records is not None:
            self.records.append(self._position() | {name: finite(value) for name, value in numbers.items()})

        names = ("val/loss", "val/retrieval", "val/zero_shot")
        shown = ", ".join(f"{name[4:]} {numbers[name]:.3f}" for name in names if name in numbers)
        log.info(f"distill   step {self.step:,}: {shown} on held-out data{' (the best)' if better else ''}")
        if not self.best.is_past:
            return False

        log.info(f"distill   stops early: no better {self.best.metric} than at step {self.best.step:,}")
        self._save()
        return True

    def _with_ema(self) -> contextlib.AbstractContextManager[None]:
        """The student has the final weights for as long as the block lasts."""
        return self.learner.ema.in_place() if self.learner.ema is not None else contextlib.nullcontext()

    # Checkpoints

    def _parts(self) -> dict[str, Part]:
        """Everything that a checkpoint holds, by name; saving and resuming both go through it.

        The rows of a head that learns are the one exception: each rank has its own, so each writes its own file.
        """
        parts: dict[str, Part] = {
            **learner_parts(self.learner, self.head_rows),
            "progress": self.progress,
            "best": self.best,
            "alarm": self.alarm,
            "watch": self.watch,
        }
        return parts if self.records is None else {**parts, "skipped": self.bad, "metrics": self.records}

    def _save_if_due(self, stop: int) -> int:
        """All ranks save together: at the end, when the main process says so, and when any rank must stop.

        Args:
            stop: The signal that asks this rank to end; 0 for none.

        Returns:
            The signal that asks any of them to.
        """
        due = self.watch.since_save >= 60 * self.machine.checkpoint_minutes
        due = due and self._in_succession == 0  # the newest is from before the steps that are skipped
        stop, due = divmod(self.ranks.largest(2 * stop + (due and self.ranks.is_main)), 2)
        if due or stop or self.step == self.plan.steps:
            self._save()
        return stop

    def _save(self) -> None:
        self.bad.gather(self.ranks)
        self.head_rows.save(self.step)
        if self.ranks.is_main:
            parts = {name: part.state_dict() for name, part in self._parts().items()}
            folder, keep = self.out / CHECKPOINTS, self.machine.keep_checkpoints
            checkpoint.save(folder, self.step, {"key": self.plan.key, "parts": parts}, keep=keep)
        self.head_rows.drop_old()
        self.ranks.wait()
        self.watch.saved()

    def _resume(self) -> None:
        """Load the newest whole checkpoint, or start; files of lines are cut to their size at the checkpoint.

        The main process alone looks for checkpoints and keeps the files of lines: the others may not see yet what
        has just been written, and read the checkpoint that it names.
        """
        folder = self.out / CHECKPOINTS
        state = checkpoint.load_newest(folder, key=self.plan.key) if self.ranks.is_main else None
        step = self.ranks.from_main(None if state is None else int(state["step"]))
        if self.ranks.is_main:
            listeners = make_listeners(
                self.machine.callbacks, self.machine.tensorboard, self.out / "tensorboard", step=step or 0
            )
            self.records = Records(self.out / METRICS, listeners)
        elif step is not None:
            state = checkpoint.load(self.ranks.find(checkpoint.path_of(folder, step)))

        if state is None or step is None:
            for lines in (self.records, self.bad) if self.records is not None else ():
                lines.load_state_dict(EMPTY)
        else:
            for name, part in self._parts().items():
                part.load_state_dict(state["parts"][name])
            self.head_rows.load(step)
        self.bad.gather(self.ranks)

        if step is None:
            self.bad.note(list(self.batches.training.left_out.items()))
        else:
            self.watch.lap(step)  # speeds are measured from here on
            log.info(f"distill   resuming after step {step:,} of {self.plan.steps:,}")
