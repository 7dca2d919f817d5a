"""Defects that were found in other trainers of CLIP students, and that are not to come back here.

Two have their tests elsewhere: the learned scale that gets its gradient once for each micro-batch
(`test_micro_batches.py`, every objective), and parts of the loss that differ between ranks (`test_ranks.py`).
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training
import torch
from tiny_training import make_batches, make_settings, make_trainer, training_pairs

from clip_cid import cli
from clip_cid.errors import DataError
from clip_cid.loss_table import LOSSES
from clip_cid.models.student import build_student
from clip_cid.training.loop import Trainer

STEPS = 8


class Killed(BaseException):
    """Ends a run without giving it a chance to save, as SIGKILL does."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("defects")


def rows_seen(trainer: Trainer, *, kill_before: int | None = None) -> list[list[int]]:
    """The rows of each batch of the trainer's run."""
    seen: list[list[int]] = []
    train_step = trainer._train_step

    def step(batch: Any) -> Any:
        if trainer.step == kill_before:
            raise Killed
        seen.append(batch.rows.tolist())
        return train_step(batch)

    trainer._train_step = step
    if kill_before is None:
        trainer.run()
    else:
        with pytest.raises(Killed):
            trainer.run()
    return seen


def write_pairs(path: Path) -> str:
    tiny_training.make_pairs(path)
    return str(path)


@pytest.mark.slow
def test_distillation_is_never_off_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A teacher named without its weights made another trainer drop the distillation, train plain CLIP and exit with 0."""
    source = ["--pairs.source", write_pairs(tmp_path / "pairs")]
    run = tmp_path / "run"
    assert cli.main(["run", str(run), *source, "--embed.teacher", "ViT-B-32", "--embed.pretrained", "None"]) == 2
    assert "ViT-B-32 is an architecture without weights" in capsys.readouterr().err
    for weights in ("cluster-cls", "instance-text", "affinity", "feature", "icl"):
        off = [f"--distill.weights.{name}" for name in ("cluster-cls", "cluster-kl", "instance-image", "instance-text")]
        flags = [text for name in off for text in (name, "0")] + [f"--distill.weights.{weights}", "1"]
        assert cli.main(["run", str(tmp_path / "none"), *source, "--embed.teacher", "none", *flags]) == 2
        assert "embed.teacher: none, but distill.weights asks for distillation" in capsys.readouterr().err
    assert not (run / "distill").exists()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_student_with_a_bias_takes_every_part_of_the_loss(folder: Path, tmp_path: Path, micro_batch: int | None):
    """Another trainer's distillation did not know the logit bias of SigLIP's kind of model, and crashed."""
    settings = make_settings(weights={loss.name: 1.0 for loss in LOSSES}, log_every=1, alignment="linear")
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS, micro_batch=micro_batch)
    before = trainer.model.student.logit_bias.item()
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line, loss in itertools.product(lines, LOSSES):
        assert math.isfinite(line[f"loss/{loss.name}"])
    assert before == -10 != trainer.model.student.logit_bias.item()


@pytest.mark.parametrize("command", ["distill", "evaluate", "balance"])
def test_a_start_that_is_refused_does_not_look_like_a_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    """Another trainer printed a message with a hole in it and exited with 0."""
    run = tmp_path / "run"
    flags = ["--evaluate.sets", "digits", "builtin:digits"] if command == "evaluate" else []
    assert cli.main([command, str(run), "--recipe", write_recipe(tmp_path), *flags]) == 1
    error = capsys.readouterr().err
    assert "needs" in error
    assert "{" not in error
    (tmp_path / "file").write_text("in the way")
    assert cli.main([command, str(tmp_path / "file"), "--recipe", write_recipe(tmp_path), *flags]) == 1


def write_recipe(tmp_path: Path, **distill: Any) -> str:
    source = write_pairs(tmp_path / "pairs")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"pairs": {"source": [source]}, "embed": {"teacher": "run:x"}, "distill": distill}))
    return str(path)


@pytest.mark.slow
def test_two_processes_with_one_seed_see_the_same_batches(folder: Path):
    """Another trainer seeded its shuffle with the process's number and the time."""
    batches = make_batches(training_pairs(folder), workers=2).between(0, 4)
    ours = [f"{batch.rows.tolist()} {batch.texts.tolist()} {batch.images.double().sum().item()}" for batch in batches]
    program = (
        f"import sys; sys.path.insert(0, {str(Path(tiny_training.__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from tiny_training import make_batches, training_pairs\n"
        f"for batch in make_batches(training_pairs(Path({str(folder)!r})), workers=2).between(0, 4):\n"
        "    print(batch.rows.tolist(), batch.texts.tolist(), batch.images.double().sum().item())\n"
    )
    command = [sys.executable, "-c", program]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(theirs) == 4
    assert theirs == ours


