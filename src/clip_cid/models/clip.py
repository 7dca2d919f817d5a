"""A CLIP model with its tokenizer and its image transforms."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor

from clip_cid.errors import ConfigError
from clip_cid.models.open_clip_errors import one_line, open_clip_warnings


@dataclasses.dataclass(frozen=True)
class Clip:
    """A CLIP model with all that is needed to feed it."""

    model: torch.nn.Module
    model_cfg: dict[str, Any]
    """open_clip's constructor arguments; with them the weights alone rebuild the model."""
    preprocess_cfg: dict[str, Any]
    """size, mode, mean, std, interpolation, resize_mode, fill_color, in JSON's types."""
    tokenizer: Callable[[list[str]], Tensor]
    """Captions -> (captions, context length) int64."""
    preprocess: Callable[[Image.Image], Tensor]
    """An RGB image -> (3, height, width) float32, always the same."""
    name: str

    @property
    def image_side(self) -> int:
        """The longer side of the images the model sees; open_clip writes one number for some towers, two for others."""
        size = self.preprocess_cfg["size"]
        return int(size) if isinstance(size, int) else max(size)

    @property
    def dim(self) -> int:
        """Width of its embeddings."""
        return int(self.model_cfg["embed_dim"])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def train_transform(
    clip: Clip, *, crop_scale: float, more: Mapping[str, float] | None = None
) -> Callable[[Image.Image], Tensor]:
    """open_clip's training transform: a random crop of at least `crop_scale` of the image's area.

    Args:
        clip: Whose images they are.
        crop_scale: Smallest share.
        more: Others of open_clip's `AugmentationCfg`; of `color_jitter` the strength for brightness, contrast and
            saturation, of which hue gets a quarter.
    """
    options: dict[str, Any] = {"scale": (crop_scale, 1.0), **(more or {})}
    if (strength := options.get("color_jitter")) is not None:
        options["color_jitter"] = (strength, strength, strength, strength / 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unused augmentation")  # open_clip says it of used ones, too
        return _transform(clip.preprocess_cfg, is_train=True, aug_cfg=options)


def use_grad_checkpointing(clip: Clip) -> None:
    """Recompute the activations of both towers in the backward pass, to save memory.

    Raises:
        ConfigError: A tower cannot.
    """
    model: Any = clip.model
    with open_clip_warnings() as problems:  # some towers only log that they do without
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
            problems.append(str(error))
    if isinstance(model.visual, ModifiedResNet):  # which logs nothing
        problems.append("not supported by ModifiedResNet")

    if problems:
        raise ConfigError(
            f"machine.grad_checkpointing: {clip.name} cannot do it ({one_line(problems[0])}).",
            fix="Set it to false; machine.micro_batch saves memory with any student that has no batch normalization.",
        )


def assemble(model: Any, model_cfg: dict[str, Any], tokenizer: Any, name: str) -> Clip:
    """A model that open_clip built, with what feeds it.

    Raises:
        ConfigError: The tokenizer has more tokens than the model.
    """
    text_cfg = model_cfg["text_cfg"]
    words = text_cfg.get("vocab_size", 49408)
    if isinstance(tokenizer, SimpleTokenizer) and "hf_model_name" not in text_cfg and words < tokenizer.vocab_size:
        raise ConfigError(
            f"{name}: text_cfg.vocab_size is {words:,}, but the tokenizer has {tokenizer.vocab_size:,} tokens.",
            fix=f"Set vocab_size to {tokenizer.vocab_size}.",
        )

    preprocess_cfg = json.loads(json.dumps(model.visual.preprocess_cfg))
    preprocess = _transform(preprocess_cfg, is_train=False)
    return Clip(model, json.loads(json.dumps(model_cfg)), preprocess_cfg, tokenizer, preprocess, name)


def _transform(preprocess_cfg: dict[str, Any], **options: Any) -> Any:
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    arguments = {name: preprocess_cfg[name] for name in names}
    return open_clip.image_transform(image_size=preprocess_cfg["size"], **arguments, **options)
