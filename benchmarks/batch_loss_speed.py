"""What the losses of a batch cost: time and peak memory, in blocks of rows against the dense form.

    OMP_NUM_THREADS=1 python benchmarks/batch_loss_speed.py --batch 256 1024 4096        d = 512, seven rounds
    python benchmarks/batch_loss_speed.py --batch 32768 --rounds 1 --no-dense            what does not fit densely
    python benchmarks/batch_loss_speed.py --device cuda --batch 32768 --dim 1280

A forward and a backward pass of CLIP's, SigLIP's and the affinity loss, both directions, with gradients of both sides and
the scale. The dense form is B x B logits by autograd, as in open_clip; the affinity's is in float64. Variants take turns
within a round of one process; CPU seconds (wall clock on a device), the median of the rounds, and the median of the
ratios within a round. Memory is the peak of a process that runs one variant once above what it held when it began
(VmHWM; on CUDA the allocator's own peak); it includes gradients. Prints a Markdown table.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from clip_cid.method.distill.contrastive import Side, contrastive_loss
from clip_cid.method.distill.peer_losses import affinity_loss, siglip_loss

LOSSES = ("clip", "siglip", "affinity")


class Work:
    """Inputs, and one function a variant that does a forward and a backward pass."""

    def __init__(self, batch: int, dim: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        image, text, *noise = F.normalize(torch.randn(4, batch, dim, generator=generator), dim=2).to(device)
        self.teacher = F.normalize(image + 0.5 * text, dim=1), F.normalize(text + 0.5 * image, dim=1)
        self.student = [
            F.normalize(mine + 0.7 * one, dim=1).requires_grad_() for mine, one in zip(self.teacher, noise, strict=True)
        ]
        self.scale = torch.tensor(30.0, device=device, requires_grad=True)
        self.bias = torch.tensor(-10.0, device=device, requires_grad=True)

    def run(self, loss: str, *, dense: bool) -> None:
        for value in (*self.student, self.scale, self.bias):
            value.grad = None
        functions: dict[tuple[str, bool], Callable[[], Tensor]] = {
            ("clip", False): lambda: contrastive_loss(*self._sides(self.student), self.scale),
            ("siglip", False): lambda: siglip_loss(*self._sides(self.student), self.scale, self.bias),
            ("affinity", False): lambda: affinity_loss(
                *self._sides(self.student), self.scale, *self._sides(self.teacher), self.scale.detach()
            ),
            ("clip", True): self._dense_clip,
            ("siglip", True): self._dense_siglip,
            ("affinity", True): self._dense_affinity,
        }
        functions[loss, dense]().backward()

    @staticmethod
    def _sides(rows: Any) -> tuple[Side, Side]:
        image, text = map(Side.whole, rows)
        return image, text

    def _dense_clip(self) -> Tensor:
        image, text = self.student
        own = torch.arange(len(image), device=image.device)
        from_image, from_text = self.scale * image @ text.T, self.scale * text @ image.T
        return (F.cross_entropy(from_image, own) + F.cross_entropy(from_text, own)) / 2

    def _dense_siglip(self) -> Tensor:
        image, text = self.student
        logits = self.scale * image @ text.T + self.bias
        own = torch.eye(len(image), dtype=torch.bool, device=image.device)
        return -F.logsigmoid(torch.where(own, logits, -logits)).sum(dim=1).mean()

    def _dense_affinity(self) -> Tensor:
        total = self.scale.new_zeros((), dtype=torch.float64)
        for way in (1, -1):
            (image, text), (teacher_image, teacher_text) = self.student[::way], self.teacher[::way]
            log_q = (self.scale * image @ text.T).double().log_softmax(dim=1)
            log_p = (self.scale.detach() * teacher_image @ teacher_text.T).double().log_softmax(dim=1)
            total = total + F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") / 2
        return total


def main(
    batch: list[int],
    dim: int = 512,
    rounds: int = 7,
    device: str = "cpu",
    dense: bool = True,
    _alone: tuple[str, bool] | None = None,
) -> None:
    """Measure.

    Args:
        batch: Rows B, one or several.
        dim: Width.
        rounds: Of all variants.
        device: cpu or cuda.
        dense: Whether the dense form is measured, too.
    """
    if _alone is not None:
        print(_peak_of(batch[0], dim, device, *_alone))
        return
    print(f"{torch.get_num_threads()} threads, {device}, d = {dim}\n")
    print(
        "| B | loss | dense, s | blocks, s | blocks / dense | dense, GiB | blocks, GiB |\n|---|---|---|---|---|---|---|"
    )
    for rows in batch:
        work, seconds = Work(rows, dim, device), {}
        for turn in range(rounds + 1):
            for loss in LOSSES:
                for form in (True, False)[not dense :]:
                    took = _timed(work, loss, device, dense=form)
                    if turn > 0 or rounds == 1:  # the first warms up
                        seconds.setdefault((loss, form), []).append(took)
        del work
        for loss in LOSSES:
            print(_row(rows, loss, seconds, dim, device, dense), flush=True)


def _timed(work: Work, loss: str, device: str, *, dense: bool) -> float:
    now = time.process_time if device == "cpu" else time.perf_counter
    began = now()
    work.run(loss, dense=dense)
    if device != "cpu":
        torch.cuda.synchronize()
    return now() - began


def _row(rows: int, loss: str, seconds: dict[tuple[str, bool], list[float]], dim: int, device: str, dense: bool) -> str:
    blocked = seconds[loss, False]
    cells = ["-", f"{statistics.median(blocked):.4f}", "-", "-", f"{_peak(rows, dim, device, loss, False):.2f}"]
    if dense:
        whole = seconds[loss, True]
        cells[0] = f"{statistics.median(whole):.4f}"
        cells[2] = f"{statistics.median(b / w for b, w in zip(blocked, whole, strict=True)):.2f}"
        cells[3] = f"{_peak(rows, dim, device, loss, True):.2f}"
    return f"| {rows:,} | {loss} | " + " | ".join(cells) + " |"


def _peak(rows: int, dim: int, device: str, loss: str, form: bool) -> float:
    """GiB, of a process of its own."""
    options = ["--batch", rows, "--dim", dim, "--device", device, "--_alone", loss, form]
    done = subprocess.run([sys.executable, __file__, *map(str, options)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _peak_of(rows: int, dim: int, device: str, loss: str, dense: bool) -> float:
    Work(64, dim, device).run(loss, dense=dense)  # what the libraries load at first
    work = Work(rows, dim, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.run(loss, dense=dense)
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    before = _of_process("VmRSS")
    work.run(loss, dense=dense)
    return (_of_process("VmHWM") - before) / 2**20


def _of_process(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
