"""What a step measures and how it moves: schedules, gradient lengths, float16, and what a skipped step leaves alone."""

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from host_waits import HostWaits
from tiny_training import make_settings, make_trainer
from torch import Tensor, nn

from clip_cid.errors import ConfigError
from clip_cid.method.distill import center_pass
from clip_cid.models.clip import Clip, train_transform
from clip_cid.recipe import parse_recipe
from clip_cid.training import step, stopwatch
from clip_cid.training.batches import Batch
from clip_cid.training.loop import Trainer
from clip_cid.training.model import step_seed
from clip_cid.training.optimizer import scheduled
from clip_cid.training.ranks.parallel import running_statistics
from clip_cid.training.stopwatch import Stopwatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step")


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# Schedules


def test_a_factor_lies_straight_between_its_points_and_level_beyond_them():
    points = ((0.25, 0.0), (0.5, 2.0), (1.0, 1.0))
    assert [scheduled(points, share) for share in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)] == [0, 0, 1, 2, 1.5, 1]
    assert scheduled((), 0.3) == 1.0


def test_each_steps_loss_is_the_sum_with_the_weights_of_that_step(folder: Path, tmp_path: Path):
    schedule = {"cluster_kl": [[0.2, 0.0], [0.7, 1.0]], "clip": [[0.0, 2.0], [1.0, 0.0]]}
    settings = make_settings(schedule=schedule, log_every=1)
    make_trainer(folder, tmp_path, settings=settings, steps=10).run()
    weights = settings.weights.model_dump()
    for line in lines_of(tmp_path):
        share = (line["step"] - 1) / 10
        factors = {"cluster_kl": min(max((share - 0.2) / 0.5, 0.0), 1.0), "clip": 2.0 * (1 - share)}
        parts = {name[5:]: value for name, value in line.items() if name.startswith("loss/")}
        total = sum(weights[name] * factors.get(name, 1.0) * value for name, value in parts.items())
        assert line["loss"] == pytest.approx(total, rel=1e-6)
        assert (line["grad_norm/cluster_kl"] == 0) == (share <= 0.2)


@pytest.mark.slow
def test_a_part_that_begins_at_0_moves_nothing_until_then(folder: Path, tmp_path: Path):
    late = make_settings(weights={"feature": 100.0}, schedule={"feature": [[0.5, 0.0], [0.6, 1.0]]}, log_every=1)
    never = make_settings(weights={"feature": 100.0}, schedule={"feature": [[0.0, 0.0]]}, log_every=1)
    found = []
    for name, settings in (("late", late), ("never", never)):
        make_trainer(folder, tmp_path / name, settings=settings, steps=10).run()
        found.append([line["loss/clip"] for line in lines_of(tmp_path / name)])
    assert found[0][:7] == found[1][:7]  # the first step with a share above 0.5 is the seventh, which moves afterwards
    assert found[0][7] != found[1][7]


# How hard each part pulls


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_gradient_of_a_part_is_as_long_as_that_of_a_computation_of_its_own(
    folder: Path, tmp_path: Path, micro_batch: int | None
):
    """Over the embeddings, and over those in the teacher's space where a map is learned; weights and schedule included."""
    settings = make_settings(
        alignment="linear", head_lr=0.0, log_every=1, schedule={"clip": [[0.0, 3.0]]}, weights={"icl": 0.25}
    )
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=3, patch_dropout=0.0, micro_batch=micro_batch)
    batch = next(trainer.batches.between(0, 1))
    model = copy.deepcopy(trainer.model)
    seen = model(batch.images, batch.texts, precision=torch.float32)
    rows = {name: value.detach().requires_grad_() for name, value in seen.items() if value.ndim == 2}
    assert rows.keys() == {"image", "text", "aligned_image", "aligned_text"}
    expected = {}
    for part in ("clip", "cluster_cls", "cluster_kl", "instance_image", "instance_text", "icl"):
        generator = torch.Generator().manual_seed(step_seed(settings.seed, 0))
        parts = model.objective({**seen, **rows}, batch.targets, generator=generator)
        weight = getattr(settings.weights, part) * (3.0 if part == "clip" else 1.0)
        pulls = torch.autograd.grad(weight * parts[part], [*rows.values()], allow_unused=True)
        expected[part] = math.sqrt(sum(float(pull.double().square().sum()) for pull in pulls if pull is not None))
    trainer.run()
    line = lines_of(tmp_path)[0]
    assert {name[10:] for name in line if name.startswith("grad_norm/")} == expected.keys()
    for part, length in expected.items():
        assert length > 0
        assert line[f"grad_norm/{part}"] == pytest.approx(length, rel=1e-4), part


