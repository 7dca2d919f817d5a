"""On a device the losses give their work without waiting: never for a block, and for a step as often as said here."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_waits import HostWaits
from torch import Tensor

from clip_cid.method.distill import center_pass, row_blocks
from clip_cid.method.distill.cluster_distillation import CenterHead, nearest_labels, sample_centers
from clip_cid.method.distill.contrastive import Side, contrastive_loss
from clip_cid.method.distill.fused_cluster_loss import bank_divergence, cluster_losses, soft_centers
from clip_cid.method.distill.peer_losses import affinity_loss, siglip_loss

ROWS, CENTERS, DIM = 12, 40, 8


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU asks where asking is free."""
    monkeypatch.setattr(center_pass, "is_at_hand", lambda tensor: False)


def unit_rows(rows: int, seed: int, dim: int = DIM) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def labels(count: int = 1) -> Tensor:
    first = torch.randint(CENTERS, (ROWS, 1), generator=torch.Generator().manual_seed(9))
    return (first + 3 * torch.arange(count)) % CENTERS


LABELS = {"tolist": 1}  # their limits, once
AGAIN = {"nonzero": 1}  # rows in which too many digits cancel
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "cross entropy": ({"teacher": None}, LABELS),
    "both losses": ({}, LABELS | AGAIN),
    "two softmaxes": ({"temperature": 2.0}, LABELS | AGAIN),
    "soft centers": ({"teacher": "soft"}, LABELS),
    "several labels": ({"labels": 3}, LABELS | AGAIN),
    "centers that move": ({"trained": True}, LABELS),
    "near centers": ({"ignore_near": 0.2}, LABELS | AGAIN | {"_unique2": 1}),
    "a sample": ({"log_inclusion": torch.zeros(CENTERS), "logq": "both"}, LABELS | AGAIN),
}


def step(block_centers: int, trained: bool = False, labels_of_a_row: int = 1, **options: Any) -> list[Tensor]:
    """Losses and gradients of one step."""
    student, centers = unit_rows(ROWS, 1).requires_grad_(), unit_rows(CENTERS, 2).requires_grad_(trained)
    found = cluster_losses(student, centers, labels(labels_of_a_row), scale=9.0, block_centers=block_centers, **options)
    total = found.cls if found.kl is None else found.cls + 2 * found.kl
    return [total.detach(), *torch.autograd.grad(total, [student, centers] if trained else [student])]


def options_of(case: str) -> dict[str, Any]:
    given = {"teacher": unit_rows(ROWS, 3)} | CASES[case][0]
    if "labels" in given:
        given["labels_of_a_row"] = given.pop("labels")
    if given["teacher"] == "soft":
        given["teacher"] = soft_centers(unit_rows(ROWS, 3), unit_rows(CENTERS, 2), scale=9.0)
    return given


@pytest.mark.parametrize("blocks", [1, 4, 20])
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_the_cluster_losses_waits_as_often_whatever_the_blocks(case: str, blocks: int):
    options = options_of(case)
    with HostWaits() as waits:
        step(CENTERS // blocks, **options)
    assert waits.counts == CASES[case][1]


@pytest.mark.parametrize("case", CASES)
def test_a_device_computes_what_the_processor_computes(case: str, monkeypatch: pytest.MonkeyPatch):
    there = step(7, **options_of(case))
    monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(there, step(7, **options_of(case)), strict=True))


def test_a_bank_has_no_labels_to_look_at():
    student = unit_rows(ROWS, 1).requires_grad_()
    with HostWaits() as waits:
        bank_divergence(student, unit_rows(ROWS, 3), unit_rows(CENTERS, 2), scale=9.0).backward()
    assert waits.counts == AGAIN


def test_rows_far_from_their_teacher_are_computed_again_without_asking_for_more():
    student, teacher, centers = unit_rows(ROWS, 1).requires_grad_(), -unit_rows(ROWS, 1), unit_rows(CENTERS, 2)
    with HostWaits() as waits:
        found = cluster_losses(student, centers, labels(), teacher=teacher, scale=60.0, block_centers=5)
        assert found.kl is not None
        found.kl.backward()
    assert waits.counts == LABELS | AGAIN


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_a_head_looks_at_its_labels_once(rate: float, trained: bool):
    head = CenterHead(unit_rows(CENTERS, 2), trainable=trained)
    student, generator = unit_rows(ROWS, 1).requires_grad_(), torch.Generator().manual_seed(0)
    with HostWaits() as waits:
        head(student, head.sample(labels(), rate=rate, generator=generator)).cls.backward()
    assert waits.counts == LABELS


def test_a_sample_of_fewer_centers_than_labels_asks_how_many_are_distinct():
    with HostWaits() as waits:
        sample_centers(labels(), CENTERS, sample_rate=0.1)
    assert waits.counts == LABELS | {"_unique2": 1}


def test_the_labels_of_all_rows_are_found_without_waiting():
    with HostWaits("nothing"):
        nearest_labels(unit_rows(ROWS, 1), unit_rows(CENTERS, 2), labels()[:, 0], 3)


@pytest.mark.parametrize("rows", [1, 4, ROWS])
def test_the_losses_of_a_batch_never_wait(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_blocks, "_suitable_rows", lambda keys: rows)
    student = [unit_rows(ROWS, seed).requires_grad_() for seed in (1, 2)]
    teacher = Side.whole(unit_rows(ROWS, 3)), Side.whole(unit_rows(ROWS, 4))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (9.0, -3.0))
    with HostWaits("nothing"):
        sides = Side.whole(student[0]), Side.whole(student[1])
        losses = [
            contrastive_loss(*sides, scale),
            siglip_loss(*sides, scale, bias),
            affinity_loss(*sides, scale, *teacher, torch.tensor(20.0)),
        ]
        torch.stack(losses).sum().backward()


def test_what_waits_is_counted():
    """The counter itself: one of each kind that it knows."""
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with HostWaits() as waits:
        values.sum().item()
        bool(mask.any())
        mask.nonzero()
        values[mask]
        values[mask] = torch.zeros(2)
        values.masked_select(mask)
        values.unique()
        values.tolist()
        values.numpy()
        values.cpu()
    assert sum(waits.counts.values()) == 10
    with pytest.raises(AssertionError, match="would wait for a device: nonzero"), HostWaits("item"):
        mask.nonzero()
