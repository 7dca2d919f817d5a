import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from tiny_training import (
    BATCH,
    CENTERS,
    make_batches,
    make_settings,
    make_student,
    make_trainer,
    training_pairs,
    unit_rows,
)
from torch import Tensor

from clip_cid.errors import DataError, RunError
from clip_cid.training.batches import Batch
from clip_cid.training.loop import Trainer
from clip_cid.training.step import resolve_precision

STEPS = 10


class Killed(BaseException):
    """Ends a run without giving it a chance to save, as SIGKILL does."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not different


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in ("pairs_per_s", "data_wait_share", "memory_gib")} for line in lines
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Trainer:
    trainer = make_trainer(folder, folder / "whole", steps=STEPS)
    trainer.run()
    return trainer


def before_step(trainer: Trainer, step: int, action: Callable[[], object]) -> Trainer:
    """The trainer, but `action` happens when `step` steps are done and the batch of the next has come."""
    train_step = trainer._train_step

    def acting(batch: Batch) -> Any:
        if trainer.step == step:
            action()
        return train_step(batch)

    trainer._train_step = acting
    return trainer


def kill_before(trainer: Trainer, step: int) -> None:
    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        before_step(trainer, step, die).run()


@pytest.mark.slow
@pytest.mark.resume
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(folder: Path, uninterrupted: Trainer):
    again = make_trainer(folder, folder / "again", steps=STEPS)
    torch.manual_seed(99)  # what other code draws must not matter
    again.run()
    assert_equal(weights_of(again), weights_of(uninterrupted))
    other = make_trainer(folder, folder / "other", steps=STEPS, settings=make_settings(seed=1))
    other.run()
    assert not torch.equal(
        weights_of(other)["objective.head.weight"], weights_of(uninterrupted)["objective.head.weight"]
    )


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize("kills", [(1,), (4,), (9,), (3, 5, 6)])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    folder: Path, tmp_path: Path, uninterrupted: Trainer, kills: tuple[int, ...]
):
    for step in kills:
        kill_before(make_trainer(folder, tmp_path, steps=STEPS, minutes=1e-9), step)
    resumed = make_trainer(folder, tmp_path, steps=STEPS)
    resumed.run()
    assert_equal(weights_of(resumed), weights_of(uninterrupted))
    assert (
        resumed.learner.optimizers[0].param_groups[0]["lr"] == uninterrupted.learner.optimizers[0].param_groups[0]["lr"]
    )
    ours, theirs = (read_lines(path / "metrics.jsonl") for path in (tmp_path, folder / "whole"))
    assert without_times(ours) == without_times(theirs)


@pytest.mark.slow
@pytest.mark.resume
def test_weights_that_follow_the_gradients_resume_exactly(folder: Path, tmp_path: Path):
    """Also between two measurements, and with few pairs of each cluster in an epoch."""
    settings = make_settings(weigh_gradients_every=3, per_cluster=1, log_every=1)
    whole = make_trainer(folder, tmp_path / "whole", steps=STEPS, settings=settings)
    summary = whole.run()
    for step in (1, 5, 9):
        kill_before(make_trainer(folder, tmp_path / "again", steps=STEPS, minutes=1e-9, settings=settings), step)
    resumed = make_trainer(folder, tmp_path / "again", steps=STEPS, settings=settings)
    resumed.run()
    assert_equal(weights_of(resumed), weights_of(whole))
    lines = [without_times(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "again")]
    assert lines[0] == lines[1]
    assert {name: value for name, value in lines[0][-1].items() if name.startswith("weight/")} == {
        name: value for name, value in summary.items() if name.startswith("weight/")
    }


@pytest.mark.slow
@pytest.mark.resume
def test_steps_behind_the_last_checkpoint_are_done_again_and_written_once(
    folder: Path, tmp_path: Path, uninterrupted: Trainer
):
    kill_before(make_trainer(folder, tmp_path, steps=STEPS, minutes=1e-9), 4)
    kill_before(make_trainer(folder, tmp_path, steps=STEPS), 8)  # no checkpoint falls due here
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [3, 6]
    resumed = make_trainer(folder, tmp_path, steps=STEPS)
    resumed.run()
    assert_equal(weights_of(resumed), weights_of(uninterrupted))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [3, 6, 9, 10]


def train_on(folder: Path, out: Path, threads: int) -> None:
    """More steps than it is given time for: the schedule must be that of the run it is compared with."""
    torch.set_num_threads(threads)  # which decides the order of sums
    make_trainer(folder, out, steps=4000, minutes=1e-9, workers=2).run()


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.resume
def test_a_process_killed_by_the_system_goes_on_exactly(folder: Path, tmp_path: Path, uninterrupted: Trainer):
    """SIGKILL to a real process with workers, at whatever step it had reached."""
    process = processes.start(train_on, folder, tmp_path, torch.get_num_threads())
    deadline = time.monotonic() + processes.PATIENCE
    while not list((tmp_path / "checkpoints").glob("step-*5.pt")) and time.monotonic() < deadline:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    reached = max(int(path.stem[5:]) for path in (tmp_path / "checkpoints").glob("step-*.pt"))
    resumed = make_trainer(folder, tmp_path, steps=4000)
    straight = make_trainer(folder, tmp_path / "straight", steps=4000)
    for trainer in (resumed, straight):
        trainer.batches.between = stop_after(trainer, reached + 3)
        trainer.run()
    assert resumed.step == straight.step == reached + 3
    assert_equal(weights_of(resumed), weights_of(straight))


def stop_after(trainer: Trainer, step: int) -> Any:
    between = trainer.batches.between
    return lambda first, steps: between(first, min(step, steps))


def oracle_loss(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([weights[name] * value for name, value in parts.items()]).sum()


def oracle_parts(
    model: Any, batch: Batch, centers: Tensor, instance_scale: Tensor, weights: dict[str, float]
) -> dict[str, Tensor]:
    """The losses as METHOD writes them, with other people's functions."""
    image, text, scale = model(batch.images, batch.texts)
    parts = {"clip": ClipLoss()(image, text, scale)}
    if weights["instance_text"]:
        parts["instance_image"] = ClipLoss()(batch.teacher_text, image, instance_scale.exp())
        parts["instance_text"] = ClipLoss()(batch.teacher_image, text, instance_scale.exp())
    if weights["cluster_cls"]:
        assert batch.labels is not None
        assert batch.teacher_image is not None
        student, teacher = 16 * image @ centers.T, 16 * batch.teacher_image @ centers.T
        parts["cluster_cls"] = F.cross_entropy(student, batch.labels)
        parts["cluster_kl"] = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    return parts


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["clip-only", "paper-r1"])
def test_twenty_steps_are_those_of_a_plain_loop_written_by_hand(folder: Path, tmp_path: Path, weights: str):
    settings = make_settings(weights=weights, head_lr=0, sample_rate=1.0, log_every=1, warmup_steps=5)
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=20, patch_dropout=0.0)
    trainer.run()
    model, instance_scale = make_student(), torch.nn.Parameter(torch.tensor(1 / 0.07).log())
    centers = torch.from_numpy(unit_rows(CENTERS, seed=5))
    plain = {name for name, value in model.named_parameters() if value.ndim < 2 or "positional" in name}
    groups = [
        {"params": [value for name, value in model.named_parameters() if name not in plain], "weight_decay": 0.2},
        {"params": [value for name, value in model.named_parameters() if name in plain] + [instance_scale]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0, foreach=False)
    expected: list[float] = []
    for step, batch in enumerate(make_batches(training_pairs(folder)).between(0, 20)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * ((step + 1) / 5 if step < 5 else (1 + math.cos(math.pi * (step - 5) / 15)) / 2)
        by_name = settings.weights.model_dump()
        loss = oracle_loss(oracle_parts(model, batch, centers, instance_scale, by_name), by_name)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), instance_scale], 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        instance_scale.data.clamp_(0, math.log(100))
        expected.append(loss.item())
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-4)
    for name, value in model.state_dict().items():
        assert torch.allclose(trainer.model.student.state_dict()[name], value, atol=2e-5), name


