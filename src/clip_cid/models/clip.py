"""A CLIP model with its tokenizer and its image transforms."""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Resize

from clip_cid.errors import ConfigError
from clip_cid.models.open_clip_errors import LOADING_ERRORS, one_line, open_clip_warnings

_SHORTEST_CONTEXT = 3  # tokens: begin, a word, end


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


def count_truncated(clip: Clip, captions: Sequence[str]) -> int:
    """How many captions lose words: one more token of room moves the end mark of such a caption."""
    if not captions:
        return 0
    tokenizer: Any = clip.tokenizer
    short = tokenizer(list(captions))
    length = short.shape[1]
    longer = tokenizer(list(captions), context_length=length + 1)
    return int((short != longer[:, :length]).any(dim=1).sum())


def crop_transform(clip: Clip) -> Callable[[Image.Image], Tensor]:
    """What makes the model's input of a crop: as `preprocess`, but all of it is seen, whatever its aspect."""
    return _transform({**clip.preprocess_cfg, "resize_mode": "squash"}, is_train=False)


def train_transform(
    clip: Clip, *, crop_scale: float | None, more: Mapping[str, float] | None = None
) -> Callable[[Image.Image], Tensor]:
    """open_clip's training transform: a random crop of at least `crop_scale` of the image's area.

    Args:
        clip: Whose images they are.
        crop_scale: Smallest share; None if the image is a crop already, all of which is seen.
        more: Others of open_clip's `AugmentationCfg`; of `color_jitter` the strength for brightness, contrast and
            saturation, of which hue gets a quarter.
    """
    options: dict[str, Any] = {"scale": (crop_scale or 1.0, 1.0), **(more or {})}
    if (strength := options.get("color_jitter")) is not None:
        options["color_jitter"] = (strength, strength, strength, strength / 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unused augmentation")  # open_clip says it of used ones, too
        transform = _transform(clip.preprocess_cfg, is_train=True, aug_cfg=options)
    if crop_scale is None:
        crop, *others = transform.transforms
        transform = Compose([Resize(crop.size, crop.interpolation, antialias=crop.antialias), *others])
    return transform


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


def refuse_misfit(clip: Clip) -> None:
    """Send one made-up pair through a model whose configuration may be the user's own.

    Raises:
        ConfigError: Sizes do not fit each other.
    """
    text_cfg, tokens_fix = clip.model_cfg["text_cfg"], "Set text_cfg.context_length to what the text tower is made for."
    length = text_cfg.get("context_length", 77)
    if not isinstance(length, int) or length < _SHORTEST_CONTEXT:
        raise ConfigError(
            f"{clip.name}: text_cfg.context_length is {length}, which holds no word between begin and end; the least is"
            f" {_SHORTEST_CONTEXT}.",
            fix=tokens_fix,
        )
    positions = getattr(getattr(clip.model, "text", None), "context_length", None)
    if "hf_model_name" in text_cfg and positions and length > positions:
        raise ConfigError(
            f"{clip.name}: text_cfg.context_length is {length}, but {text_cfg['hf_model_name']} has {positions}"
            " positions.",
            fix=tokens_fix,
        )

    model: Any = clip.model
    height, width = (
        (clip.image_side,) * 2 if isinstance(clip.preprocess_cfg["size"], int) else clip.preprocess_cfg["size"]
    )
    with _misfit(
        clip.name,
        "preprocess_cfg",
        f"it cannot make an image of {height} x {width} pixels",
        "Correct vision_cfg.image_size, and mean and std",
    ):
        pixels = clip.preprocess(Image.new("RGB", (width, height)))[None]
    patch = clip.model_cfg["vision_cfg"].get("patch_size") if hasattr(model.visual, "patch_size") else None
    with _misfit(
        clip.name,
        "vision_cfg",
        f"the image tower does not take images of {height} x {width} pixels"
        + (f" in patches of {patch}" if patch else ""),
        "Set image_size (and patch_size) to what the tower is made for",
    ):
        image = _encoded(model, model.encode_image, pixels.to(clip.device))
    with _misfit(clip.name, "text_cfg", f"the text tower does not take {length} tokens", tokens_fix.rstrip(".")):
        text = _encoded(model, model.encode_text, clip.tokenizer(["a"]).to(clip.device))

    if not image.shape[1] == text.shape[1] == clip.dim:
        raise ConfigError(
            f"{clip.name}: embed_dim is {clip.dim}, but the image embedding has {image.shape[1]} numbers and the text"
            f" embedding {text.shape[1]}.",
            fix="Set embed_dim to the width of both towers.",
        )


def _encoded(model: torch.nn.Module, tower: Callable[[Tensor], Tensor], row: Tensor) -> Tensor:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return tower(row)
    finally:
        model.train(training)


@contextlib.contextmanager
def _misfit(name: str, where: str, what: str, fix: str) -> Iterator[None]:
    try:
        yield
    except LOADING_ERRORS as error:
        raise ConfigError(f"{name}: {where}: {what} ({one_line(error)}).", fix=f"{fix}.") from error


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