def test_weights_that_are_not_there_are_an_error(tmp_path: Path):
    """Another trainer logged a warning and went on with random weights."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with pytest.raises(DataError, match="its weights could not be loaded"):
        build_student(str(tmp_path / "tiny.json"), embed_dim=None, pretrained=str(tmp_path))


@pytest.mark.resume
def test_what_learns_beside_the_student_is_in_the_checkpoint_with_its_moments(folder: Path, tmp_path: Path):
    """Another trainer's maps and scales were not saved: a resumed run began them at random, with the old moments."""
    settings = make_settings(alignment="linear", head_lr=0.0)
    trainer = make_trainer(folder, tmp_path, settings=settings, steps=STEPS)
    trainer.run()
    state = torch.load(tmp_path / "checkpoints" / f"step-{STEPS:06d}.pt", weights_only=True)
    beside = {"objective.image_map.weight", "objective.text_map.weight", "objective.instance_logit_scale"}
    assert beside <= state["parts"]["model"].keys()
    learned = sum(value.requires_grad for value in trainer.model.parameters())
    moments = [part["state"] for name, part in state["parts"].items() if name.startswith("optimizer")]
    assert sum(map(len, moments)) == learned
    again = make_trainer(folder, tmp_path, settings=settings, steps=STEPS)
    with torch.no_grad():
        for value in again.model.parameters():
            value.add_(1.0)
    again._resume()
    assert all(torch.equal(again.model.state_dict()[name], state["parts"]["model"][name]) for name in beside)


def test_a_scale_is_used_with_its_exponential(folder: Path):
    """Another trainer multiplied by the logarithm of its scale: 2.7 instead of 14.3."""
    trainer = make_trainer(folder, folder / "scale", settings=make_settings(head_lr=0.0, weights={"icl": 1.0}))
    batch = next(make_batches(training_pairs(folder)).between(0, 1))
    seen = trainer.model(batch.images, batch.texts, precision=torch.float32)
    part = trainer.model.objective(seen, batch.targets, generator=torch.Generator())["icl"].item()
    assert batch.teacher_text is not None
    assert batch.teacher_image is not None
    ways = (seen["image"], batch.teacher_text), (seen["text"], batch.teacher_image)
    own = torch.arange(len(batch.rows))
    by_scale = [
        sum(torch.nn.functional.cross_entropy(scale * rows @ others.T, own).item() for rows, others in ways) / 2
        for scale in (1 / 0.07, math.log(1 / 0.07))
    ]
    assert part == pytest.approx(by_scale[0], rel=1e-4)
    assert abs(part - by_scale[1]) > 0.05


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize("kill", [1, 3, 6])
def test_a_resumed_run_sees_the_batches_that_follow_and_no_others(folder: Path, tmp_path: Path, kill: int):
    """Another trainer said that it went forward, but only counted from another number: its data began anew."""
    whole = rows_seen(make_trainer(folder, tmp_path / "whole", steps=STEPS))
    before = rows_seen(make_trainer(folder, tmp_path / "killed", steps=STEPS, minutes=1e-9), kill_before=kill)
    after = rows_seen(make_trainer(folder, tmp_path / "killed", steps=STEPS))
    assert before + after == whole
    assert len(after) == STEPS - kill


@pytest.mark.parametrize("table", ["img_emb", "text_emb"])
def test_an_embedding_that_is_empty_is_refused_with_its_row(tmp_path: Path, table: str):
    """Another tool left 744 of 1,000 embeddings empty, and nothing that read them said so."""
    training = training_pairs(tmp_path)
    path = tmp_path / "store" / table / f"{table}_0000.npy"
    vectors = np.load(path)
    vectors[11] = 0
    np.save(path, vectors)
    with pytest.raises(DataError, match=r"embedding of row 11 has length 0, not 1"):
        make_trainer(tmp_path, tmp_path / "out", training=training, steps=STEPS).run()


@pytest.mark.parametrize(
    ("distill", "says"),
    [
        ({"epoch": 3}, "distill.epoch: no such setting; did you mean epochs?"),
        ({"schedule": {"clipp": [[0, 1]]}}, "schedule: no loss named 'clipp'"),
        ({"schedule": {"clip": [[0.5, 1], [0.2, 1]]}}, "schedule.clip: needs points"),
        ({"weights": "clip-kid"}, "weights: no preset named 'clip-kid'; there are clip-cid, best"),
        ({"validation": {"keep": "best"}}, "keep: best and patience need validation.share or validation.sets"),
        ({"validation": {"share": 0.1, "patience": 3}}, "set validation.keep: best"),
        ({"validation": {"share": 0.1, "metric": "zero_shot"}}, "is measured on validation.sets, which is not set"),
    ],
)
def test_a_wrong_setting_is_told_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], distill: dict[str, Any], says: str
):
    """Another trainer answered a misspelt setting with twenty lines of its own insides."""
    run = tmp_path / "run"
    assert cli.main(["distill", str(run), "--recipe", write_recipe(tmp_path, **distill)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 3  # what is wrong, where, and what to do
    assert not run.exists()