@pytest.mark.slow
def test_the_loss_goes_down_and_every_part_has_its_line(folder: Path, tmp_path: Path):
    settings = make_settings(log_every=7, lr=3e-3)
    summary = make_trainer(folder, tmp_path, settings=settings, steps=60).run()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    for part in ("loss/clip", "loss/cluster_cls", "loss/cluster_kl", "loss/instance_image", "loss/instance_text"):
        assert lines[-1][part] < lines[0][part]
    for line in lines:
        whole = line["loss/clip"] + line["loss/cluster_cls"] + line["loss/cluster_kl"]
        assert line["loss"] == pytest.approx(whole + (line["loss/instance_image"] + line["loss/instance_text"]) / 2)
        assert line["pairs_seen"] == line["step"] * BATCH
        assert line["epoch"] == pytest.approx(line["pairs_seen"] / 21)
        assert 0 <= line["data_wait_share"] <= 1
        assert line["negatives"] > 0
    assert (summary["steps"], summary["pairs"], summary["pairs_seen"]) == (60, 21, 480)
    assert summary["loss"] == lines[-1]["loss"]
    assert summary["pairs_per_s"] == pytest.approx(480 / summary["seconds"], rel=0.2)


def test_the_logit_scale_stays_within_its_limits(folder: Path, tmp_path: Path):
    trainer = make_trainer(folder, tmp_path, steps=3)
    with torch.no_grad():
        trainer.model.student.logit_scale.fill_(9.0)
    trainer.run()
    assert 4.5 < trainer.model.student.logit_scale.item() <= math.log(100)