# Weights that follow the gradients


def weighed(**changes: Any) -> Any:
    return make_settings(**{"weigh_gradients_every": 3, "log_every": 1, **changes})


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_each_part_pulls_in_proportion_to_its_weight(folder: Path, tmp_path: Path, micro_batch: int | None):
    """At step 0 with that step's own norms, later with their running mean; by a computation of its own, in float64."""
    settings = weighed(weights={"icl": 0.25, "feature": 8.0}, schedule={"clip": [[0.0, 1.0], [1.0, 0.0]]})
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=9, patch_dropout=0.0, micro_batch=micro_batch)
    trainer.run()
    mean: dict[str, float] = {}
    for line in lines_of(tmp_path):
        step = line["step"] - 1
        given = {name: weight for name, weight in settings.weights.model_dump().items() if weight}
        given["clip"] *= 1 - step / 9
        norms = {name: line[f"grad_norm/{name}"] / line[f"weight/{name}"] for name in given}
        if step % 3 == 0:
            mean = {name: 0.9 * mean[name] + 0.1 * norm if mean else norm for name, norm in norms.items()}
        level = sum(given[name] * mean[name] for name in given) / sum(given.values())
        for name, weight in given.items():
            assert line[f"weight/{name}"] == pytest.approx(weight * level / mean[name], rel=1e-6)
            if step == 0:
                assert line[f"grad_norm/{name}"] == pytest.approx(weight * level, rel=1e-6)
        assert line["loss"] == pytest.approx(sum(line[f"weight/{name}"] * line[f"loss/{name}"] for name in given))


