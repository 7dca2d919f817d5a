"""What a device computes is what the CPU computes: the tests that need CUDA; `make device-check` runs them.

With CLIP_CID_TEST_DEVICE=cpu they run without one, to test themselves.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hard_rows
import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from tiny_training import make_settings, make_trainer, power_cut
from torch import Tensor

from clip_cid import balance, os_errors, spherical_kmeans
from clip_cid.errors import RunError
from clip_cid.method.distill.arithmetic import LossPrecision, loss_precision
from clip_cid.method.distill.contrastive import Side, contrastive_loss
from clip_cid.method.distill.fused_cluster_loss import cluster_losses
from clip_cid.method.distill.peer_losses import affinity_loss, siglip_loss
from clip_cid.models.device import resolve_device
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.models.teacher import load_teacher
from clip_cid.recipe import EmbedConfig
from clip_cid.training.ranks.distributed import Ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
STEPS = 8


@pytest.fixture
def device() -> str:
    name = os.environ.get("CLIP_CID_TEST_DEVICE", "cuda")
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(resolve_device(name))  # with TF32 off, as in every command


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


# Stages


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_a_teacher_embeds_as_on_the_cpu(tmp_path: Path, device: str, precision: str, apart: float) -> None:
    export_student(
        build_student("cid-tiny", embed_dim=None, seed=0), tmp_path / "teacher", head_state={}, provenance={}
    )
    captions = ["a red square", "two dogs on a hill", ""]
    found = []
    for name, how in ((device, precision), ("cpu", "fp32")):
        settings = EmbedConfig.model_validate({"teacher": f"local-dir:{tmp_path / 'teacher'}", "precision": how})
        teacher = load_teacher(settings, device=name)
        side = teacher.image_side
        images = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(1))
        found.append([rows.double().cpu() for rows in (teacher.encode_images(images), teacher.encode_texts(captions))])
    for mine, theirs in zip(*found, strict=True):
        assert float((1 - (mine * theirs).sum(dim=1)).max()) < apart


@pytest.mark.parametrize("kind", hard_rows.KINDS)
@pytest.mark.parametrize("threshold", [0.03, 0.3])
def test_the_sets_and_the_kept_rows_of_the_balance_are_those_of_the_cpu(
    device: str, kind: str, threshold: float
) -> None:
    rows = hard_rows.KINDS[kind](1200, 72)
    mine, theirs = (balance(rows, threshold=threshold, device=name, normalize=True) for name in (device, "cpu"))
    assert np.array_equal(mine.set_of, theirs.set_of)
    assert np.array_equal(mine.kept, theirs.kept)
    assert hard_rows.links_of(mine.forest) == hard_rows.links_of(theirs.forest)


@pytest.mark.parametrize("kind", ["power law", "flat", "identical", "float16"])
def test_the_clusters_are_bit_for_bit_those_of_the_cpu(device: str, kind: str) -> None:
    rows = hard_rows.KINDS[kind](3000, 40)
    mine, theirs = (spherical_kmeans(rows, num_centers=37, iterations=4, device=name) for name in (device, "cpu"))
    assert np.array_equal(mine.centers, theirs.centers)
    assert np.array_equal(mine.labels, theirs.labels)
    assert mine.history == theirs.history


# Losses


ERRORS: dict[LossPrecision, float] = {"fp32": 1e-4, "bf16": 0.03}
"""Relative, of a loss and of a gradient; docs/training.md measures those of bf16."""
each_precision = pytest.mark.parametrize("precision", ERRORS)


@each_precision
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_cluster_losses_are_those_of_whole_logits_in_float64(
    device: str, trained: bool, temperature: float, precision: LossPrecision
) -> None:
    teacher, centers = unit_rows(60, 32, 0), unit_rows(700, 32, 1)
    student = F.normalize(teacher + 0.7 * unit_rows(60, 32, 2), dim=1)
    labels = torch.randint(700, (60,), generator=torch.Generator().manual_seed(3))

    given = [rows.float().to(device).requires_grad_(moves) for rows, moves in ((student, True), (centers, trained))]
    with loss_precision(precision):
        found = cluster_losses(
            given[0], given[1], labels.to(device), teacher=teacher.float().to(device), scale=16.0,
            temperature=temperature,
        )  # fmt: skip
    assert found.kl is not None
    mine = found.cls, found.kl
    exact = [rows.clone().requires_grad_(moves) for rows, moves in ((student, True), (centers, trained))]
    theirs = oracles.cluster_losses_dense(exact[0], exact[1], labels, teacher, scale=16.0, temperature=temperature)
    _assert_same_losses(mine, given, theirs, exact, ERRORS[precision])


def _clip(sides: Any, _teacher: Any, scale: Tensor, _bias: Tensor) -> Tensor:
    return contrastive_loss(sides[0], sides[1], scale)


def _siglip(sides: Any, _teacher: Any, scale: Tensor, bias: Tensor) -> Tensor:
    return siglip_loss(sides[0], sides[1], scale, bias)


def _affinity(sides: Any, teacher: Any, scale: Tensor, _bias: Tensor) -> Tensor:
    return affinity_loss(sides[0], sides[1], scale, teacher[0], teacher[1], scale.detach())


@each_precision
@pytest.mark.parametrize("loss_of", [_clip, _siglip, _affinity])
def test_the_losses_of_a_batch_in_blocks_are_those_of_the_cpu_in_float64(
    device: str, loss_of: Callable[..., Tensor], precision: LossPrecision
) -> None:
    rows = [unit_rows(300, 24, seed) for seed in (0, 1)]
    teacher = [F.normalize(one + 0.5 * other, dim=1) for one, other in (rows, rows[::-1])]
    found = []
    for where, kind in ((device, torch.float32), ("cpu", torch.float64)):
        given = [one.to(where, kind).requires_grad_() for one in (*rows, torch.tensor(20.0), torch.tensor(-8.0))]
        sides, taught = [Side.whole(one) for one in given[:2]], [Side.whole(one.to(where, kind)) for one in teacher]
        with loss_precision(precision):
            loss = loss_of(sides, taught, *given[2:])
        found.append(([loss], given))
    (mine, given), (theirs, exact) = found
    _assert_same_losses(mine, given, theirs, exact, ERRORS[precision])


def _assert_same_losses(mine: Any, given: list[Tensor], theirs: Any, exact: list[Tensor], allowed: float) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=allowed)
    for losses, tensors in ((mine, given), (theirs, exact)):
        torch.stack([*losses]).sum().backward()
        assert all(tensor.grad is not None for tensor in tensors if tensor.requires_grad and tensor.ndim)
    for one, other in zip(given, exact, strict=True):
        if one.grad is not None and other.grad is not None:
            error = (one.grad.double().cpu() - other.grad).norm() / other.grad.norm()
            assert float(error) < allowed


# Training


def test_a_training_under_autocast_learns_as_in_float32_on_the_cpu(tmp_path: Path, device: str) -> None:
    losses = {}
    for name, precision in ((device, "bf16"), ("cpu", "fp32")):
        settings = make_settings(precision=precision, log_every=1, sample_rate=1.0, head_lr=0.0)
        out, ranks = tmp_path / precision, Ranks(device=torch.device(name))
        make_trainer(tmp_path, out, settings=settings, steps=STEPS, patch_dropout=0.0, ranks=ranks).run()
        losses[precision] = [line["loss"] for line in _lines(out)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_a_killed_training_goes_on_with_the_same_random_numbers(tmp_path: Path, device: str) -> None:
    """Of the dropped patches and the sampled centers, which the device draws; the process's own are left alone."""
    settings, ranks = make_settings(precision="fp32", log_every=1), Ranks(device=torch.device(device))

    def make(name: str) -> Any:
        return make_trainer(tmp_path, tmp_path / name, settings=settings, steps=STEPS, ranks=ranks)

    before = _random_state(device)
    make("whole").run()
    assert torch.equal(_random_state(device), before)
    with power_cut(STEPS // 2):
        make("cut").run()
    torch.rand(100, device=device)  # another process has other numbers behind it
    make("cut").run()

    whole, cut = (_lines(tmp_path / name) for name in ("whole", "cut"))
    assert [line["step"] for line in cut] == [*range(1, STEPS + 1)]
    for name in ("loss", "loss/cluster_cls", "centers", "negatives"):
        assert [line[name] for line in cut] == pytest.approx([line[name] for line in whole], rel=1e-4)


def _random_state(device: str) -> Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(device)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# Memory


def test_a_lack_of_memory_is_two_lines(tmp_path: Path, device: str) -> None:
    with pytest.raises(RunError, match="memory ran out") as error, os_errors.explained(tmp_path):
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    assert "machine.embed_batch" in error.value.fix
    assert "\n" not in error.value.problem + error.value.fix
    assert float(torch.ones(3, device=device).sum()) == 3  # and the device can still be used
