"""How far the losses are from float64 in the arithmetic of a device, computed on the CPU.

    python benchmarks/loss_precision.py --centers 4000 100000          B = 64, d = 256: all divergences, seconds each
    python benchmarks/loss_precision.py --centers 1000000 --batch 8    minutes, and 6 GB

A student at several distances from its teacher, so that the divergence goes from 1e-6 to 10. Compared with the same losses
in float64 from all logits: the relative error of cross entropy and divergence, and of their gradients in the student (the
length of the difference over the length), in float32 as on the CPU (float64 for each logit), in float32 as on a device, and
with products of rows rounded to bfloat16. The last two are those of CUDA, with sums in another order. Prints a Markdown
table.
"""

from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from clip_cid.method.distill import fused_cluster_loss
from clip_cid.method.distill.arithmetic import Arithmetic
from clip_cid.method.distill.fused_cluster_loss import cluster_losses

ARITHMETICS = {
    "fp32, CPU": Arithmetic(None, torch.float64),
    "fp32, device": Arithmetic(None, torch.float32),
    "bf16": Arithmetic(torch.bfloat16, torch.float32),
}
DIVERGENCES = (1e-6, 1e-4, 1e-2, 1.0, 10.0)


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def exact(student: Tensor, teacher: Tensor, centers: Tensor, labels: Tensor, scale: float) -> list[Tensor]:
    """Cross entropy, divergence and their gradients, in float64, some rows at a time."""
    sums: list[Tensor] | None = None
    gradients: list[list[Tensor]] = [[], []]
    centers = centers.double()
    for rows in torch.arange(len(student)).split(4):
        own = student[rows].double().requires_grad_()
        log_q = (scale * own @ centers.T).log_softmax(dim=1)
        log_p = (scale * teacher[rows].double() @ centers.T).log_softmax(dim=1)
        losses = [-log_q.gather(1, labels[rows, None]).sum(), (log_p.exp() * (log_p - log_q)).sum()]
        for loss, found in zip(losses, gradients, strict=True):
            found.append(torch.autograd.grad(loss, own, retain_graph=True)[0])
        now = [loss.detach() for loss in losses]
        sums = now if sums is None else [one + other for one, other in zip(sums, now, strict=True)]
    assert sums is not None
    return [value / len(student) for value in (*sums, *(torch.cat(found) for found in gradients))]


def at_divergence(wanted: float, teacher: Tensor, centers: Tensor, labels: Tensor, scale: float) -> Tensor:
    """A student whose divergence is near this one."""
    noise = unit_rows(len(teacher), teacher.shape[1], 3)
    few = slice(0, 8)
    low, high = 0.0, 1.0
    for _ in range(30):  # the share of what is not the teacher: noise, and beyond it another center
        middle = (low + high) / 2
        student = _moved(teacher, noise, centers, middle)
        found = exact(student[few], teacher[few], centers[:20_000], labels[few] % min(20_000, len(centers)), scale)[1]
        low, high = (middle, high) if found < wanted else (low, middle)
    return _moved(teacher, noise, centers, high)


def _moved(teacher: Tensor, noise: Tensor, centers: Tensor, share: float) -> Tensor:
    away = F.normalize(noise + 3 * share * centers[: len(noise)].roll(1, 0) - 3 * share * teacher, dim=1)
    return F.normalize((1 - share) * teacher + share * away, dim=1)


def table(count: int, batch: int, dim: int, scale: float) -> Iterator[str]:
    centers = unit_rows(count, dim, 0)
    labels = torch.arange(batch) * (count // batch)
    teacher = F.normalize(centers[labels] + 0.7 * unit_rows(batch, dim, 1), dim=1)
    for wanted in DIVERGENCES:
        student = at_divergence(wanted, teacher, centers, labels, scale)
        right = exact(student, teacher, centers, labels, scale)
        for name, arithmetic in ARITHMETICS.items():
            learns = student.clone().requires_grad_()
            with mock.patch.object(fused_cluster_loss, "arithmetic_of", return_value=arithmetic):
                losses = cluster_losses(learns, centers, labels, teacher=teacher, scale=scale)
            assert losses.kl is not None
            gradients = [torch.autograd.grad(loss, learns, retain_graph=True)[0] for loss in (losses.cls, losses.kl)]
            found = (losses.cls.detach(), losses.kl.detach(), *gradients)
            errors = (float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))
            cells = " | ".join(f"{error:.0e}" for error in errors)
            yield f"| {count:,} | {float(right[1]):.1e} | {name} | {cells} |"


def main(centers: tuple[int, ...] = (4000, 100_000), batch: int = 64, dim: int = 256, scale: float = 16.0) -> None:
    """Measure.

    Args:
        centers: Values of K.
        batch: B.
        dim: Width.
        scale: sigma.
    """
    print(
        "| K | KL | arithmetic | L_cls | L_kl | gradient of L_cls | gradient of L_kl |\n|---|---|---|---|---|---|---|"
    )
    for count in centers:
        for line in table(count, batch, dim, scale):
            print(line, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
