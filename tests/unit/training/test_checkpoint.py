import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_settings, make_trainer
from torch import nn

from clip_cid.errors import RunError
from clip_cid.training import checkpoint, room
from clip_cid.training.ranks.head_shards import WEIGHT, write_rows
from clip_cid.training.state import Part

pytestmark = pytest.mark.resume


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_two_are_kept(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for step in (1, 5, 1_000_000):
        checkpoint.save(folder, step, {"key": "a", "weight": torch.full((2,), float(step))})
    assert names(folder) == ["step-000005.pt", "step-1000000.pt"]
    state = checkpoint.load_newest(folder, key="a")
    assert state is not None
    assert state["step"] == 1_000_000
    assert torch.equal(state["weight"], torch.full((2,), 1e6))


def test_no_checkpoint_means_from_the_start(tmp_path: Path):
    assert checkpoint.load_newest(tmp_path / "checkpoints", key="a") is None


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """One bit of a tensor; PyTorch would load this without a word."""
    at = content.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b""], ids=["cut", "one bit", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage
):
    checkpoint.save(tmp_path, 1, {"key": "a", "weight": torch.arange(1000.0)})
    newest = checkpoint.save(tmp_path, 2, {"key": "a", "weight": torch.arange(1000.0)})
    newest.write_bytes(damage(newest.read_bytes()))
    state = checkpoint.load_newest(tmp_path, key="a")
    assert state is not None
    assert state["step"] == 1
    assert "step-000002.pt is damaged" in caplog.text
    assert names(tmp_path) == ["step-000001.pt"]


def test_what_a_killed_write_left_is_cleared_away(tmp_path: Path):
    checkpoint.save(tmp_path, 1, {"key": "a"})
    (tmp_path / ".step-000002.pt.tmp-77").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path, key="a") is not None
    assert names(tmp_path) == ["step-000001.pt"]


def test_a_checkpoint_of_other_work_is_refused_and_left_alone(tmp_path: Path):
    checkpoint.save(tmp_path / "checkpoints", 7, {"key": "a"})
    with pytest.raises(RunError, match="made with other settings") as error:
        checkpoint.load_newest(tmp_path / "checkpoints", key="b")
    assert f"Delete {tmp_path}" in error.value.fix
    assert names(tmp_path / "checkpoints") == ["step-000007.pt"]


def test_a_checkpoint_of_another_format_is_refused_in_words_and_left_alone(tmp_path: Path):
    path = checkpoint.save(tmp_path / "checkpoints", 7, {"key": "a"})
    torch.save({**torch.load(path, weights_only=True), "format": 4}, path)
    with pytest.raises(RunError, match="another version of clip-cid") as error:
        checkpoint.load_newest(tmp_path / "checkpoints", key="a")
    assert f"Delete {tmp_path}" in error.value.fix
    assert names(tmp_path / "checkpoints") == ["step-000007.pt"]


def test_every_part_of_the_state_is_saved_and_loads_what_it_has_saved(tmp_path: Path):
    settings = make_settings(ema_decay=0.9, precision="fp16")
    trainer = make_trainer(tmp_path, tmp_path / "out", steps=4, settings=settings)
    trainer.run()
    state = checkpoint.load_newest(tmp_path / "out" / "checkpoints", key="tiny")
    assert state is not None
    assert state["parts"].keys() == trainer._parts().keys()
    again = make_trainer(tmp_path, tmp_path / "out", steps=4, settings=settings)
    again._resume()
    for name, part in again._parts().items():
        if name != "watch":  # time goes on
            assert equal(part.state_dict(), state["parts"][name]), name


def test_whatever_of_a_training_can_save_itself_is_a_part_of_its_state(tmp_path: Path):
    trainer = make_trainer(tmp_path, tmp_path / "out", steps=4, settings=make_settings(ema_decay=0.9, precision="fp16"))
    trainer._resume()
    parts = trainer._parts()
    owned = {**vars(trainer), **vars(trainer.learner)}
    able = [name for name, value in owned.items() if isinstance(value, Part) and not isinstance(value, nn.Module)]
    assert {"progress", "best", "alarm", "watch", "bad", "records", "scaler", "ema"} <= {*able}
    assert [name for name in able if all(owned[name] is not part for part in parts.values())] == []
    assert {"model", *(f"optimizer {number}" for number in range(len(trainer.learner.optimizers)))} <= parts.keys()


def test_the_time_of_the_attempts_before_counts(tmp_path: Path):
    trainer = make_trainer(tmp_path, tmp_path / "out", steps=4)
    trainer.watch.load_state_dict({"seconds": 1000.0, "waited": 100.0})
    trainer.run()
    again = make_trainer(tmp_path, tmp_path / "out", steps=4)
    assert again.run()["seconds"] > 1000.0
    assert again.watch.waited >= 100.0


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(value, theirs[name]) for name, value in ours.items())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


def test_a_failed_write_leaves_the_checkpoints_before_it(tmp_path: Path):
    checkpoint.save(tmp_path, 1, {"key": "a"})
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        checkpoint.save(tmp_path, 2, {"key": "a", "not plain": lambda: None})
    assert names(tmp_path) == ["step-000001.pt"]


def test_rows_that_another_number_of_ranks_has_left_do_not_spoil_a_head(tmp_path: Path):
    """Two ranks were killed between their rows and their checkpoint; one alone goes on from before it."""
    left = tmp_path / "out" / "checkpoints" / "step-000002.head"
    for rank in range(2):
        write_rows(left, {WEIGHT: torch.zeros(6, 16)}, first=6 * rank, total=12, rank=rank, ranks=2, step=2)
    trainer = make_trainer(tmp_path, tmp_path / "out", steps=2, settings=make_settings(warmup_steps=1))
    trainer.run()
    resumed = make_trainer(tmp_path, tmp_path / "out", steps=2, settings=make_settings(warmup_steps=1))
    resumed.run()
    assert resumed.model.objective.head is not None
    assert trainer.model.objective.head is not None
    assert torch.equal(resumed.model.objective.head.weight, trainer.model.objective.head.weight)
    assert torch.equal(resumed.objective_state()["head.weight"], trainer.model.objective.head.weight)


@pytest.mark.parametrize("present", [0, 1])
def test_a_training_begins_only_with_room_for_its_checkpoints_and_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: int
):
    trainer = make_trainer(tmp_path, tmp_path / "out", steps=3)
    one = room.checkpoint_bytes(trainer.model, trainer.settings)
    if present:
        checkpoints = tmp_path / "out" / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / "older.pt").write_bytes(bytes(one))
    needed = (3 - present) * one + room.student_bytes(trainer.model)

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(RunError, match="are needed for checkpoints and the student, but"):
        trainer.run()
    assert trainer.step == 0

    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert make_trainer(tmp_path, tmp_path / "out", steps=3).run()["steps"] == 3
