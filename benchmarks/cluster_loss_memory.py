"""Memory of a process that computes cluster losses over batches and samples of another size at every step.

    OMP_NUM_THREADS=1 python benchmarks/cluster_loss_memory.py

Forward and backward of both losses, K = 1,500, d = 128, 60 to 249 rows, a twentieth to a quarter of the centers. `heap` is what the C library
has handed out (mallinfo2), `RSS` all of the process. With PYTHONPATH=CHECKOUT/src another revision is measured.
"""

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from clip_cid.method.distill.cluster_distillation import CenterHead

_CENTERS, _DIM = 1500, 128


class _Heap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def heap() -> float:
    """MiB in use."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Heap
    found = ask()
    return (found.uordblks + found.hblkhd) / 2**20


def resident() -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def step(head: CenterHead) -> None:
    labels = torch.randint(_CENTERS, (int(torch.randint(60, 250, ())),))
    student = F.normalize(torch.randn(len(labels), _DIM), dim=1).requires_grad_()
    teacher = F.normalize(student.detach() + 0.05 * torch.randn(len(labels), _DIM), dim=1)
    losses = head(student, head.sample(labels, rate=0.05 + 0.2 * float(torch.rand(()))), teacher=teacher)
    (losses.cls + losses.kl).backward()


def main(steps: int = 1500, seed: int = 0) -> None:
    """Print both after a few steps, and at the end."""
    torch.manual_seed(seed)
    head = CenterHead(F.normalize(torch.randn(_CENTERS, _DIM), dim=1))
    print("| steps | heap, MiB | RSS, MiB |\n|---|---|---|")
    for done in range(1, steps + 1):
        step(head)
        if done in (1, 10, 100, 300, 1000, steps):
            print(f"| {done:,} | {heap():.0f} | {resident():.0f} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
