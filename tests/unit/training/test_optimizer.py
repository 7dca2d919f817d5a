import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from clip_cid.errors import ConfigError
from clip_cid.recipe import DistillConfig
from clip_cid.training.optimizer import (
    RowAdam,
    clip_gradients,
    learning_rate_share,
    make_optimizers,
    parameter_groups,
    set_learning_rate,
)
from clip_cid.training.ranks.distributed import ALONE


class Head(nn.Module):
    def __init__(self, *, trainable: bool, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.ones(4, 8), requires_grad=trainable)


class Beside(nn.Module):
    """Stands in for the objective: a map, a scale and a head."""

    def __init__(self, *, train_head: bool, sparse: bool = False) -> None:
        super().__init__()
        self.image_map = nn.Linear(8, 8)
        self.instance_logit_scale = nn.Parameter(torch.tensor(2.0))
        self.head = Head(trainable=train_head, sparse=sparse)


def student() -> nn.Module:
    vision = CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=1, head_width=16)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    return CLIP(8, vision, text)


def names_of(module: nn.Module, parameters: object) -> set[str]:
    assert isinstance(parameters, list)
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in module.named_parameters() if id(parameter) in wanted}


def test_the_learning_rate_by_hand():
    shares = [learning_rate_share(step, warmup_steps=4, steps=12) for step in range(12)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[8] == pytest.approx(0.5)  # half of the 8 steps of the cosine
    assert shares[10] == pytest.approx(0.5 * (1 - math.sqrt(0.5)))  # three quarters of it
    assert shares[11] == pytest.approx(0.0380602)


@given(st.integers(1, 500), st.data())
def test_the_learning_rate_rises_then_falls_and_never_leaves_its_limits(steps: int, data: st.DataObject):
    warmup = data.draw(st.integers(0, steps - 1))
    shares = [learning_rate_share(step, warmup_steps=warmup, steps=steps) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    assert shares[:warmup] == sorted(shares[:warmup])
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert shares[warmup] == 1.0


@pytest.mark.parametrize(("step", "warmup", "named"), [(-1, 0, "step"), (10, 0, "step"), (0, 10, "warmup_steps")])
def test_a_step_outside_the_run_is_refused(step: int, warmup: int, named: str):
    with pytest.raises(ValueError, match=f"^{named}: must be in"):
        learning_rate_share(step, warmup_steps=warmup, steps=10)


def test_a_warm_up_as_long_as_the_run_is_a_wrong_setting():
    with pytest.raises(ConfigError, match="warmup_steps: 2,000, but the whole run has 2,000 steps") as error:
        make_optimizers(student(), Beside(train_head=False), DistillConfig(warmup_steps=2000), steps=2000)
    assert "Set distill.warmup_steps to 200" in str(error.value)


def test_positions_and_vectors_do_not_decay_and_matrices_do():
    model, beside = student(), Beside(train_head=False)
    decay, plain = parameter_groups(model, beside, DistillConfig(weight_decay=0.2))
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert names_of(beside, decay["params"]) == {"image_map.weight"}
    assert names_of(beside, plain["params"]) == {"image_map.bias", "instance_logit_scale"}
    spared = names_of(model, plain["params"])
    assert {"positional_embedding", "visual.positional_embedding", "logit_scale", "ln_final.weight"} <= spared
    assert names_of(model, decay["params"]) >= {"token_embedding.weight", "text_projection", "visual.conv1.weight"}
    assert spared | names_of(model, decay["params"]) == {name for name, _ in model.named_parameters()}


def test_the_head_learns_at_its_own_rate_when_it_learns_at_all():
    settings = DistillConfig(lr=1e-3, head_lr=1e-6, warmup_steps=0)
    optimizers = make_optimizers(student(), Beside(train_head=True), settings, steps=10)
    set_learning_rate(optimizers, 0.5)
    rates = {group["name"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == pytest.approx({"decay": 5e-4, "no decay": 5e-4, "head": 5e-7})
    (frozen,) = make_optimizers(student(), Beside(train_head=False), settings, steps=10)
    assert [group["name"] for group in frozen.param_groups] == ["decay", "no decay"]


def test_a_head_of_which_steps_see_a_sample_has_an_optimizer_that_reads_no_other_rows():
    settings = DistillConfig(lr=1e-3, head_lr=1e-6, warmup_steps=0)
    dense, by_row = make_optimizers(student(), Beside(train_head=True, sparse=True), settings, steps=10)
    assert isinstance(by_row, RowAdam)
    assert [group["name"] for group in dense.param_groups] == ["decay", "no decay"]
    set_learning_rate([dense, by_row], 0.5)
    assert [group["lr"] for group in by_row.param_groups] == pytest.approx([5e-7])
    assert by_row.param_groups[0]["betas"] == (0.9, 0.98)


def test_gradients_are_shortened_together_dense_and_sparse():
    dense, table = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(5, 1))
    dense.grad = torch.tensor([3.0, 0.0])
    rows, values = torch.tensor([[4, 1, 4]]), torch.tensor([[1.0], [0.0], [3.0]])  # row 4 twice: 4 together
    table.grad = torch.sparse_coo_tensor(rows, values, (5, 1), check_invariants=True)
    assert float(clip_gradients([(dense, False), (table, False)], 10.0, ALONE)) == pytest.approx(5)
    assert dense.grad.tolist() == [3, 0]
    clip_gradients([(dense, False), (table, False)], 1.0, ALONE)
    assert dense.grad.tolist() == pytest.approx([0.6, 0])
    assert table.grad.to_dense()[:, 0].tolist() == pytest.approx([0, 0, 0, 0, 0.8])
