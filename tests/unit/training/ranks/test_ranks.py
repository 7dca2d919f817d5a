"""Several processes train what one does: gradients, samples, steps, checkpoints and the files they leave.

One start of two processes runs all cases; the tests read what the ranks have written.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from tiny_training import (
    BATCH,
    CENTERS,
    EVERY_PART,
    STORED,
    exact,
    loss_of,
    make_batches,
    make_dataset,
    make_model,
    make_settings,
    make_trainer,
    make_validation,
    stripes,
    training_pairs,
    with_labels,
    with_lines,
)
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from clip_cid.errors import ClipCidError, ConfigError, DataError
from clip_cid.method.distill.objective import weighted_sum
from clip_cid.training import validation
from clip_cid.training.batches import Batches, TrainingPairs
from clip_cid.training.loop import Trainer
from clip_cid.training.model import backward_in_micro_batches
from clip_cid.training.optimizer import clip_gradients
from clip_cid.training.ranks import distributed
from clip_cid.training.ranks.distributed import ALONE, Ranks, join_ranks
from clip_cid.training.ranks.parallel import join_model, with_joint_statistics, with_spread
from clip_cid.training.validation import hold_out

WORLD = 2
STEPS = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]

CASES: dict[str, dict[str, Any]] = {
    **{name: {"settings": {"head_lr": 0.0, **settings}} for name, settings in EVERY_PART.items()},
    "a spread head": {"settings": {"sample_rate": 0.75}},
    "a spread head, all centers": {"settings": {"sample_rate": 1.0}},
    "a spread head, clusters of texts": {"settings": EVERY_PART["clusters of texts, a head that learns"]},
    "a spread head, several labels": {"settings": {"labels": 3, "ignore_near": 0.3, "logq": "both"}},
    "in micro-batches": {"settings": {}, "micro_batch": 3},
    "mapped, in micro-batches": {"settings": {"head_lr": 0.0, "alignment": "linear"}, "micro_batch": 3},
    "with texts alone": {"settings": {"head_lr": 0.0, **EVERY_PART["those of stored vectors"]}, "lines": True},
    "with texts alone, in micro-batches": {
        "settings": {"head_lr": 0.0, **EVERY_PART["those of stored vectors"]},
        "lines": True,
        "micro_batch": 3,
    },
}
_EVERY = {"siglip": 1.0, "affinity": 1.0, "feature": 2000.0, "icl": 1.0, **STORED}
CASES |= {
    f"images {alone} alone{more}": {
        "settings": {"head_lr": 0.0, "weights": _EVERY, "bank_size": 13, "alignment": "linear"},
        "alone": alone,
        **how,
    }
    for alone, more, how in (
        ((1, 2, 3, 6), "", {}),
        ((4, 5, 6, 7), "", {}),  # all of the second rank
        ((0, 1, 2, 3, 6), ", in micro-batches", {"micro_batch": 3}),
        ((4, 5, 6, 7), ", beside texts alone", {"lines": True}),
        (tuple(range(BATCH)), "", {}),
    )
}
TRAININGS: dict[str, dict[str, Any]] = {
    "joint": {},
    "with texts alone": {"settings": {"head_lr": 0.0, "weights": STORED, "bank_size": 13}, "lines": True},
    "with an EMA": {"settings": {"ema_decay": 0.9, "head_lr": 0.0}},
    "with gradients weighed, few pairs of a cluster": {"settings": {"weigh_gradients_every": 3, "per_cluster": 1}},
    # eight pairs are held out, so that none is left over whatever the number of ranks
    "measured": {"settings": {"validation": {"share": 0.4, "every": 16, "keep": "best"}}},
    # the step after a measurement must not see the EMA
    "with an EMA, measured": {
        "settings": {"ema_decay": 0.9, "alignment": "linear", "validation": {"share": 0.4, "every": 16}},
    },
}


class Killed(BaseException):
    """Ends a run without giving it a chance to save, as SIGKILL does."""


# What the ranks do


def training_of(case: dict[str, Any], folder: Path) -> TrainingPairs:
    training = training_pairs(folder)
    return with_lines(training) if case.get("lines") else training


def gradients(case: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Of the first batch, by parameter, whole; and the common norm, as `grad_norm`."""
    settings = make_settings(**case["settings"])
    torch.manual_seed(0)  # for the maps of `alignment: linear`
    model = make_model(settings, ranks=ranks).double()
    joint: Any = join_model(model, ranks)
    training = training_of(case, folder)
    batch = exact(next(make_batches(training, ranks=ranks, settings=settings).between(0, 1)))
    batch = with_labels(batch, settings)
    if "alone" in case:
        own = BATCH // ranks.size
        captioned = [place not in case["alone"] for place in range(BATCH)][ranks.rank * own :][:own]
        batch = dataclasses.replace(batch, captioned=torch.tensor(captioned))

    def loss(seen: dict[str, Tensor]) -> Tensor:
        if ranks.size == 1:
            return loss_of(model, batch, seen)
        generator = torch.Generator().manual_seed(5)
        parts = model.objective(seen, batch.targets, gather=ranks.gather, generator=generator)
        return weighted_sum(parts, settings.weights.model_dump())

    micro = case.get("micro_batch")
    backward_in_micro_batches(joint, batch, loss, micro_batch=micro, precision=torch.float32, seed=3)
    norm = clip_gradients(with_spread(model), 1.0, ranks)
    found = {
        name: value.grad.to_dense()
        for name, value in model.named_parameters()
        if value.requires_grad and value.grad is not None
    }
    found["grad_norm"] = norm
    if model.objective.head is not None and model.objective.head.shard is not None:
        found["objective.head.weight"] = torch.cat(ranks.all(found["objective.head.weight"]))
    return found


