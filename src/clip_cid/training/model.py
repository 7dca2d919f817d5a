"""Everything that learns, in one module, and the exact gradient of a batch that does not fit it at once."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from clip_cid.method.distill.objective import LARGEST_SCALE, Objective
from clip_cid.method.products import at_least_float32
from clip_cid.training.batches import Batch

Seen = dict[str, Tensor]
"""What the losses see of a batch: rows (with two axes) and learned numbers (with none), by name."""


class Distillation(nn.Module):
    """Everything that learns, in one module: the student and what the objective adds to it.

    Its outputs are all that the losses need, the learned scales included. So the gradient of everything in it but the
    cluster head is that of its outputs, whoever has computed that, from however many pieces.
    """

    def __init__(self, student: nn.Module, objective: Objective, *, lock: str = "none") -> None:
        super().__init__()
        self.student: Any = student  # open_clip's models share an interface, but no base class that declares it
        self.objective = objective
        self._locked = _tower(student, lock)
        for part in self._locked:
            part.requires_grad_(False)

    def forward(
        self,
        images: Float[Tensor, "rows channels height width"] | None,
        texts: Int[Tensor, "rows context"] | None,
        *,
        precision: torch.dtype,
    ) -> Seen:
        """See `Objective.forward`; without images or without texts, what is left."""
        device = next(self.student.parameters()).device.type
        seen: Seen = {}
        with torch.autocast(device, dtype=precision, enabled=precision != torch.float32):
            if images is not None:
                seen["image"] = self.student.encode_image(images)
            if texts is not None:
                seen["text"] = self.student.encode_text(texts)
        seen = {name: F.normalize(at_least_float32(rows), dim=-1) for name, rows in seen.items()}
        seen["logit_scale"] = self.student.logit_scale.exp().sum()  # of shape () or (1,)
        if (bias := getattr(self.student, "logit_bias", None)) is not None:
            seen["logit_bias"] = bias.sum()
        return seen | self.objective.read(seen.get("image"), seen.get("text"))

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        for part in self._locked:
            part.train(False)
        return self

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep the student's factor between 1 and 100, as CLIP does; the objective looks after its own."""
        self.student.logit_scale.clamp_(0, math.log(LARGEST_SCALE))
        self.objective.clamp_scale()


def backward_in_pieces(
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[Seen], Tensor],
    *,
    micro_batch: int | None,
    precision: torch.dtype,
    seed: int,
) -> None:
    """Leave the gradient of a loss over the whole batch, with `micro_batch` pairs in the student at once.

    The loss sees the outputs of all pairs, whatever the pieces, so every term of it is exact; what it asks of each
    output is then led back piece by piece (the two passes of GradCache, arXiv 2101.06983). The learned scales enter
    the loss once and get their gradient once. A batch in one piece takes one pass.

    Args:
        model: A `Distillation`, or what wraps it to join ranks.
        batch: This rank's rows.
        loss_of: From the outputs to the number to minimize, this rank's share; called once.
        micro_batch: All at once when absent.
        precision: Of the student.
        seed: Of what the student draws at random (dropout); equal in both passes.
    """
    pieces = list(_pieces(batch, micro_batch))
    outputs: list[Seen] = []
    for number, (images, texts) in enumerate(pieces):
        torch.manual_seed(_seed(seed, number))
        with torch.set_grad_enabled(len(pieces) == 1):
            outputs.append(model(images, texts, precision=precision))
    leaves = {name: _joined([seen[name] for seen in outputs]) for name in outputs[0]}
    loss_of(leaves).backward()
    starts = range(0, len(batch.rows), len(pieces[0][0]))
    for number, ((images, texts), start) in enumerate(zip(pieces, starts, strict=True)):
        last = number == len(pieces) - 1
        with contextlib.nullcontext() if last else _without_exchange(model):
            if len(pieces) > 1:
                torch.manual_seed(_seed(seed, number))
                seen = model(images, texts, precision=precision)
            else:
                seen = outputs[0]
            _backward(seen, leaves, slice(start, start + len(images)), with_scales=last)
    if isinstance(model, FSDPModule):
        _exchange_scales(model)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """What a step draws is a function of seed and step alone (and the rank, for what each row draws by itself)."""
    return _digest(f"{seed} step {step}" + (f" rank {rank}" if rank else ""))


def _seed(seed: int, piece: int) -> int:
    return _digest(f"{seed} piece {piece}") if piece else seed


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _pieces(batch: Batch, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(batch.images.split(size or len(batch.rows)), batch.texts.split(size or len(batch.rows)), strict=True)


def _joined(values: list[Tensor]) -> Tensor:
    """The rows of all pieces, or the number that is the same in each, as a leaf that collects its gradient."""
    value = torch.cat(values) if values[0].ndim else values[0]
    return value.detach().requires_grad_()


def _backward(seen: Seen, leaves: Mapping[str, Tensor], rows: slice, *, with_scales: bool) -> None:
    """Lead what the loss asks of the outputs back into the model.

    Where it asks nothing, 0: every parameter then has a gradient, as those who join ranks expect.
    """
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for name, output in seen.items():
        if not output.requires_grad or (output.ndim == 0 and not with_scales):
            continue
        asked = leaves[name].grad
        asked = torch.zeros_like(leaves[name]) if asked is None else asked
        outputs.append(output)
        gradients.append(asked[rows] if output.ndim else asked)
    torch.autograd.backward(outputs, gradients)


@contextlib.contextmanager
def _without_exchange(model: Any) -> Iterator[None]:
    """Gradients add up on each rank; they are exchanged after the last piece."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def _exchange_scales(model: nn.Module) -> None:
    """The mean over the ranks of the gradients of learned numbers, which cannot be spread over them."""
    gradients = [value.grad for value in model.parameters() if value.ndim == 0 and value.grad is not None]
    if gradients:
        table = torch.stack(gradients)
        dist.all_reduce(table)
        for gradient, mean in zip(gradients, table / dist.get_world_size(), strict=True):
            gradient.copy_(mean)


def _tower(student: Any, lock: str) -> list[nn.Module]:
    """The modules of the tower to lock."""
    if lock == "none":
        return []
    if lock == "image":
        return [student.visual]
    if hasattr(student, "text"):
        return [student.text]
    return [_TextParameters(student)]


class _TextParameters(nn.Module):
    """The text tower of open_clip's CLIP, whose parts lie beside the image tower."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            module for name, module in student.named_children() if name != "visual" and isinstance(module, nn.Module)
        )
        self.loose = nn.ParameterList(
            value
            for name, value in student.named_parameters(recurse=False)
            if name not in ("logit_scale", "logit_bias")
        )
