import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_training import make_settings, make_trainer

from clip_cid.errors import ConfigError, MissingExtraError
from clip_cid.training.loop import Trainer
from clip_cid.training.records import Records, make_listeners

HEARD: list[dict[str, Any]] = []


class Killed(BaseException):
    """Ends a run without giving it a chance to save, as SIGKILL does."""


@pytest.fixture(autouse=True)
def listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own."""
    module = types.ModuleType("users_own")
    HEARD.clear()
    module.__dict__.update(hear=HEARD.append, name="no function", tools=types.SimpleNamespace(hear=HEARD.append))
    monkeypatch.setitem(sys.modules, "users_own", module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_before(trainer: Trainer, step: int) -> None:
    train_step = trainer._train_step

    def acting(batch: Any) -> Any:
        if trainer.step == step:
            raise Killed
        return train_step(batch)

    trainer._train_step = acting
    with pytest.raises(Killed):
        trainer.run()


@pytest.mark.resume
def test_a_function_hears_every_line_once_after_it_is_written(folder: Path, tmp_path: Path):
    settings = make_settings(log_every=2)
    kill_before(
        make_trainer(folder, tmp_path, settings=settings, steps=8, minutes=1e-9, callbacks=("users_own:hear",)), 5
    )
    assert [line["step"] for line in HEARD] == [2, 4]
    make_trainer(folder, tmp_path, settings=settings, steps=8, callbacks=("users_own:tools.hear",)).run()
    assert [line["step"] for line in HEARD] == [2, 4, 6, 8]
    assert lines_of(tmp_path / "metrics.jsonl") == HEARD


def test_a_listener_that_fails_does_so_with_its_line_already_on_file(tmp_path: Path):
    def fail(line: dict[str, Any]) -> None:
        raise ZeroDivisionError

    records = Records(tmp_path / "metrics.jsonl", [fail])
    with pytest.raises(ZeroDivisionError):
        records.append({"step": 1})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere:hear", "'nowhere:hear' cannot be imported"),
        ("users_own:deaf", "'users_own:deaf' cannot be imported"),
        ("users_own", "'users_own' cannot be imported"),
        (":hear", "':hear' cannot be imported"),
        ("users_own:name", "'users_own:name' is not a function"),
    ],
)
def test_a_name_that_leads_to_no_function_is_told_before_the_first_step(folder: Path, tmp_path: Path, name: str, says):
    trainer = make_trainer(folder, tmp_path, callbacks=(name,))
    with pytest.raises(ConfigError, match=says):
        trainer.run()
    assert trainer.step == 0


class FakeWriter:
    """What is used of TensorBoard's."""

    made: list["FakeWriter"] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = 0
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    module = types.ModuleType("torch.utils.tensorboard.writer")
    module.__dict__["SummaryWriter"] = FakeWriter
    package = types.ModuleType("torch.utils.tensorboard")
    package.__dict__["writer"] = module
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)
    FakeWriter.made.clear()
    return FakeWriter.made


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_tensorboard_gets_every_number_under_its_step(
    folder: Path, tmp_path: Path, tensorboard: list[FakeWriter], setting: str
):
    make_trainer(folder, tmp_path, settings=make_settings(log_every=4), steps=8, tensorboard=setting).run()
    (writer,) = tensorboard
    assert writer.folder == str(tmp_path / "tensorboard")
    expected = [
        (name, value, line["step"])
        for line in lines_of(tmp_path / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    ]
    assert writer.scalars == expected
    assert writer.flushed == len(expected)


@pytest.mark.resume
def test_tensorboard_keeps_the_line_of_the_checkpoint_and_forgets_what_is_done_again(
    folder: Path, tmp_path: Path, tensorboard: list[FakeWriter]
):
    """Its writer hides events of `purge_step` and later ones."""
    settings = make_settings(log_every=1)
    kill_before(make_trainer(folder, tmp_path, settings=settings, steps=8, minutes=1e-9, tensorboard="on"), 3)
    kill_before(make_trainer(folder, tmp_path, settings=settings, steps=8, tensorboard="on"), 5)
    make_trainer(folder, tmp_path, settings=settings, steps=8, tensorboard="on").run()
    shown: list[int] = []
    for writer in tensorboard:
        shown = [step for step in shown if step < writer.purge_step]
        shown += [step for name, _, step in writer.scalars if name == "loss"]
    assert shown == list(range(1, 9))


def test_tensorboard_off_writes_nothing_even_where_it_is_installed(tmp_path: Path, tensorboard: list[FakeWriter]):
    assert make_listeners((), "off", tmp_path / "tensorboard", step=0) == []
    assert not tensorboard


def test_without_the_package_auto_is_silent_and_on_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    assert make_listeners((), "auto", tmp_path, step=0) == []
    assert not caplog.records
    with pytest.raises(MissingExtraError, match=r"machine\.tensorboard: on needs an optional part") as error:
        make_listeners((), "on", tmp_path, step=0)
    assert error.value.fix == 'pip install "clip-cid[tensorboard]"'
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert "tensorboard" in project["optional-dependencies"]
