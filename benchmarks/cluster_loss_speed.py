"""What the cluster losses cost: time and peak memory of a forward and a backward pass, against the dense form and others.

    python benchmarks/cluster_loss_speed.py --centers 10000 100000              B = 1024, d = 512, three rounds
    python benchmarks/cluster_loss_speed.py --centers 1000000 --rounds 1        only what fits in memory
    python benchmarks/cluster_loss_speed.py --device cuda --batch 4096 --dim 1280 --centers 1000000 --dense no

Prints Markdown tables and writes them to --out as JSON. Variants take turns within a round of one process; seconds are wall
clock, the median of the rounds, and the ratio is the median of the ratios within a round. Memory is the peak of a process that
runs one variant once, above what it held when it began (VmHWM, reset through /proc/self/clear_refs; on CUDA the
allocator's own peak); it includes gradients. Random unit rows; a student at a cosine of about 0.8 to its teacher.

Both losses:
- dense: log-softmaxes of B x K logits of student and teacher by autograd, as the textbook has it; frozen centers.
- dense, trained: the same with a gradient for the centers.
- fused: clip_cid.fused_cluster_loss; frozen centers, one pass.
- fused, torch's product: the same with PyTorch's own float32 product instead of oneDNN's.
- fused, trained: the same with a gradient for the centers, two passes.
- fused, temperature 4: frozen centers; the two losses then read two softmaxes.
- soft centers: mu and H of the teacher were computed before; frozen centers.
- sampled 0.1, fused: a tenth of the centers through CenterHead, with a gradient for these rows alone.
- sampled 0.1, as PartialFC: weight[index] as in insightface's PartialFC_V2, dense losses and a K x D gradient.

Cross entropy alone:
- dense CE; fused CE; torch's linear_cross_entropy with its own choice of chunks, and with chunks of 256 rows.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from clip_cid.method.distill.cluster_distillation import CenterHead
from clip_cid.method.distill.fused_cluster_loss import cluster_losses, fused_cluster_loss, soft_centers
from clip_cid.method.unit_rows import keep_freed_memory

SCALE = 16.0
DENSE = ("dense", "dense, trained", "dense CE")


class Work:
    """Inputs, and one function a variant that does a forward and a backward pass."""

    def __init__(self, batch: int, centers: int, dim: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centers = F.normalize(torch.randn(centers, dim, generator=generator), dim=1).to(device)
        self.labels = torch.randint(centers, (batch,), generator=generator).to(device)
        noise = F.normalize(torch.randn(2, batch, dim, generator=generator), dim=2).to(device)
        self.teacher = F.normalize(self.centers[self.labels] + 0.7 * noise[0], dim=1)
        self.student = F.normalize(self.teacher + 0.7 * noise[1], dim=1).requires_grad_()
        self._soft: Any = None
        self._step = 0

    def run(self, name: str) -> None:
        self.student.grad = None
        self._variants()[name]()

    def _variants(self) -> dict[str, Callable[[], None]]:
        return {
            "dense": lambda: self._dense(self.centers),
            "dense, trained": lambda: self._dense(self._trained()),
            "fused": lambda: self._fused(self.centers),
            "fused, torch's product": self._without_onednn,
            "fused, trained": lambda: self._fused(self._trained()),
            "fused, temperature 4": lambda: self._fused(self.centers, temperature=4.0),
            "soft centers": self._by_soft_centers,
            "sampled 0.1, fused": lambda: self._sampled(fused=True),
            "sampled 0.1, as PartialFC": lambda: self._sampled(fused=False),
            "dense CE": lambda: self._back(F.cross_entropy(SCALE * self.student @ self.centers.T, self.labels)),
            "fused CE": lambda: self._back(self._losses(None).cls),
            "torch linear_cross_entropy": lambda: self._torch(None),
            "torch linear_cross_entropy, 256 rows": lambda: self._torch(256),
        }

    def prepare(self, name: str) -> None:
        """What is computed once, long before a step."""
        if name == "soft centers" and self._soft is None:
            self._soft = soft_centers(self.teacher, self.centers, scale=SCALE)

    def _trained(self) -> Tensor:
        return self.centers.detach().requires_grad_()

    def _dense(self, centers: Tensor) -> None:
        logits = SCALE * self.student @ centers.T
        with torch.no_grad():
            target = SCALE * self.teacher @ centers.T
        kl = F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
        self._back(F.cross_entropy(logits, self.labels) + kl)

    def _fused(self, centers: Tensor, temperature: float = 1.0) -> None:
        losses = fused_cluster_loss(
            self.student, self.teacher, centers, self.labels, scale=SCALE, temperature=temperature
        )
        self._back(losses[0] + losses[1])

    def _without_onednn(self) -> None:
        with mock.patch.object(torch.backends.mkldnn, "is_available", return_value=False):
            self._fused(self.centers)

    def _losses(self, teacher: Any) -> Any:
        return cluster_losses(self.student, self.centers, self.labels, teacher=teacher, scale=SCALE)

    def _by_soft_centers(self) -> None:
        found = self._losses(self._soft)
        self._back(found.cls + found.kl)

    def _sampled(self, *, fused: bool) -> None:
        self._step += 1
        head = CenterHead.__new__(CenterHead)  # without a second copy of the centers
        torch.nn.Module.__init__(head)
        head.scale, head.sparse, head.shard, head.weight = SCALE, True, None, torch.nn.Parameter(self.centers)
        generator = torch.Generator().manual_seed(self._step)
        sample = head.sample(self.labels, rate=0.1, generator=generator)
        if fused:
            found = head(self.student, sample, teacher=self.teacher)
            self._back(found.cls + found.kl)
            return
        rows = F.normalize(head.weight[sample.index], dim=1)
        logits = SCALE * self.student @ rows.T
        with torch.no_grad():
            target = SCALE * self.teacher @ rows.T
        kl = F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
        self._back(F.cross_entropy(logits, sample.labels) + kl)

    def _torch(self, rows: int | None) -> None:
        from torch.nn import LinearCrossEntropyOptions  # not in every version

        options = LinearCrossEntropyOptions() if rows is None else LinearCrossEntropyOptions(batch_chunk_size=rows)
        loss = F.linear_cross_entropy(SCALE * self.student, self.centers, self.labels, options=options)
        self._back(loss)

    @staticmethod
    def _back(loss: Tensor) -> None:
        loss.backward()


def names(work: Work, *, dense: bool) -> list[str]:
    native = ["torch linear_cross_entropy", "torch linear_cross_entropy, 256 rows"]
    found = [name for name in work._variants() if dense or name not in DENSE]
    return [name for name in found if hasattr(F, "linear_cross_entropy") or name not in native]


def timed(work: Work, which: list[str], rounds: int, device: str) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in which}
    for round_ in range(rounds + (rounds > 1)):  # with several rounds the first one warms up
        for name in which:
            work.prepare(name)
            _wait(device)
            start = time.perf_counter()
            work.run(name)
            _wait(device)
            if round_ or rounds == 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(name: str, arguments: list[str]) -> float | None:
    """MiB, of a process of its own; None where it was killed for want of memory."""
    found = subprocess.run(
        [sys.executable, __file__, "--one", name, *arguments], capture_output=True, text=True, check=False
    )
    return float(found.stdout.strip().splitlines()[-1]) if found.returncode == 0 else None


def measure_one(work: Work, name: str, device: str) -> float:
    work.prepare(name)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.run(name)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work.run(name)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def table(seconds: dict[str, list[float]], memory: dict[str, float | None]) -> str:
    lines = ["| variant | seconds | ratio to dense | memory, MiB | ratio |", "|---|---|---|---|---|"]
    for name, times in seconds.items():
        whole = "dense CE" if "CE" in name or "linear" in name else "dense"
        ratio = "-"
        if whole in seconds:
            ratio = f"{statistics.median(a / b for a, b in zip(times, seconds[whole], strict=True)):.2f}"
        mine, reference = memory[name], memory.get(whole)
        share = f"{mine / reference:.3f}" if mine is not None and reference else "-"
        shown = "did not fit" if mine is None else f"{mine:,.0f}"
        lines.append(f"| {name} | {statistics.median(times):.3f} | {ratio} | {shown} | {share} |")
    return "\n".join(lines)


def main(
    centers: tuple[int, ...] = (10_000, 100_000),
    batch: int = 1024,
    dim: int = 512,
    rounds: int = 3,
    threads: int = 2,
    device: Literal["cpu", "cuda"] = "cpu",
    dense: Literal["yes", "no"] = "yes",
    variants: tuple[str, ...] = (),
    out: Path = Path("runs/cluster-loss-speed.json"),
    one: str | None = None,
) -> None:
    """Measure.

    Args:
        centers: Values of K.
        batch: B.
        dim: D.
        rounds: Rounds that count.
        threads: CPU threads.
        device: Where.
        dense: Whether the dense form fits into memory.
        variants: Only these; all when absent.
        out: JSON of all numbers.
        one: Only the peak memory of this variant; for the script itself.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    if one is not None:
        print(measure_one(Work(batch, centers[0], dim, device), one, device))
        return
    results: dict[int, Any] = {}
    for count in centers:
        work = Work(batch, count, dim, device)
        which = [name for name in names(work, dense=dense == "yes") if not variants or name in variants]
        seconds = timed(work, which, rounds, device)
        del work
        same = ["--batch", batch, "--dim", dim, "--threads", threads, "--device", device, "--centers", count]
        memory = {name: peak_memory(name, [str(value) for value in same]) for name in which}
        results[count] = {"seconds": seconds, "memory_mib": memory}
        print(f"\nK = {count:,}, B = {batch:,}, d = {dim}, {threads} threads, {device}\n\n{table(seconds, memory)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
