import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import make_settings, make_student, make_trainer
from torch import Tensor, nn

from clip_cid.training.ema import EMA
from clip_cid.training.loop import Trainer

STEPS = 10


class Killed(BaseException):
    """Ends a run without giving it a chance to save, as SIGKILL does."""


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def move(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_it_is_the_running_mean_of_a_plain_loop_in_float64(decay: float):
    """Step t keeps min(decay, (1 + t) / (10 + t)) of the EMA."""
    module, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    ema = EMA(module, decay=decay)
    expected = {name: value.double().numpy() for name, value in parameters_of(module).items()}
    for step in range(1, 30):
        move(module, generator)
        ema.update()
        keep = min(decay, (1 + step) / (10 + step))
        for name, value in parameters_of(module).items():
            expected[name] = keep * expected[name] + (1 - keep) * value.double().numpy()
    with ema.in_place():
        for name, value in parameters_of(module).items():
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_weights_come_back_bit_for_bit_even_from_a_block_that_raises():
    module, generator = make_student(), torch.Generator().manual_seed(0)
    ema = EMA(module, decay=0.9)
    move(module, generator)
    ema.update()
    weights, mean = parameters_of(module), copy.deepcopy(ema.state_dict())
    with pytest.raises(ZeroDivisionError), ema.in_place():  # noqa: PT012
        assert not torch.equal(parameters_of(module)["text_projection"], weights["text_projection"])
        raise ZeroDivisionError
    assert all(torch.equal(value, weights[name]) for name, value in parameters_of(module).items())
    torch.testing.assert_close(ema.state_dict(), mean, rtol=0, atol=0)


@pytest.mark.resume
def test_its_state_resumes_where_it_was():
    first, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    ema = EMA(first, decay=0.7)
    for _ in range(3):
        move(first, generator)
        ema.update()
    second = copy.deepcopy(first)
    again = EMA(second, decay=0.7)
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    for module, one in ((first, ema), (second, again)):
        move(module, torch.Generator().manual_seed(5))
        one.update()
    torch.testing.assert_close(again.state_dict(), ema.state_dict(), rtol=0, atol=0)


def test_what_does_not_learn_has_no_ema():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    assert ema_of(module).keys() == {"weight"}


def ema_of(module: nn.Module) -> dict[str, Tensor]:
    state: Any = EMA(module, decay=0.9).state_dict()["mean"]
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ema")


def watched(trainer: Trainer, seen: list[dict[str, Tensor]], *, kill_at: int | None = None) -> Trainer:
    """The trainer, noting the student's weights before each step."""
    train_step = trainer._train_step

    def step(batch: Any) -> Any:
        if trainer.step == kill_at:
            raise Killed
        seen.append({name: value.clone() for name, value in trainer.model.student.state_dict().items()})
        return train_step(batch)

    trainer._train_step = step
    return trainer


@pytest.mark.slow
@pytest.mark.resume
def test_a_run_leaves_the_ema_of_its_weights_whether_it_was_killed_or_not(folder: Path, tmp_path: Path):
    settings, seen = make_settings(ema_decay=0.6), list[dict[str, Tensor]]()
    whole = watched(make_trainer(folder, tmp_path / "whole", settings=settings, steps=STEPS), seen)
    whole.run()
    left = whole.student_state()
    weights = [*seen[1:], whole.model.student.state_dict()]
    for name in ("text_projection", "visual.proj", "logit_scale"):
        expected = seen[0][name].double()
        for step, after in enumerate(weights, start=1):
            keep = min(0.6, (1 + step) / (10 + step))
            expected = keep * expected + (1 - keep) * after[name].double()
        torch.testing.assert_close(left[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(left[name], weights[-1][name])

    killed = make_trainer(folder, tmp_path / "killed", settings=settings, steps=STEPS, minutes=1e-9)
    with pytest.raises(Killed):
        watched(killed, [], kill_at=6).run()
    again = make_trainer(folder, tmp_path / "killed", settings=settings, steps=STEPS)
    again.run()
    resumed = again.student_state()
    assert [name for name, value in left.items() if not torch.equal(value, resumed[name])] == []
