import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import oracle_loss, oracle_parts
from tiny_training import (
    BATCH,
    CENTERS,
    Stripes,
    make_clip,
    make_pairs,
    make_settings,
    make_trainer,
    make_validation,
    stripes,
    tokenize,
    training_pairs,
    unit_rows,
)
from torch import Tensor

from clip_cid.errors import DataError, RunError
from clip_cid.training.batches import TrainingPairs
from clip_cid.training.loop import Trainer
from clip_cid.training.ranks.distributed import Ranks
from clip_cid.training.validation import Best, HeldOut, hold_out

STEPS = 10


class Killed(BaseException):
    """Ends a run without giving it a chance to save, as SIGKILL does."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validation")


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# Which pairs are held out


def plain(folder: Path, rows: Iterable[int]) -> TrainingPairs:
    return TrainingPairs(make_pairs(folder / "pairs"), np.array([*rows]))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_about_the_share_is_held_out_in_whole_batches_and_never_trained_on(folder: Path, share: float):
    training, held_out = hold_out(plain(folder, range(20_000)), share, batch_size=256, ranks=4)
    rows, kept = set(training.rows.tolist()), held_out.pairs.rows.tolist()
    assert not rows & set(kept)
    assert kept == sorted(set(kept))
    deviation = math.sqrt(20_000 * share * (1 - share))
    assert abs(20_000 - len(rows) - 20_000 * share) < 4 * deviation
    batches, rest = divmod(len(kept), held_out.batch_size)
    assert rest == held_out.batch_size % 4 == 0
    assert held_out.batch_size <= 256
    assert 0 <= 20_000 - len(rows) - len(kept) < 4 * batches  # what does not fill a batch is in neither


@pytest.mark.parametrize("pairs", [11, 20, 21, 34, 55])
@pytest.mark.parametrize(("batch_size", "ranks"), [(2, 1), (3, 1), (2, 2), (4, 4), (4, 2), (7, 1)])
def test_no_batch_of_held_out_pairs_is_a_single_pair(folder: Path, pairs: int, batch_size: int, ranks: int):
    """Its contrastive loss would be 0 whatever the student is."""
    training, held_out = hold_out(plain(folder, range(pairs)), 0.5, batch_size=batch_size, ranks=ranks)
    own = pairs - len(training)
    batches, rest = divmod(len(held_out.pairs), held_out.batch_size)
    assert rest == held_out.batch_size % ranks == 0
    assert 2 <= held_out.batch_size <= batch_size
    assert batches >= 1
    assert own - len(held_out.pairs) < max(2, ranks) * (batches + 1)


def test_a_pair_is_held_out_or_not_whatever_is_balanced_away_and_however_many_ranks_there_are(folder: Path):
    everything = plain(folder, range(5000))
    training, held_out = hold_out(everything, 0.1, batch_size=64, ranks=1)
    trained, measured = set(training.rows.tolist()), set(held_out.pairs.rows.tolist())
    kept = np.random.default_rng(0).permutation(5000)[:1700]
    for ranks, batch_size in ((1, 64), (8, 64), (2, 1000)):
        fewer, still = hold_out(plain(folder, kept), 0.1, batch_size=batch_size, ranks=ranks)
        assert set(fewer.rows.tolist()) == trained & set(kept.tolist())
        assert not set(still.pairs.rows.tolist()) & trained
        assert len(set(still.pairs.rows.tolist()) & measured) > 100
    more, _ = hold_out(everything, 0.3, batch_size=64, ranks=1)
    assert set(more.rows.tolist()) < trained


def test_what_is_known_of_the_pairs_stays_with_their_rows(folder: Path):
    whole = training_pairs(folder)
    for part in (found := hold_out(whole, 0.5, batch_size=BATCH, ranks=1))[0], found[1].pairs:
        assert part.labels is not None
        assert whole.labels is not None
        assert part.store_rows is not None
        assert part.labels.tolist() == whole.labels[part.rows].tolist()
        assert part.store_rows.tolist() == part.rows.tolist()


def test_too_few_to_measure_are_told(folder: Path):
    with pytest.raises(DataError, match=r"share: 0\.01 of 21 pairs are too few to measure anything"):
        hold_out(training_pairs(folder), 0.01, batch_size=BATCH, ranks=1)


# What is measured


def halves(folder: Path) -> tuple[TrainingPairs, HeldOut]:
    """13 pairs to train on and 8 to measure, in two batches."""
    return hold_out(training_pairs(folder), 0.5, batch_size=5, ranks=1)


def by_hand(student: Any) -> float:
    """Zero-shot accuracy in float64."""
    clip, labelled = make_clip(student), stripes()
    student.eval()
    with torch.no_grad():
        classes = []
        for label in range(3):
            texts = student.encode_text(tokenize(labelled.prompts(label)), normalize=True).double()
            classes.append(texts.mean(dim=0) / texts.mean(dim=0).norm())
        rows = [row for row in range(30) if row != 4]
        pixels = torch.stack([clip.preprocess(Stripes().load(row)) for row in rows])
        found = student.encode_image(pixels, normalize=True).double() @ torch.stack(classes).T
    student.train()
    return float((found.argmax(dim=1).numpy() == np.array(rows) % 3).mean())


def recall(similarity: np.ndarray, depth: int) -> float:
    own = np.diag(similarity)[:, None]
    return float(((similarity > own).sum(axis=1) < depth).mean())


@pytest.mark.slow
def test_the_numbers_are_those_of_a_computation_of_its_own(folder: Path, tmp_path: Path):
    """Losses, recalls and zero-shot of the student as it is left, without dropout."""
    training, held_out = halves(folder)
    settings = make_settings(head_lr=0.0, sample_rate=1.0, validation={"share": 0.5, "sets": {"stripes": "here"}})
    validation = make_validation(held_out, settings, sets=[stripes()])
    assert validation.batches is not None
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS, training=training, validation=validation)
    trainer.run()
    line = [line for line in lines_of(tmp_path) if "val/loss" in line][-1]
    assert line["step"] == STEPS
    student, scale = trainer.model.student, trainer.model.objective.instance_logit_scale
    assert scale is not None
    student.eval()
    weights, parts = settings.weights.model_dump(), list[dict[str, Tensor]]()
    images, texts = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for batch in validation.batches.in_order():
            found = oracle_parts(student, batch, torch.from_numpy(unit_rows(CENTERS, seed=5)), scale, weights)
            parts.append({**found, "total": oracle_loss(found, weights)})
            images.append(student.encode_image(batch.images, normalize=True))
            texts.append(student.encode_text(batch.texts, normalize=True))
    assert len(parts) >= 2
    for name in parts[0]:
        key = "val/loss" if name == "total" else f"val/loss/{name}"
        assert line[key] == pytest.approx(float(torch.stack([part[name] for part in parts]).mean()), rel=1e-4), key
    similarity = (torch.cat(images) @ torch.cat(texts).T).double().numpy()
    recalls = []
    for way, table in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        for depth in (1, 5, 10):
            recalls.append(recall(table, depth))
            assert line[f"val/retrieval/{way}_R@{depth}"] == pytest.approx(recalls[-1])
    assert line["val/retrieval"] == pytest.approx(np.mean(recalls))
    assert line["val/zero_shot"] == line["val/zero_shot/stripes"] == pytest.approx(by_hand(student))
    assert 0 < line["val/zero_shot"] < 1


def test_with_an_ema_it_is_the_ema_that_is_measured(folder: Path, tmp_path: Path):
    settings = make_settings(
        ema_decay=0.9, validation={"sets": {"stripes": "here"}, "metric": "zero_shot", "every": 16}
    )
    validation = make_validation(None, settings, sets=[stripes()])
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS, validation=validation)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    measure = validation.measure

    def watched(*arguments: Any, **more: Any) -> Any:
        found = measure(*arguments, **more)
        state: Any = trainer.learner.ema and trainer.learner.ema.state_dict()
        assert found["val/zero_shot"] == by_hand(trainer.model.student)
        seen.append((trainer.model.student.visual.proj.clone(), state["mean"]["visual.proj"].clone(), before[-1]))
        return found

    before: list[Tensor] = []
    update = trainer.learner.update

    def updated() -> None:
        update()
        before.append(trainer.model.student.visual.proj.clone())

    trainer.learner.update = updated
    object.__setattr__(validation, "measure", watched)
    trainer.run()
    assert len(seen) == 5
    for measured, aside, raw in seen:
        assert torch.equal(aside, raw)  # the weights wait where the EMA was
        assert not torch.equal(measured, raw)


def test_the_first_rank_has_the_numbers_of_all(folder: Path, tmp_path: Path):
    """What each computes for itself may differ by rounding, and then one would stop where another goes on."""

    class Second(Ranks):
        def all(self, value: Any) -> list[Any]:
            return [{name: number + 1e-7 for name, number in value.items()}, value]

    _, held_out = hold_out(training_pairs(folder), 0.4, batch_size=BATCH, ranks=1)
    found: list[dict[str, float]] = []
    for number, ranks in enumerate((Ranks(), Second())):
        trainer = make_trainer(folder, tmp_path / str(number), patch_dropout=0.0)
        validation = make_validation(held_out, trainer.settings, ranks=ranks)
        arguments: dict[str, Any] = {"precision": torch.float32, "note_bad": lambda bad: None}
        found.append(validation.measure(trainer.model, trainer.model, **arguments))
    own, agreed = found
    assert agreed == {name: number + 1e-7 for name, number in own.items()}


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_training(folder: Path, tmp_path: Path):
    watched = make_settings(validation={"sets": {"stripes": "here"}, "metric": "zero_shot", "every": 8})
    found = []
    for name, settings in (("watched", watched), ("alone", make_settings())):
        validation = make_validation(None, settings, sets=[stripes()]) if name == "watched" else None
        trainer = make_trainer(folder, tmp_path / name, settings=settings, steps=STEPS, validation=validation)
        trainer.run()
        found.append((trainer.model.state_dict(), [line for line in lines_of(tmp_path / name) if "loss" in line]))
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert [line["loss"] for line in found[0][1]] == [line["loss"] for line in found[1][1]]
    assert trainer.model.training


@pytest.mark.slow
def test_a_held_out_picture_that_cannot_be_read_is_listed_and_counted(tmp_path: Path):
    training, held_out = halves(tmp_path)
    (tmp_path / "pairs" / "007.png").write_bytes(b"no picture")
    settings = make_settings(validation={"share": 0.5, "every": 16})
    assert 7 in held_out.pairs.rows
    out = tmp_path / "out"
    more: dict[str, Any] = {"settings": settings, "steps": STEPS, "training": training}
    trainer = make_trainer(tmp_path, out, validation=make_validation(held_out, settings), max_bad_share=0.1, **more)
    assert trainer.run()["unreadable_pairs"] == 1
    assert [json.loads(line)["row"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [7]
    strict = make_trainer(
        tmp_path, tmp_path / "strict", validation=make_validation(held_out, settings), max_bad_share=0.01, **more
    )
    with pytest.raises(DataError, match=f"1 of {len(training)} pairs cannot be read"):
        strict.run()


# When it is measured, and what follows


def planned(
    folder: Path, out: Path, plan: dict[int, float], *, killed_before: int | None = None, **settings: Any
) -> tuple[Trainer, dict[int, Tensor]]:
    """A trainer whose measurements come out as planned, and the text projection at each of them."""
    watched = {"sets": {"stripes": "here"}, "metric": "zero_shot", "every": BATCH, **settings.pop("validation", {})}
    made = make_settings(validation=watched, **settings)
    validation = make_validation(None, made, sets=[stripes()])
    trainer = make_trainer(folder, out, settings=made, steps=STEPS, validation=validation)
    seen: dict[int, Tensor] = {}

    def measure(*arguments: Any, **more: Any) -> dict[str, float]:
        seen[trainer.step] = trainer.model.student.text_projection.detach().clone()
        return {f"val/{watched['metric']}": plan.get(trainer.step, 0.0)}

    object.__setattr__(validation, "measure", measure)
    train_step = trainer._train_step

    def step(batch: Any) -> Any:
        if trainer.step == killed_before:
            raise Killed
        return train_step(batch)

    trainer._train_step = step
    return trainer, seen


@pytest.mark.parametrize(
    ("every", "steps"), [(20, [3, 5, 8, 10]), (8, [*range(1, 11)]), (None, [3, 6, 8, 10]), (1000, [10])]
)
def test_it_is_measured_after_so_many_pairs_and_once_at_the_end(
    folder: Path, tmp_path: Path, every: int | None, steps: list[int]
):
    """Batches of 8; an epoch has 21 pairs."""
    trainer, seen = planned(folder, tmp_path, {}, validation={"every": every})
    trainer.run()
    assert [*seen] == steps
    assert [line["step"] for line in lines_of(tmp_path) if "val/zero_shot" in line] == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "plan", "best"),
    [
        ("zero_shot", {2: 0.3, 4: 0.7, 5: 0.7, 9: 0.6}, 4),  # of equals the first
        ("loss", {step: 9.0 - step if step < 7 else 5.0 for step in range(1, 11)}, 6),
        ("zero_shot", {1: math.nan, 3: 0.2, 4: math.inf, 8: math.nan}, 3),  # which are never the best
    ],
)
def test_the_best_student_is_left(folder: Path, tmp_path: Path, metric: str, plan: dict[int, float], best: int):
    validation = {"keep": "best", "metric": metric, **({"share": 0.1} if metric == "loss" else {})}
    trainer, seen = planned(folder, tmp_path, plan, validation=validation)
    summary = trainer.run()
    assert torch.equal(trainer.student_state()["text_projection"], seen[best])
    assert (summary["best_step"], summary[f"best_{metric}"]) == (best, plan[best])
    lines = {line["step"]: line[f"val/{metric}"] for line in lines_of(tmp_path) if f"val/{metric}" in line}
    assert lines == {
        step: value if math.isfinite(value := plan.get(step, 0.0)) else None for step in range(1, STEPS + 1)
    }
    last, _ = planned(folder, tmp_path / "last", plan, validation={**validation, "keep": "last"})
    last.run()
    assert torch.equal(last.student_state()["text_projection"], seen[STEPS])


def test_no_student_that_could_be_measured_is_an_error_in_words(folder: Path, tmp_path: Path):
    plan = dict.fromkeys(range(1, STEPS + 1), math.nan)
    trainer, _ = planned(folder, tmp_path, plan, validation={"keep": "best"})
    assert "best_step" not in trainer.run()
    with pytest.raises(RunError, match="the weights of the best student cannot be read"):
        trainer.student_state()


PLAN = {1: 0.1, 2: 0.5, 3: 0.4, 4: 0.6, 5: 0.6, 6: 0.3, 7: 0.2, 8: 0.9}
"""With a patience of 3 the training ends after step 7 and leaves the student of step 4."""
PATIENT = {"keep": "best", "patience": 3}


def test_patience_ends_the_training_and_starting_it_again_does_nothing(folder: Path, tmp_path: Path):
    trainer, seen = planned(folder, tmp_path, PLAN, validation=PATIENT)
    summary = trainer.run()
    assert (trainer.step, summary["steps"], summary["best_step"]) == (7, 7, 4)
    assert torch.equal(trainer.student_state()["text_projection"], seen[4])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again, seen_again = planned(folder, tmp_path, PLAN, validation=PATIENT)
    assert again.run()["steps"] == 7
    assert not seen_again
    assert torch.equal(again.student_state()["text_projection"], seen[4])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize(("kills", "minutes"), [((5,), 1e-9), ((2, 4, 6), 1e-9), ((6,), 60.0)])
def test_a_killed_training_finds_the_best_student_of_an_uninterrupted_one(
    folder: Path, tmp_path: Path, kills: tuple[int, ...], minutes: float
):
    """Whether the newest checkpoint is of the step before the kill or there is none: each measurement has one line."""
    straight, _ = planned(folder, tmp_path / "straight", PLAN, validation=PATIENT)
    straight.run()
    for kill in kills:
        trainer, _ = planned(folder, tmp_path / "killed", PLAN, validation=PATIENT, killed_before=kill)
        trainer.machine = trainer.machine.model_copy(update={"checkpoint_minutes": minutes})
        with pytest.raises(Killed):
            trainer.run()
    resumed, _ = planned(folder, tmp_path / "killed", PLAN, validation=PATIENT)
    assert resumed.run()["best_step"] == 4
    ours, theirs = resumed.student_state(), straight.student_state()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    ours, theirs = (
        [(line["step"], line.get("loss"), line.get("val/zero_shot")) for line in lines_of(tmp_path / name)]
        for name in ("killed", "straight")
    )
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.resume
def test_killed_between_the_last_measurement_and_its_checkpoint(folder: Path, tmp_path: Path):
    """The decision to stop is made again, and is the same."""
    trainer, seen = planned(folder, tmp_path, PLAN, validation=PATIENT)
    save: Callable[[], None] = trainer._save

    def die() -> None:
        if trainer.step == 7:
            raise Killed
        save()

    trainer._save = die
    with pytest.raises(Killed):
        trainer.run()
    resumed, _ = planned(folder, tmp_path, PLAN, validation=PATIENT)
    assert resumed.run()["steps"] == 7
    assert torch.equal(resumed.student_state()["text_projection"], seen[4])


def test_the_best_of_another_training_is_refused(folder: Path, tmp_path: Path):
    trainer, _ = planned(folder, tmp_path, PLAN, validation=PATIENT)
    trainer.run()
    path = tmp_path / "checkpoints" / "best.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "key": "another"}, path)
    with pytest.raises(RunError, match="of another training"):
        trainer.student_state()
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(RunError, match="cannot be read"):
        trainer.student_state()


def test_patience_counts_measurements_without_a_better_one():
    best = Best("loss", patience=2)
    found = [(best.is_new({"val/loss": value}, step), best.is_past) for step, value in enumerate([3.0, 2.0, 2.0, 1.0])]
    assert found == [(True, False), (True, False), (False, False), (True, False)]
    assert [best.is_new({"val/loss": 5.0}, 9), best.is_past, best.is_new({"val/loss": 1.0}, 10), best.is_past] == [
        False,
        False,
        False,
        True,
    ]
    assert (best.value, best.step) == (1.0, 3)


def test_embeddings_that_are_not_finite_give_no_number_and_no_traceback(folder: Path, tmp_path: Path):
    _, held_out = halves(folder)
    settings = make_settings(validation={"share": 0.5})
    validation = make_validation(held_out, settings, sets=[stripes()])
    trainer = make_trainer(folder, tmp_path, settings=settings)
    with torch.no_grad():
        trainer.model.student.visual.proj.fill_(math.nan)
    numbers = validation.measure(trainer.model, trainer.model, precision=torch.float32, note_bad=lambda bad: None)
    for name in ("val/loss", "val/retrieval", "val/zero_shot"):
        assert math.isnan(numbers[name])