def test_the_gradient_of_the_step_is_that_of_the_weights_it_tells(folder: Path, tmp_path: Path):
    settings = weighed(head_lr=0.0)
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=3, patch_dropout=0.0)
    batch, model = next(trainer.batches.between(0, 1)), copy.deepcopy(trainer.model)
    measured = trainer.learner.compute_gradient(batch, 0, with_part_norms=False)
    seen = model(batch.images, batch.texts, precision=torch.float32)
    generator = torch.Generator().manual_seed(step_seed(settings.seed, 0))
    parts = model.objective(seen, batch.targets, generator=generator)
    torch.stack([measured.weights[name] * part for name, part in parts.items()]).sum().backward()
    own = dict(model.named_parameters())
    norm = math.sqrt(sum(float(value.grad.square().sum()) for value in own.values() if value.grad is not None))
    assert measured.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, value in trainer.model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad * max(norm, 1.0), own[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_what_is_written_does_not_decide_the_weights(folder: Path, tmp_path: Path):
    trainers = [
        make_trainer(folder, tmp_path / str(every), settings=weighed(log_every=every), steps=8) for every in (1, 4)
    ]
    for trainer in trainers:
        trainer.run()
    assert trainers[0].learner.gradient_norms == trainers[1].learner.gradient_norms
    first, second = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_one_loss_alone_keeps_its_weight(folder: Path, tmp_path: Path):
    make_trainer(folder, tmp_path, settings=weighed(weights="clip-only"), steps=3).run()
    assert [line["weight/clip"] for line in lines_of(tmp_path)] == [1.0] * 3


@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_is_not_finite_leaves_the_norms_of_the_gradients(folder: Path, tmp_path: Path, at: int):
    trainer = overflowing(make_trainer(folder, tmp_path, settings=weighed(precision="fp16"), steps=5), at)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    means: list[dict[str, float]] = []
    train_step = trainer._train_step

    def step(batch: Batch) -> Any:
        measured = train_step(batch)
        assert trainer.learner.gradient_norms is not None
        means.append(trainer.learner.gradient_norms.mean)
        return measured

    trainer._train_step = step
    trainer.run()
    if at == 0:  # then the next step measures
        assert means[0] == {}
        assert means[1]
        assert means[1] == means[2] != means[3]
    else:
        assert means[0] == means[1] == means[2] == means[3] == means[4]


# Float16


def overflowing(trainer: Trainer, at: int) -> Trainer:
    """The gradient of one step is infinite though its loss is not, as when float16 overflows."""
    train_step = trainer._train_step

    def step(batch: Batch) -> Any:
        if trainer.step != at:
            return train_step(batch)
        hook = trainer.model.student.ln_final.weight.register_hook(lambda gradient: gradient * math.inf)
        try:
            return train_step(batch)
        finally:
            hook.remove()

    trainer._train_step = step
    return trainer


def weights_at(trainer: Trainer, states: dict[int, dict[str, Tensor]]) -> Trainer:
    train_step = trainer._train_step

    def step(batch: Batch) -> Any:
        states[trainer.step] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        return train_step(batch)

    trainer._train_step = step
    return trainer


def test_an_overflow_of_float16_halves_the_scale_and_is_not_counted_as_a_skipped_step(folder: Path, tmp_path: Path):
    settings = make_settings(precision="fp16", log_every=1)
    states: dict[int, dict[str, Tensor]] = {}
    trainer = weights_at(overflowing(make_trainer(folder, tmp_path, settings=settings, steps=6), 2), states)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    summary = trainer.run()
    assert trainer.learner.scaler.get_scale() == 32
    assert summary["skipped_steps"] == 0
    assert not list(tmp_path.glob("nonfinite*"))
    moved = [any(not torch.equal(states[at][name], states[at + 1][name]) for name in states[0]) for at in range(5)]
    assert moved == [True, True, False, True, True]


@pytest.mark.resume
def test_the_scale_of_float16_grows_after_enough_finite_steps_in_succession_only(folder: Path, tmp_path: Path):
    settings = make_settings(precision="fp16")
    trainer = overflowing(make_trainer(folder, tmp_path, settings=settings, steps=8, minutes=1e-9), 2)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
    scales: list[float] = []
    train_step = trainer._train_step

    def step(batch: Batch) -> Any:
        measured = train_step(batch)
        scales.append(trainer.learner.scaler.get_scale())
        return measured

    trainer._train_step = step
    trainer.run()
    assert scales == [64, 64, 32, 32, 32, 32, 64, 64]  # two finite steps before the overflow count for nothing
    again = make_trainer(folder, tmp_path, settings=settings, steps=8)
    again._resume()
    assert again.learner.scaler.get_scale() == 64


def test_an_overflow_at_the_smallest_scale_is_an_illness_and_is_counted(folder: Path, tmp_path: Path):
    settings = make_settings(precision="fp16")
    trainer = overflowing(make_trainer(folder, tmp_path, settings=settings, steps=5), 2)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    assert trainer.run()["skipped_steps"] == 1


# What a skipped step leaves alone


def test_a_skipped_step_leaves_the_statistics_of_batch_normalization(folder: Path, tmp_path: Path):
    trainer = make_trainer(folder, tmp_path, steps=4)
    norm = nn.BatchNorm1d(16, affine=False)
    student = trainer.model.student
    encode_image = student.encode_image

    def encode(images: Tensor) -> Tensor:
        found = norm(encode_image(images))
        return found * math.nan if trainer.step == 1 else found

    student.norm, student.encode_image = norm, encode
    trainer.learner.statistics = running_statistics(student)
    seen: list[list[Tensor]] = []
    train_step = trainer._train_step
    trainer._train_step = lambda batch: (train_step(batch), seen.append([v.clone() for v in norm.buffers()]))[0]
    assert trainer.run()["skipped_steps"] == 1
    assert [int(buffers[2]) for buffers in seen] == [1, 1, 2, 3]  # batches it has tracked
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


# Waiting for data


class Clock:
    """A time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stopwatch.time, "monotonic", lambda: self.now)


def test_waiting_is_told_once_after_the_first_minute_and_only_above_the_share(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)

    def batches(wait: float) -> Any:
        while True:
            clock.now += wait
            yield 0

    watch, told = Stopwatch(), []
    waiting = watch.waiting(batches(2.0))
    for _ in range(12):
        next(waiting)
        clock.now += 8.0  # a fifth of the time is waiting
        told.append(watch.is_slow(0.1))
    assert told == [False] * 5 + [True] + [False] * 6
    quick, told = Stopwatch(), []
    waiting = quick.waiting(batches(1.0))
    for _ in range(12):
        next(waiting)
        clock.now += 9.0  # a tenth is not more than a tenth
        told.append(quick.is_slow(0.1))
    assert not any(told)


def test_a_pause_counts_neither_as_time_nor_as_waiting(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    clock.now += 5
    with watch.pause():
        clock.now += 100
    clock.now += 1
    assert watch.seconds == 6
    assert watch.lap(3) == (6, 0, 3)


def test_slow_data_is_warned_of_with_the_setting_that_helps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    trainer = make_trainer(folder, tmp_path, settings=make_settings(log_every=1), steps=4)
    monkeypatch.setattr(Stopwatch, "is_slow", lambda self, share: share == 0.1 and trainer.step == 2)
    monkeypatch.setattr(Stopwatch, "wait_share", property(lambda _: 0.37))
    trainer.run()
    (warning,) = [record.message for record in caplog.records if "waiting for pairs" in record.message]
    assert "37 % of the time" in warning
    assert "raise machine.workers" in warning


# Augmentation


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    from tiny_sets import tiny_clip

    return tiny_clip(tmp_path)


def test_augmentation_reaches_open_clips_transform(clip: Clip):
    more = {"color_jitter": 0.4, "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}
    names = parts_of(train_transform(clip, crop_scale=0.7, more=more))
    assert names["RandomResizedCrop"].scale == (0.7, 1.0)
    jitter = names["color_jitter"]
    assert jitter.p == 0.8
    assert jitter.transf.brightness == pytest.approx((0.6, 1.4))
    assert jitter.transf.saturation == pytest.approx((0.6, 1.4))
    assert jitter.transf.hue == pytest.approx((-0.1, 0.1))
    assert names["gray_scale"].p == 0.2
    assert not parts_of(train_transform(clip, crop_scale=0.7)).keys() & {"color_jitter", "gray_scale"}


def parts_of(transform: Any) -> dict[str, Any]:
    return {type(part).__name__: part for part in transform.transforms}


@pytest.mark.parametrize(
    ("augmentation", "says"),
    [
        ({"color_jitter": 0.4}, "color_jitter and color_jitter_prob do nothing without each other"),
        ({"color_jitter_prob": 0.4}, "color_jitter and color_jitter_prob do nothing without each other"),
        ({"gray_scale_prob": 1.5}, r"augmentation.gray_scale_prob: must be in \[0, 1\], got 1.5"),
        ({"color_jitter": 3, "color_jitter_prob": 1}, r"augmentation.color_jitter: must be in \[0, 2\], got 3"),
        ({"blur": 0.5}, "augmentation: no blur; there are color_jitter"),
    ],
)
def test_augmentation_that_would_do_nothing_or_fail_later_is_refused(augmentation: dict[str, float], says: str):
    with pytest.raises(ConfigError, match=says):
        parse_recipe({"distill": {"augmentation": augmentation}}, where="test")


# What the host waits for


def test_kernels_asked_for_by_name_are_refused_where_they_cannot_be_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"machine\.loss_kernels: triton, but ") as error:
        make_trainer(folder, tmp_path, loss_kernels="triton")
    assert "Set machine.loss_kernels: auto" in str(error.value)
    assert make_trainer(folder, tmp_path, loss_kernels="torch").model.objective.kernels == "torch"


def test_where_triton_cannot_be_used_on_cuda_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr(step, "why_no_triton", lambda device: "it needs a C compiler")
    with caplog.at_level("INFO"):
        step.refuse_absent_kernels("auto", torch.device("cpu"))
        step.refuse_absent_kernels("torch", torch.device("cuda"))
        assert not caplog.messages
        step.refuse_absent_kernels("auto", torch.device("cuda"))
    assert caplog.messages == ["distill   PyTorch computes the losses, not Triton: it needs a C compiler"]


WAITS = {
    "the labels' limits": "tolist",
    "rows far from the teacher": "nonzero",
    "how many labels are distinct": "_unique2",
    "which sampled rows have a gradient, for its norm": "_coalesce",
    "and for their optimizer": "_coalesce",
}
LIMITS, FAR, DISTINCT, *SPARSE = WAITS


@pytest.mark.parametrize(
    ("options", "waits_for"),
    [
        ({"weights": "clip-only"}, []),
        ({"weights": "clip-kd", "alignment": "linear"}, []),
        ({"head_lr": 0.0}, [LIMITS, FAR]),
        ({"head_lr": 0.0, "sample_rate": 0.1}, [LIMITS, FAR, DISTINCT]),
        ({"head_lr": 1e-3, "sample_rate": 1.0}, [LIMITS]),
        ({"head_lr": 1e-3, "sample_rate": 1.0, "micro_batch": 2}, [LIMITS]),
        ({"head_lr": 1e-3}, [LIMITS, *SPARSE]),
    ],
)
def test_a_step_waits_once_for_its_numbers_and_for_little_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], waits_for: list[str]
):
    monkeypatch.setattr(center_pass, "is_at_hand", lambda tensor: False)
    settings = make_settings(**{name: value for name, value in options.items() if name != "micro_batch"})
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=9, micro_batch=options.get("micro_batch"))
    batch = next(iter(trainer.batches.between(0, 1)))
    trainer.learner.joint.train()
    trainer._train_step(batch)  # whatever is made at first is made
    with HostWaits() as waits:
        trainer._train_step(batch)
    assert waits.counts == Counter(["tolist", *(WAITS[one] for one in waits_for)])
