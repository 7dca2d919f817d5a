"""Features of open_clip's image towers before and after the projection into the joint space."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clip_cid.errors import ConfigError
from clip_cid.models.clip import Clip

Taps = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels -> features before and after the projection."""


@contextlib.contextmanager
def both_features(clip: Clip) -> Iterator[Taps]:
    """A function from pixels to the image features before and after the projection into the joint space.

    For a ViT, CLIP's probe reads the class token (or pooled tokens) after the last norm. A ModifiedResNet's
    projection is the last linear map of its attention pool. A timm tower's is open_clip's head, or the
    tower's own classifier if there is no head; without either the features before and after are the same.

    Raises:
        ConfigError: The tower is of another kind, so its features before the projection are not known.
    """
    visual = clip.model.visual
    if isinstance(visual, VisionTransformer):
        with _vit_without_projection(clip, visual) as taps:
            yield taps
    elif isinstance(visual, ModifiedResNet):
        with _resnet_without_projection(clip, visual.attnpool) as taps:
            yield taps
    elif isinstance(visual, TimmModel):
        with _input_of(_timm_projection(clip, visual), clip) as taps:
            yield taps
    else:
        raise _unknown_tower(clip)


def after_only(clip: Clip) -> Taps:
    """The features after the projection in both places: for a tower of any kind."""

    def taps(pixels: Tensor) -> tuple[Tensor, Tensor]:
        after = _model(clip).encode_image(pixels, normalize=False)
        return after, after

    return taps


@contextlib.contextmanager
def _vit_without_projection(clip: Clip, visual: VisionTransformer) -> Iterator[Taps]:
    projection = visual.proj

    def taps(pixels: Tensor) -> tuple[Tensor, Tensor]:
        before = _model(clip).encode_image(pixels, normalize=False)
        return before, before if projection is None else before @ projection

    visual.proj = None
    try:
        yield taps
    finally:
        visual.proj = projection


@contextlib.contextmanager
def _resnet_without_projection(clip: Clip, pool: AttentionPool2d) -> Iterator[Taps]:
    projection = pool.c_proj
    width = projection.in_features
    identity = nn.Linear(width, width).to(projection.weight)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(width))
        identity.bias.zero_()

    def taps(pixels: Tensor) -> tuple[Tensor, Tensor]:
        before = _model(clip).encode_image(pixels, normalize=False)
        return before, projection(before)

    pool.c_proj = identity
    try:
        yield taps
    finally:
        pool.c_proj = projection


def _timm_projection(clip: Clip, visual: TimmModel) -> nn.Module | None:
    """The module that maps a timm tower's features into the joint space; None when there is none."""
    names = [name for name, _ in visual.head.named_children()]
    if "proj" in names or "mlp" in names:
        return visual.head.get_submodule("proj" if "proj" in names else "mlp")
    if names:  # an attention pool that projects inside
        raise _unknown_tower(clip)
    trunk: Any = visual.trunk
    classifier = trunk.get_classifier()
    if not isinstance(classifier, nn.Linear | nn.Identity):
        raise _unknown_tower(clip)
    return classifier if isinstance(classifier, nn.Linear) else None


@contextlib.contextmanager
def _input_of(projection: nn.Module | None, clip: Clip) -> Iterator[Taps]:
    captured: list[Tensor] = []

    def taps(pixels: Tensor) -> tuple[Tensor, Tensor]:
        captured.clear()
        after = _model(clip).encode_image(pixels, normalize=False)
        return (captured[0] if captured else after), after

    if projection is None:
        yield taps
        return
    hook = projection.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    try:
        yield taps
    finally:
        hook.remove()


def _unknown_tower(clip: Clip) -> ConfigError:
    return ConfigError(
        f"{clip.name}: features before the projection are not known for its image tower"
        f" ({type(clip.model.visual).__name__}).",
        fix="Set evaluate.features: after_projection.",
    )


def _model(clip: Clip) -> Any:
    """open_clip's models share `encode_image`, but no base class that says so."""
    return clip.model
