"""The cost of a model: its parameters, and the floating-point operations of a pair."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clip_cid.file_digests import digest
from clip_cid.models.architectures import build_skeleton
from clip_cid.models.clip import Clip
from clip_cid.models.device import hardware_of
from clip_cid.summaries import Latency, ModelCost

BATCHES = (1, 64)
"""Of the measured latency."""
_REPEATS, _SECONDS = 20, 0.1  # of a measurement, whichever ends first
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


def cost_key(clip: Clip, weights: str) -> str:
    """What the cost of a model depends on: the model, and the machine it runs on."""
    return digest([weights, clip.model_cfg, machine_of(clip)])


def machine_of(clip: Clip) -> str:
    """The hardware a model is on, in words."""
    hardware = hardware_of(clip.device)
    return hardware if clip.device.type == "cuda" else f"{hardware}, {torch.get_num_threads()} threads"


def measure_cost(name: str, clip: Clip, *, weights: str) -> ModelCost:
    """Count the parameters and operations of a model, and take the time of its towers in float32.

    Args:
        name: As the evaluation has it.
        clip: The model.
        weights: A digest of its weights.
    """
    parameters, length = count_parameters(clip.model), clip.model_cfg["text_cfg"].get("context_length", 77)
    bare = build_skeleton(clip.model_cfg)
    counted = count_costs(clip.model if bare is None else bare, context_length=length)
    latency = [one for batch in BATCHES if (one := _latency(clip, batch)) is not None]
    return ModelCost(
        model=name,
        key=cost_key(clip, weights),
        machine=machine_of(clip),
        image_parameters=parameters["image"],
        text_parameters=parameters["text"],
        image_flops=None if counted is None else counted.image_flops,
        text_flops=None if counted is None else counted.text_flops,
        latency=latency,
    )


def _latency(clip: Clip, batch: int) -> Latency | None:
    """The median time of a batch; None if it does not fit into the memory of the GPU."""
    model: Any = clip.model
    size = clip.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    try:
        pixels = torch.zeros(batch, 3, height, width, device=clip.device)
        tokens = clip.tokenizer(["a photo of a cat"] * batch).to(clip.device)
        return Latency(batch, _milliseconds(model.encode_image, pixels), _milliseconds(model.encode_text, tokens))
    except torch.OutOfMemoryError:
        return None


def _milliseconds(tower: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    def once() -> float:
        begun = time.perf_counter()
        tower(rows)[0, 0].item()  # waits for the device
        return time.perf_counter() - begun

    with torch.inference_mode():
        once()  # the first pass chooses kernels and allocates
        times = [once()]
        while len(times) < _REPEATS and sum(times) < _SECONDS:
            times.append(once())
    return 1_000 * statistics.median(times)


def _flops(tower: Any, rows: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        tower(rows)
    return counter.get_total_flops()
