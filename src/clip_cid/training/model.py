"""All trained parameters in one module, and the exact gradient of a batch in micro-batches."""

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clip_cid.method.distill.objective import LARGEST_SCALE, Objective
from clip_cid.method.products import at_least_float32
from clip_cid.training.batches import Batch

Outputs = dict[str, Tensor]
"""The outputs that losses read: rows (with two axes) and learned numbers (with none), by name."""


class Distillation(nn.Module):
    """All trained parameters in one module: the student, and what the objective adds to it.

    Its outputs are all that the losses need, the learned scales included. So the gradient of everything in it, except
    the cluster head, follows from the gradient of its outputs.
    """

    def __init__(self, student: nn.Module, objective: Objective, *, lock: str = "none") -> None:
        super().__init__()
        self.student: Any = student  # open_clip's models share an interface, but no base class that declares it
        self.objective = objective
        self._locked = _tower(student, "text" if objective.stored_texts else lock)
        for part in self._locked:
            part.requires_grad_(False)

    def forward(
        self,
        images: Float[Tensor, "rows channels height width"] | None,
        texts: Int[Tensor, "rows context"] | None,
        *,
        precision: torch.dtype,
        lines: Int[Tensor, "lines context"] | None = None,
    ) -> Outputs:
        """See `Objective.forward`; without images or without texts, what is left.

        `lines` are texts without images. Texts of pairs are not encoded where their embeddings are stored.
        """
        device = next(self.student.parameters()).device.type
        outputs: Outputs = {}

        with torch.autocast(device, dtype=precision, enabled=precision != torch.float32):
            if images is not None:
                outputs["image"] = self.student.encode_image(images)
            if texts is not None and not (images is not None and self.objective.stored_texts):
                outputs["text"] = self.student.encode_text(texts if lines is None else torch.cat([texts, lines]))
        outputs = {name: F.normalize(at_least_float32(rows), dim=-1) for name, rows in outputs.items()}
        if texts is not None and lines is not None:
            outputs["text"], outputs["lines"] = outputs["text"].split([len(texts), len(lines)])

        outputs["logit_scale"] = self.student.logit_scale.exp().sum()  # of shape () or (1,)
        if (bias := getattr(self.student, "logit_bias", None)) is not None:
            outputs["logit_bias"] = bias.sum()

        return outputs | self.objective.read(outputs.get("image"), outputs.get("text"), outputs.get("lines"))

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        for part in self._locked:
            part.train(False)
        return self

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep the student's factor between 1 and 100, as CLIP does; the objective clamps its own."""
        if self.student.logit_scale.requires_grad:  # a teacher's may be larger
            self.student.logit_scale.clamp_(0, math.log(LARGEST_SCALE))
        self.objective.clamp_scale()


def backward_in_micro_batches(
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[Outputs], Tensor],
    *,
    micro_batch: int | None,
    precision: torch.dtype,
    seed: int,
) -> None:
    """Leave the gradient of a loss over the whole batch, with `micro_batch` pairs in the student at once.

    The loss reads the outputs of all pairs, whatever the micro-batches, so every term of it is exact. Its gradient is
    then back-propagated one micro-batch at a time (the two passes of GradCache, arXiv 2101.06983). The learned scales
    enter the loss once and get their gradient once. A batch that fits at once takes one pass.

    Args:
        model: A `Distillation`, or what wraps it to join ranks.
        batch: This rank's rows; texts without images are spread over the micro-batches.
        loss_of: From the outputs to the number to minimize, this rank's share; called once.
        micro_batch: All at once when absent.
        precision: Of the student.
        seed: Of what the student draws at random (dropout); equal in both passes.
    """
    size = micro_batch or len(batch.rows)
    pairs = list(zip(batch.images.split(size), batch.texts.split(size), strict=True))
    shares = [None] * len(pairs) if batch.lines is None else batch.lines.tensor_split(len(pairs))
    micro_batches = [(*pair, share) for pair, share in zip(pairs, shares, strict=True)]
    once = len(micro_batches) == 1

    # First pass: the outputs of the whole batch, and the gradient of the loss in them.
    outputs: list[Outputs] = []
    for number, (images, texts, lines) in enumerate(micro_batches):
        torch.manual_seed(_micro_batch_seed(seed, number))
        with torch.set_grad_enabled(once):
            outputs.append(model(images, texts, precision=precision, lines=lines))
    leaves = {name: _joined([part[name] for part in outputs]) for name in outputs[0]}
    loss_of(leaves).backward()

    # Second pass: from the outputs into the model. Ranks exchange gradients once, with the last micro-batch.
    before = Counter[str]()  # rows of each output in the micro-batches that are done
    for number, (images, texts, lines) in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with contextlib.nullcontext() if last else _without_exchange(model):
            if once:
                part = outputs[0]
            else:
                torch.manual_seed(_micro_batch_seed(seed, number))
                part = model(images, texts, precision=precision, lines=lines)
            _backward(part, leaves, before, with_scales=last)
            before.update({name: len(output) for name, output in part.items() if output.ndim})


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A step's random draws depend on seed and step only (and on the rank, for draws by row)."""
    return _digest(f"{seed} step {step}" + (f" rank {rank}" if rank else ""))


def _micro_batch_seed(seed: int, number: int) -> int:
    return _digest(f"{seed} piece {number}") if number else seed


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _joined(values: list[Tensor]) -> Tensor:
    """The rows of all micro-batches, or the number that is the same in each, as a leaf that collects its gradient."""
    value = torch.cat(values) if values[0].ndim else values[0]
    return value.detach().requires_grad_()


def _backward(part: Outputs, leaves: Mapping[str, Tensor], before: Mapping[str, int], *, with_scales: bool) -> None:
    """Back-propagate the gradient of a micro-batch's outputs into the model.

    Where the loss does not depend on an output, its gradient is 0: every parameter then has a gradient, as DDP expects.
    """
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for name, output in part.items():
        if not output.requires_grad or (output.ndim == 0 and not with_scales):
            continue
        gradient = leaves[name].grad
        gradient = torch.zeros_like(leaves[name]) if gradient is None else gradient
        outputs.append(output)
        gradients.append(gradient[before[name] :][: len(output)] if output.ndim else gradient)
    torch.autograd.backward(outputs, gradients)


def _without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients stay on each rank, and add up there, for as long as the block lasts."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


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