def plain_state(trainer: Trainer) -> dict[str, Tensor]:
    state = dict(trainer.model.state_dict())
    head = trainer.model.objective.head
    if head is not None and head.shard is not None:
        state["objective.head.weight"] = torch.cat(trainer.ranks.all(state["objective.head.weight"]))
    return {name: value.clone() for name, value in state.items()}


def make(case: dict[str, Any], folder: Path, out: Path, ranks: Ranks, **more: Any) -> Trainer:
    settings = make_settings(**{"log_every": 1, **case.get("settings", {})})
    if share := settings.validation.share:
        more["training"], held_out = hold_out(training_pairs(folder), share, batch_size=BATCH, ranks=ranks.size)
        more["validation"] = make_validation(held_out, settings, sets=[stripes()], ranks=ranks)
    more.setdefault("training", training_of(case, folder))
    return make_trainer(folder, out, settings=settings, steps=STEPS, patch_dropout=0.0, ranks=ranks, **more)


def train(case: dict[str, Any], folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    trainer = make(case, folder, out, ranks)
    summary = trainer.run()
    found = {"state": plain_state(trainer), "student": trainer.student_state(), "summary": summary}
    return found | {"beside": trainer.objective_state()}


def killed_and_resumed(case: dict[str, Any], folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    trainer = make(case, folder, out, ranks, minutes=1e-9)
    before_step(trainer, 5, lambda: throw(Killed()))
    with contextlib.suppress(Killed):
        trainer.run()
    ranks.wait()
    return train(case, folder, out, ranks)


def throw(error: BaseException) -> None:
    raise error


def before_step(trainer: Trainer, step: int, action: Callable[[], object]) -> None:
    train_step = trainer._train_step

    def acting(batch: Any) -> Any:
        if trainer.step == step:
            action()
        return train_step(batch)

    trainer._train_step = acting


def asked_to_end(folder: Path, out: Path, ranks: Ranks) -> str:
    """Only the last rank is told; all of them stop after the same step."""
    trainer = make({}, folder, out, ranks)
    if ranks.rank == ranks.size - 1:
        before_step(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return error_of(trainer.run)


def with_a_broken_picture(folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    training = training_pairs(folder / "broken")
    ranks.wait()
    (folder / "broken" / "pairs" / "007.png").write_bytes(b"no picture")
    ranks.wait()
    summary = make({}, folder, out, ranks, training=training, max_bad_share=0.05).run()
    return {"unreadable": summary["unreadable_pairs"], "steps": summary["steps"]}


def in_float16(folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Weights that are whole on each rank beside a head that is spread."""
    trainer = make({"settings": {"precision": "fp16", "sample_rate": 1.0}}, folder, out, ranks)
    train_step, losses = trainer._train_step, []

    def noting(batch: Any) -> Any:
        measured = train_step(batch)
        losses.append(measured.loss)
        return measured

    trainer._train_step = noting
    return {"summary": trainer.run(), "first_loss": losses[0]}


def with_other_weights(folder: Path, out: Path, ranks: Ranks) -> str:
    return error_of(lambda: ranks.agree("weights", "a" if ranks.is_main else "b"))


def that_cannot_share(folder: Path, out: Path, ranks: Ranks) -> str:
    training = training_pairs(folder)
    dataset, how = make_dataset(training), {"seed": 0, "workers": 0, "pin": False}
    return error_of(lambda: Batches(training, dataset, batch_size=BATCH - 1, ranks=ranks, **how))


def that_cannot_share_lines(folder: Path, out: Path, ranks: Ranks) -> str:
    return error_of(lambda: make_batches(with_lines(training_pairs(folder), per_step=3), ranks=ranks))


def that_normalizes_over_the_batch(folder: Path, out: Path, ranks: Ranks) -> str:
    return error_of(lambda: with_joint_statistics(nn.Sequential(nn.BatchNorm1d(3)), ranks, None))


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (ClipCidError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def rank_main(rank: int, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    validation._ROWS = 8  # pictures in several rounds, the last of which are fewer than the ranks
    with join_ranks(torch.device("cpu")) as ranks:
        found: dict[str, Any] = {name: gradients(case, folder, ranks) for name, case in CASES.items()}
        for name, case in TRAININGS.items():
            found[f"trained {name}"] = train(case, folder, folder / f"{name} 2", ranks)
            found[f"resumed {name}"] = killed_and_resumed(case, folder, folder / f"{name} again", ranks)
        others = (
            asked_to_end,
            with_a_broken_picture,
            in_float16,
            with_other_weights,
            that_cannot_share,
            that_cannot_share_lines,
            that_normalizes_over_the_batch,
        )
        for case in others:
            found[case.__name__] = case(folder, folder / case.__name__, ranks)
            ranks.wait()
        torch.save(found, folder / f"rank-{rank}.pt")


# What the tests compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    training_pairs(folder)
    training_pairs(folder / "broken")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    processes.run_ranks(WORLD, rank_main, folder, processes.free_port())
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradient_of_one(found: list[dict[str, Any]], folder: Path, name: str):
    case = CASES[name]
    expected = gradients({**case, "micro_batch": None}, folder, ALONE)
    for rank in found:
        for key, gradient in expected.items():
            if key not in rank[name]:
                assert not gradient.any(), key
                continue
            scale = max(float(gradient.abs().max()), 1e-12)
            torch.testing.assert_close(
                rank[name][key], gradient, rtol=0, atol=1e-9 * scale, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_what_one_does(found: list[dict[str, Any]], folder: Path, tmp_path: Path, name: str):
    alone = train(TRAININGS[name], folder, tmp_path, ALONE)
    for rank in found:
        theirs = rank[f"trained {name}"]
        for kind in ("state", "student"):
            for key, value in alone[kind].items():
                torch.testing.assert_close(theirs[kind][key], value, rtol=5e-3, atol=5e-4)
        assert theirs["summary"]["processes"] == WORLD
        for key in ("loss", "steps", "pairs_seen", "epochs"):
            assert theirs["summary"][key] == pytest.approx(alone["summary"][key], rel=1e-4)
    ours, theirs = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (tmp_path, folder / f"{name} 2")
    )
    compared = ("step", "loss", "loss/cluster_kl", "grad_norm", "grad_norm/clip", "grad_norm/cluster_kl", "own_center")
    for mine, other in zip(ours, theirs, strict=True):
        weights = [key for key in mine if key.startswith("weight/")]
        assert bool(weights) == ("weighed" in name)
        keys = (*compared, *weights, "mean_image_norm", "negatives", "logit_scale") if "loss" in mine else mine
        for key in keys:
            assert other[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-6), key
    assert any("val/retrieval" in line for line in ours) == ("validation" in TRAININGS[name].get("settings", {}))


@pytest.mark.parametrize("name", TRAININGS)
def test_the_first_rank_leaves_all_that_was_learned_beside_the_student(
    found: list[dict[str, Any]], folder: Path, tmp_path: Path, name: str
):
    """Spread over the ranks or not: the rows of the head, the maps into the teacher's space, the scale."""
    alone, first = train(TRAININGS[name], folder, tmp_path, ALONE)["beside"], found[0][f"trained {name}"]["beside"]
    assert first.keys() == alone.keys() >= {"instance_logit_scale"}
    for key, value in alone.items():
        assert type(first[key]) is Tensor
        torch.testing.assert_close(first[key], value, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("name", TRAININGS)
def test_ranks_end_with_equal_weights(found: list[dict[str, Any]], name: str):
    first, second = (rank[f"trained {name}"]["state"] for rank in found)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.resume
@pytest.mark.parametrize("name", TRAININGS)
def test_killed_ranks_resume_exactly(found: list[dict[str, Any]], folder: Path, name: str):
    for rank in found:
        for kind in ("state", "student"):
            straight, resumed = rank[f"trained {name}"][kind], rank[f"resumed {name}"][kind]
            different = [key for key, value in straight.items() if not torch.equal(value, resumed[key])]
            assert not different
    lines = [json.loads(line) for line in (folder / f"{name} again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "loss" not in line] == ([2, 4, 6, 8] if "measured" in name else [])


@pytest.mark.resume
def test_one_process_resumes_from_what_two_have_saved(folder: Path, found: list[dict[str, Any]]):
    """A head that learns is spread over the two."""
    out = folder / "joint 2"
    alone = make({}, folder, out, ALONE)
    alone._resume()
    state = found[0]["trained joint"]["state"]
    assert alone.step == STEPS
    assert all(torch.equal(value, state[key]) for key, value in alone.model.state_dict().items())
    assert alone.model.objective.head is not None
    assert len(alone.model.objective.head.weight) == CENTERS


def test_one_rank_that_is_asked_to_end_ends_all_after_the_same_step(folder: Path, found: list[dict[str, Any]]):
    assert [rank["asked_to_end"].split("\n")[0] for rank in found] == [
        "RunError: Stopped by SIGTERM after step 4, which is saved."
    ] * WORLD
    assert [path.name for path in (folder / "asked_to_end" / "checkpoints").glob("*.pt")] == ["step-000004.pt"]


def test_a_picture_that_one_rank_cannot_read_is_listed_once(folder: Path, found: list[dict[str, Any]]):
    lines = (folder / "with_a_broken_picture" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [7]
    assert [rank["with_a_broken_picture"] for rank in found] == [{"unreadable": 1, "steps": STEPS}] * WORLD


def test_ranks_train_in_float16_what_one_process_does(folder: Path, found: list[dict[str, Any]], tmp_path: Path):
    """The first step begins at equal weights. Later ones may part, since float16 skips those that overflow."""
    alone = in_float16(folder, tmp_path, ALONE)
    theirs = [rank["in_float16"] for rank in found]
    for rank in theirs:
        summary = rank["summary"]
        assert (summary["precision"], summary["steps"], summary["skipped_steps"]) == ("float16", STEPS, 0)
        assert rank["first_loss"] == pytest.approx(alone["first_loss"], rel=1e-3)
    assert theirs[0]["summary"]["loss"] == theirs[1]["summary"]["loss"]


def test_ranks_that_differ_stop(found: list[dict[str, Any]]):
    assert [rank["with_other_weights"].split(".")[0] for rank in found] == [
        "RunError: rank 1 of 2 has different weights than rank 0"
    ] * WORLD


@pytest.mark.parametrize("error", [None, DataError("broken", fix="mend it"), KeyboardInterrupt()])
def test_a_rank_with_an_error_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None
):
    """Taking the group down is a matter of all ranks: with NCCL one alone would hang in it."""
    calls: list[str] = []
    alone_at_the_meeting(monkeypatch, size=2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with contextlib.suppress(DataError, KeyboardInterrupt), join_ranks(torch.device("cpu")):
        if error is not None:
            raise error
    assert calls == (["destroyed"] if error is None else [])


def alone_at_the_meeting(monkeypatch: pytest.MonkeyPatch, *, size: int) -> None:
    """As if the other processes were there."""
    monkeypatch.setenv("WORLD_SIZE", str(size))
    meeting = SimpleNamespace(
        store=HashStore(), all_have_cuda=True, tell=lambda _: None, stand=lambda: None, end=lambda: None
    )
    monkeypatch.setattr(Ranks, "wait", lambda _: None)
    monkeypatch.setattr(distributed, "Meeting", lambda _: meeting)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)


def test_more_processes_than_devices_are_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    alone_at_the_meeting(monkeypatch, size=4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ConfigError, match=r"process 2 of this machine has no CUDA device of its own; there are 2"),
        join_ranks(torch.device("cuda")),
    ):
        raise AssertionError("no process should get here")


def test_a_machine_with_cuda_beside_one_without_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    alone_at_the_meeting(monkeypatch, size=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    with (
        pytest.raises(ConfigError, match="another machine of this torchrun has no CUDA"),
        join_ranks(torch.device("cuda")),
    ):
        raise AssertionError("no process should get here")


def test_what_ranks_cannot_share_is_told_in_words(found: list[dict[str, Any]]):
    for rank in found:
        assert "ConfigError: distill.batch_size: 7 pairs cannot be shared equally by 2" in rank["that_cannot_share"]
        assert "Set distill.batch_size to 6" in rank["that_cannot_share"]
        assert "distill.texts_per_step: 3 lines cannot be shared equally by 2" in rank["that_cannot_share_lines"]
        assert "Set distill.texts_per_step to 2" in rank["that_cannot_share_lines"]
        assert "on CUDA only" in rank["that_normalizes_over_the_batch"]


def test_batch_normalization_refuses_micro_batches_and_is_left_alone_in_one_process():
    student = nn.Sequential(nn.BatchNorm1d(3))
    assert with_joint_statistics(student, ALONE, None) is student
    with pytest.raises(ConfigError, match="would normalize over each micro-batch"):
        with_joint_statistics(student, ALONE, 4)
    student.eval()  # a locked tower normalizes by what it knows
    assert with_joint_statistics(student, ALONE, 4) is student


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
