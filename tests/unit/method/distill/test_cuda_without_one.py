"""The way that losses take on CUDA, followed on any machine by tensors that have a type, a shape and a device, and no numbers.

Such a tensor raises where the host asks for a number or meets one of another device. What is computed of a batch of rows on
CUDA is so known operation by operation; the numbers are tested on the CPU in the same arithmetic.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clip_cid.loss_table import LOSSES
from clip_cid.method.distill import cluster_distillation, fused_cluster_loss
from clip_cid.method.distill.arithmetic import loss_precision
from clip_cid.method.distill.cluster_distillation import nearest_labels
from clip_cid.method.distill.contrastive import Side, contrastive_loss, one_way_loss
from clip_cid.method.distill.fused_cluster_loss import cluster_losses, soft_centers
from clip_cid.method.distill.objective import Objective, Targets
from clip_cid.method.distill.peer_losses import affinity_loss, siglip_loss
from clip_cid.training.optimizer import clip_gradients
from clip_cid.training.ranks.distributed import Ranks

ROWS, CENTERS, DIM = 8, 300, 16
CUDA = torch.device("cuda", 0)


class _Made(TorchDispatchMode):
    """What was multiplied, and the largest tensor of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[tuple[torch.dtype, torch.dtype]] = set()
        self.largest_float64 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor) and func is not torch.ops.aten.lift_fresh.default:  # a number of the host
                assert one.device == CUDA, f"{func} made a tensor on {one.device}"
                if one.dtype == torch.float64:
                    self.largest_float64 = max(self.largest_float64, one.numel())
        if func.overloadpacket is torch.ops.aten.mm and isinstance(made, Tensor):
            self.products.add((args[0].dtype, made.dtype))
        return made


def rows(count: int = ROWS, *, learns: bool = False) -> Tensor:
    return torch.empty(count, DIM, device=CUDA, requires_grad=learns)


def side(*, learns: bool = False) -> Side:
    return Side.whole(rows(learns=learns))


def number() -> Tensor:
    return torch.empty((), device=CUDA)


def cluster(**options: Any) -> Callable[[], Any]:
    """Of labels that were looked at. Against teacher rows the gradient asks once for rows to compute again."""
    learns = "teacher" not in options or options["teacher"] == "soft"

    def run() -> None:
        given, labels = dict(options), torch.empty(ROWS, 2, dtype=torch.long, device=CUDA)
        teacher = given.pop("teacher", None)
        if teacher is not None:
            teacher = rows() if teacher == "rows" else soft_centers(rows(), rows(CENTERS), scale=9.0)
        log_inclusion = torch.empty(CENTERS, device=CUDA) if given.pop("sampled", False) else None
        cluster_losses(
            rows(learns=learns),
            rows(CENTERS),
            labels,
            teacher=teacher,
            scale=9.0,
            log_inclusion=log_inclusion,
            labels_are_checked=True,
            **given,
        )

    return run


def moving_centers() -> Any:
    """Of the losses against teacher rows, the node of their gradient."""
    labels = torch.zeros(ROWS, 2, dtype=torch.long, device=CUDA)
    found = cluster_losses(
        rows(learns=True),
        rows(CENTERS, learns=True),
        labels,
        teacher=rows(),
        scale=9.0,
        labels_are_checked=True,
    )
    return found.cls.grad_fn


def backward(node: Any) -> None:
    """By hand: autograd itself looks for the device."""
    with torch.no_grad():
        gradients = node.apply(number(), number(), None) if "Fused" in node.name() else node.apply(number())
    assert any(gradient is not None for gradient in gradients)


ROUNDED, WHOLE = {(torch.bfloat16, torch.float32)}, {(torch.float32, torch.float32)}
WAYS: dict[str, tuple[Callable[[], Any], set[tuple[torch.dtype, torch.dtype]]]] = {
    "cross entropy": (cluster(), ROUNDED),
    "both losses": (cluster(teacher="rows"), ROUNDED),
    "two softmaxes": (cluster(teacher="rows", temperature=2.0), ROUNDED),
    "a sample": (cluster(teacher="rows", sampled=True, logq="both"), ROUNDED),
    "soft centers": (cluster(teacher="soft"), WHOLE),
    "contrastive": (
        lambda: contrastive_loss(side(learns=True), side(learns=True), number()),
        ROUNDED,
    ),
    "siglip": (
        lambda: siglip_loss(side(learns=True), side(), number(), number()),
        ROUNDED,
    ),
    "affinity": (
        lambda: affinity_loss(side(learns=True), side(), number(), side(), side(), number()),
        WHOLE,
    ),
    "a sample is drawn": (
        lambda: cluster_distillation._with_negatives(
            torch.empty(ROWS, dtype=torch.long, device=CUDA), CENTERS, 30, None
        ),
        set(),
    ),
    "centers that move": (lambda: backward(moving_centers()), ROUNDED),
    "contrastive, backwards": (
        lambda: backward(one_way_loss(side(learns=True), side(learns=True), number()).grad_fn),
        ROUNDED,
    ),
    "nearest labels": (
        lambda: nearest_labels(rows(), rows(CENTERS), torch.empty(ROWS, dtype=torch.long, device=CUDA), 3),
        WHOLE,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_asked_for_left_on_the_host_or_wide_of_a_logit(way: str):
    run, products = WAYS[way]
    with FakeTensorMode(), _Made() as made, loss_precision("auto", "torch"):
        run()
    assert made.products == products
    assert made.largest_float64 <= max(ROWS * DIM, CENTERS if "drawn" in way else 0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"train_head": True, "temperature": 2.0}, {"sample_rate": 0.2, "logq": "both"}, {"share_scale": True}],
    ids=str,
)
def test_every_loss_of_the_table_stays_on_its_device(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """What a step asks for once (the labels' limits, rows to compute again) is given here."""
    for module in (cluster_distillation, fused_cluster_loss):
        monkeypatch.setattr(module, "facts_of_labels", lambda labels: (0, CENTERS - 1, False))
    monkeypatch.setattr(cluster_distillation, "_unit_centers", lambda centers: centers)
    monkeypatch.setattr(Tensor, "nonzero", lambda mask: torch.empty(2, 1, dtype=torch.long, device=mask.device))
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight: weight)

    names = [loss.name for loss in LOSSES]
    with FakeTensorMode(), torch.device(CUDA):
        objective = Objective(
            losses=names, student_dim=12, teacher_dim=DIM, alignment="linear", centers=rows(CENTERS),
            text_centers=rows(CENTERS), **settings,
        )  # fmt: skip
        objective.kernels = "torch"
        outputs = {name: torch.empty(ROWS, 12, requires_grad=True) for name in ("image", "text")}
        outputs |= {name: torch.empty((), requires_grad=True) for name in ("logit_scale", "logit_bias")}
        labels = [torch.empty(ROWS, dtype=torch.long) for _ in range(2)]
        stored = Targets(rows(), rows(), labels[0], bank_images=rows(), bank_texts=rows(), text_labels=labels[1])
    with FakeTensorMode(allow_non_fake_inputs=True), _Made():
        found = objective(outputs | objective.read(outputs["image"], outputs["text"]), stored)
    assert found.keys() == set(names)
    assert all(loss.device == CUDA for loss in found.values())


def test_gradients_are_clipped_without_a_number_from_the_host():
    with FakeTensorMode(), _Made():
        parameter = torch.nn.Parameter(rows())
        parameter.grad = rows()
        norm = clip_gradients([(parameter, False)], 1.0, Ranks(device=CUDA))
    assert norm.device == CUDA