@pytest.mark.slow
def test_losses_that_stay_no_number_stop_the_run_and_leave_what_is_needed_to_do_the_first_again(
    folder: Path, tmp_path: Path
):
    settings = make_settings(skip_limit=2, log_every=1)
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS, minutes=1e-9)
    projection = trainer.model.student.text_projection.data
    kept = projection.clone()
    before_step(trainer, 4, lambda: projection[0].fill_(math.nan))
    with pytest.raises(
        RunError, match=r"3 steps in succession .*step 7: the loss is nan \(clip nan, cluster_cls \d.*rate"
    ):
        trainer.run()
    batches = make_batches(training_pairs(folder))
    (batch,) = list(batches.between(4, 5))
    found = json.loads((tmp_path / "nonfinite-step-5.json").read_text())
    assert (found["step"], found["what"], found["parts"]["clip"]) == (5, "loss", "nan")
    assert [pair["row"] for pair in found["pairs"]] == batch.rows.tolist()
    assert found["pairs"][0]["key"] == trainer.batches.training.pairs.key(int(batch.rows[0]))
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert names == ["step-000003.pt", "step-000004.pt"]  # none of the steps that were skipped
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"] is None, line["skipped_steps"]) for line in lines[3:]] == [
        (4, False, 0),
        (5, True, 1),
        (6, True, 2),
    ]
    again = make_trainer(folder, tmp_path, settings=settings, steps=STEPS)
    seen: list[list[int]] = []
    step_of = again._train_step
    again._train_step = lambda batch: (seen.append(batch.rows.tolist()), step_of(batch))[1]
    resume = again._resume

    def resume_and_mend() -> None:
        resume()
        again.model.student.text_projection.data.copy_(kept)

    again._resume = resume_and_mend
    again.run()
    assert seen[0] == batch.rows.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 5])
def test_a_gradient_that_is_no_number_once_changes_nothing_and_is_counted(folder: Path, tmp_path: Path, at: int):
    """The skipped step leaves weights, moments and average as they were; what comes later is that of a loop without it."""
    settings = make_settings(log_every=1, ema_decay=0.9)
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS)
    states: dict[int, Any] = {}
    train_step = trainer._train_step

    def watched(batch: Batch) -> Any:
        states[trainer.step] = copy.deepcopy(
            (weights_of(trainer), [optimizer.state_dict()["state"] for optimizer in trainer.learner.optimizers])
        )
        if trainer.step != at:
            return train_step(batch)
        hook = trainer.model.student.ln_final.weight.register_hook(lambda gradient: gradient * math.inf)
        measured = train_step(batch)
        hook.remove()
        assert trainer.learner.ema is not None
        assert trainer.learner.ema.state_dict()["steps"] == at
        return measured

    trainer._train_step = watched
    summary = trainer.run()
    assert summary["skipped_steps"] == 1
    assert_equal(states[at][0], states[at + 1][0])
    torch.testing.assert_close(states[at][1], states[at + 1][1], rtol=0, atol=0)
    assert not torch.equal(states[at + 2][0]["student.logit_scale"], states[at + 1][0]["student.logit_scale"])
    line = read_lines(tmp_path / "metrics.jsonl")[at]
    assert line["grad_norm"] is None
    assert math.isfinite(line["loss"])
    assert json.loads((tmp_path / f"nonfinite-step-{at + 1}.json").read_text())["what"] == "gradient"


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, RunError), (signal.SIGINT, KeyboardInterrupt)])
def test_a_polite_kill_finishes_the_step_and_saves_it(
    folder: Path,
    tmp_path: Path,
    uninterrupted: Trainer,
    number: signal.Signals,
    error: type[BaseException],
):
    before = signal.getsignal(number)
    trainer = make_trainer(folder, tmp_path, steps=STEPS, workers=1)
    before_step(trainer, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error) as caught:
        trainer.run()
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pt")] == ["step-000005.pt"]
    if isinstance(caught.value, RunError):
        assert "Stopped by SIGTERM after step 5, which is saved" in str(caught.value)
    resumed = make_trainer(folder, tmp_path, steps=STEPS)
    resumed.run()
    assert_equal(weights_of(resumed), weights_of(uninterrupted))


