"""The cost of a model: its parameters, and the floating-point operations of a pair."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_BACKWARD = 2  # a backward pass has two products for each one of the forward pass


@dataclass(frozen=True)
class Costs:
    """Of both towers."""

    image_flops: int
    """Floating-point operations of the forward pass of one image; a multiplication and its addition are two."""
    text_flops: int
    """Of one caption."""
    parameters: int

    @property
    def forward(self) -> int:
        """FLOPs of a pair through both towers."""
        return self.image_flops + self.text_flops

    @property
    def training(self) -> int:
        """FLOPs of a pair forward and backward, nothing computed twice."""
        return (1 + _BACKWARD) * self.forward

    def in_step(self, *, passes: int, reads_texts: bool) -> int:
        """FLOPs of a pair in a step.

        Args:
            passes: Forward passes, those that are computed again included.
            reads_texts: Whether the captions go through the text tower too.
        """
        return (passes + _BACKWARD) * (self.forward if reads_texts else self.image_flops)


def count_parameters(student: torch.nn.Module) -> dict[str, int]:
    """Numbers in the image tower, and in everything else, which is the text's."""
    image = sum(value.numel() for name, value in student.named_parameters() if name.startswith("visual."))
    return {"image": image, "text": sum(value.numel() for value in student.parameters()) - image}


def count_costs(model: torch.nn.Module, *, context_length: int) -> Costs | None:
    """Count the operations of a pass on PyTorch's meta device, which computes shapes only.

    Matrix products, convolutions and attention count, as in `torch.utils.flop_counter`; elementwise operations do not.

    Args:
        model: One of open_clip's, on any device; it is not changed.
        context_length: Tokens of a caption.

    Returns:
        None if a part of the model cannot run on the meta device.
    """
    bare: Any = copy.deepcopy(model).to("meta").requires_grad_(True)
    size: Any = bare.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.zeros(1, 3, height, width, device="meta")
    texts = torch.zeros(1, context_length, dtype=torch.int64, device="meta")

    try:
        flops = [_flops(bare.encode_image, images), _flops(bare.encode_text, texts)]
    except (RuntimeError, NotImplementedError):
        return None
    return Costs(*flops, parameters=sum(value.numel() for value in model.parameters()))


def _flops(tower: Any, rows: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        tower(rows)
    return counter.get_total_flops()
