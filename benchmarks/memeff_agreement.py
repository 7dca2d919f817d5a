"""CLIP's loss beside memeff's: the same numbers, and on a CUDA device its time and memory.

    pip install memeff
    python benchmarks/memeff_agreement.py                                  by Triton's interpreter, tiny
    python benchmarks/memeff_agreement.py --device cuda --batch 32768 --dim 512 --rounds 7

memeff's kernels need CUDA. Without it Triton's interpreter runs them; memeff's two checks for a device are then put
aside here, and times say nothing, so none are told. Errors are the largest difference to float64 from all logits, by the
largest value. memeff's scale is a number, and ours learns, so no gradient of the scale is compared.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from clip_cid.method.distill.contrastive import Side, contrastive_loss

Loss = Callable[[Tensor, Tensor], Tensor]
_NOISE = 2.0  # of the texts: matched pairs are near, and far from certain


def main(device: str = "cpu", batch: int = 200, dim: int = 64, scale: float = 14.3, rounds: int = 0) -> None:
    """Compare.

    Args:
        device: cpu or cuda.
        batch: Rows B.
        dim: Width; of widths below 64 memeff takes powers of two only.
        scale: Of the logits.
        rounds: On CUDA, of both in turns.
    """
    image, text = _rows(batch, dim, device)
    losses: dict[str, Loss] = {"clip-cid": _ours(scale), "memeff": _memeff(scale, device)}
    expected = _with_gradients(_dense(scale), image.double(), text.double())

    print("| loss | error of the loss | of the images' gradient | of the texts' gradient |\n|---|---|---|---|")
    for name, loss in losses.items():
        found = _with_gradients(loss, image, text)
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")

    if device == "cuda" and rounds:
        _time(losses, image, text, rounds)


def _rows(batch: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    image, noise = F.normalize(torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0)), dim=2)
    return image.to(device), F.normalize(image + _NOISE * noise, dim=1).to(device)


def _with_gradients(loss: Loss, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, texts = image.clone().requires_grad_(), text.clone().requires_grad_()
    value = loss(images, texts)
    value.backward()
    assert images.grad is not None
    assert texts.grad is not None
    return value.detach().double(), images.grad.double(), texts.grad.double()


def _ours(scale: float) -> Loss:
    return lambda image, text: contrastive_loss(Side.whole(image), Side.whole(text), torch.tensor(scale).to(image))


def _dense(scale: float) -> Loss:
    def loss(image: Tensor, text: Tensor) -> Tensor:
        logits, own = scale * image @ text.T, torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return loss


def _memeff(scale: float, device: str) -> Loss:
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import memeff  # pyright: ignore[reportMissingImports]
        from memeff import clip_loss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"{error}; pip install memeff") from error
    if device == "cpu":
        clip_loss._validate_features = lambda *_: None
        torch.cuda.get_device_capability = lambda *_: (8, 0)
        clip_loss._FORCE_FA = False
    return memeff.MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)


def _time(losses: dict[str, Loss], image: Tensor, text: Tensor, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    peaks: dict[str, Any] = {}
    for turn in range(rounds + 1):
        for name, loss in losses.items():
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            held, began = torch.cuda.memory_allocated(), time.perf_counter()
            _with_gradients(loss, image, text)
            torch.cuda.synchronize()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
            peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**30
    print("\n| loss | s | GiB |\n|---|---|---|")
    for name in losses:
        print(f"| {name} | {statistics.median(seconds[name]):.4f} | {peaks[name]:.2f} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
