"""Patches of an image tower: their features, and their activation for a prompt (Grad-CAM)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import VisionTransformer
from torch import Tensor

from clip_cid.models.clip import Clip


def why_no_patches(clip: Clip) -> str | None:
    """The reason why the patches of this model are not known; None for open_clip's own ViT."""
    visual = clip.model.visual
    if isinstance(visual, VisionTransformer):
        return None
    return f"its image tower is a {type(visual).__name__}; patches are known of open_clip's VisionTransformer only."


def patch_tokens(
    clip: Clip, pixels: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images rows columns dim"]:
    """Each patch's features after the last block and, if it is made for this width, the tower's last norm."""
    visual = _vit(clip)
    with torch.inference_mode():
        outputs = visual.forward_intermediates(
            pixels.to(clip.device),
            indices=1,
            normalize_intermediates=visual.attn_pool is None,  # a pooler's norm stands behind it, in its own width
            intermediates_only=True,
        )
    return outputs["image_intermediates"][0].permute(0, 2, 3, 1)


def grad_cam(
    clip: Clip, pixels: Float[Tensor, "images 3 height width"], prompts: Float[Tensor, "images dim"]
) -> tuple[Float[Tensor, "images rows columns"], Float[Tensor, " images"]]:
    """Grad-CAM of the cosine of each image and its prompt, and the cosine itself.

    The activations are those before the attention of the last block. After it the class token reads no other
    patch, so the gradients of the patches are zero. Channels are weighted by their mean gradient over the
    patches. Negative values, which lower the cosine, become 0.

    Args:
        clip: A model for which `why_no_patches` gives None.
        pixels: Preprocessed images.
        prompts: Unit text embeddings, one an image.
    """
    activations: list[Tensor] = []

    def tap(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        activations.append(output.detach().requires_grad_())  # detached, so that no gradient is computed below
        return activations[0]

    hook = _vit(clip).transformer.resblocks[-1].ln_1.register_forward_hook(tap)
    model: Any = clip.model
    try:
        with torch.enable_grad():
            images = F.normalize(model.encode_image(pixels.to(clip.device)), dim=-1)
            cosines = (images * prompts.to(images)).sum(dim=1)
            (gradient,) = torch.autograd.grad(cosines.sum(), activations)
    finally:
        hook.remove()

    channels = gradient[:, 1:].mean(dim=1)  # (images, width); the class token is no place in the image
    maps = F.relu(torch.einsum("ipc,ic->ip", activations[0][:, 1:].detach(), channels))
    return maps.reshape(len(maps), *_vit(clip).grid_size), cosines.detach()


def _vit(clip: Clip) -> Any:
    """The tower with its true type; open_clip's annotations are too general."""
    return clip.model.visual