@pytest.mark.slow
def test_a_broken_picture_is_listed_once_and_too_many_stop_the_run(tmp_path: Path):
    training = training_pairs(tmp_path)
    (tmp_path / "pairs" / "007.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    kill_before(make_trainer(tmp_path, out, training=training, steps=STEPS, minutes=1e-9, max_bad_share=0.05), 7)
    summary = make_trainer(tmp_path, out, training=training, steps=STEPS, max_bad_share=0.05).run()
    (line,) = read_lines(out / "skipped.jsonl")  # met in four epochs, before and after the kill
    assert (line["row"], line["key"]) == (7, training.pairs.key(7))
    assert "image" in line["reason"]
    assert line["shard"] == training.pairs.shards[0].name
    assert summary["unreadable_pairs"] == 1
    with pytest.raises(DataError, match="1 of 21 pairs cannot be read"):
        make_trainer(tmp_path, tmp_path / "strict", training=training, steps=STEPS, max_bad_share=0.04).run()


def test_a_frozen_head_has_no_place_in_the_checkpoint(folder: Path, tmp_path: Path):
    settings = make_settings(head_lr=0)
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS)
    trainer.run()
    state = torch.load(tmp_path / "checkpoints" / "step-000010.pt", weights_only=True)
    assert "objective.head.weight" not in state["parts"]["model"]
    again = make_trainer(folder, tmp_path, settings=settings, steps=STEPS)
    assert again.run()["loss"] == trainer.progress.last_line["loss"]  # nothing is left to do
    assert_equal(weights_of(again), weights_of(trainer))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_half_precision_has_nearly_the_loss_of_single_and_single_weights(
    folder: Path, tmp_path: Path, precision: str, dtype: str
):
    """Of the first step, which begins at equal weights: later ones part, since float16 skips those that overflow."""
    single = make_trainer(folder, tmp_path / "single", settings=make_settings(warmup_steps=0), steps=1).run()
    trainer = make_trainer(
        folder, tmp_path / "half", settings=make_settings(precision=precision, warmup_steps=0), steps=1
    )
    half = trainer.run()
    assert half["precision"] == dtype
    assert half["loss"] != single["loss"]
    assert half["loss"] == pytest.approx(single["loss"], rel=0.05)
    assert all(value.dtype == torch.float32 for value in trainer.model.parameters())


def test_auto_precision_is_half_on_cuda_only():
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32
    assert resolve_precision("auto", torch.device("cuda")) == torch.bfloat16
    assert np.isclose(torch.finfo(resolve_precision("bf16", torch.device("cpu"))).eps, 2**-7)


@pytest.mark.resume
def test_a_collapse_is_told_once_in_its_line_and_in_the_summary(folder: Path, tmp_path: Path):
    """All images at one point from the start: the alarm's patience is twice the warm-up of 2 steps."""
    settings = make_settings(log_every=1, warmup_steps=2)
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS, minutes=1e-9)
    with torch.no_grad():
        trainer.model.student.visual.proj.zero_()
        trainer.model.student.visual.proj[:, 0] = 1
        trainer.model.student.visual.ln_post.weight.zero_()
        trainer.model.student.visual.ln_post.bias.fill_(1)
    kill_before(trainer, 6)
    resumed = make_trainer(folder, tmp_path, settings=settings, steps=STEPS)
    assert resumed.run()["collapse_alarm"]
    told = [line for line in read_lines(tmp_path / "metrics.jsonl") if "collapse" in line]
    assert [line["step"] for line in told] == [4]
    assert told[0]["collapse"].startswith("one point: the mean of the student's image embeddings has length 1.000")
