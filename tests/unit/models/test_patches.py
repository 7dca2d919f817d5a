import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf
from tiny_sets import tiny_clip

from clip_cid.models import patches
from clip_cid.models.clip import Clip

SIDE, PATCH, WIDTH, HEADS = (32, 48), 8, 32, 2
ROWS, COLUMNS = SIDE[0] // PATCH, SIDE[1] // PATCH


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A random ViT of two blocks over 4 rows and 6 columns of patches, in float64."""
    found = tiny_clip(
        tmp_path_factory.mktemp("clip"),
        image_size=list(SIDE),
        patch_size=PATCH,
        width=WIDTH,
        layers=2,
        head_width=WIDTH // HEADS,
    )
    found.model.double()
    return found


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, *SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def unit_prompts(dim: int, images: int) -> torch.Tensor:
    prompts = torch.randn(images, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(prompts, dim=1)


class LastBlock:
    """What follows the last block's first norm, in NumPy from the weights alone: cosine of the image with a prompt."""

    def __init__(self, clip: Clip, residual: np.ndarray, prompt: np.ndarray) -> None:
        self.w = {name: value.detach().numpy() for name, value in clip.model.visual.state_dict().items()}  # type: ignore[union-attr]
        self.residual, self.prompt = residual, prompt

    def weight(self, name: str) -> np.ndarray:
        return self.w[f"transformer.resblocks.1.{name}"]

    def norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        centered = x - x.mean(axis=-1, keepdims=True)
        return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias

    def attention(self, tokens: np.ndarray) -> np.ndarray:
        q, k, v = np.split(tokens @ self.weight("attn.in_proj_weight").T + self.weight("attn.in_proj_bias"), 3, axis=-1)
        heads = []
        for head in np.split(np.arange(WIDTH), HEADS):
            scores = q[:, head] @ k[:, head].T / math.sqrt(len(head))
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, head])
        return np.concatenate(heads, axis=1) @ self.weight("attn.out_proj.weight").T + self.weight("attn.out_proj.bias")

    def cosine(self, normed: np.ndarray) -> float:
        x = self.residual + self.attention(normed)
        hidden = self.norm(x, self.weight("ln_2.weight"), self.weight("ln_2.bias"))
        hidden = hidden @ self.weight("mlp.c_fc.weight").T + self.weight("mlp.c_fc.bias")
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = x + hidden @ self.weight("mlp.c_proj.weight").T + self.weight("mlp.c_proj.bias")
        image = self.norm(x[0], self.w["ln_post.weight"], self.w["ln_post.bias"]) @ self.w["proj"]
        return float(image @ self.prompt / np.linalg.norm(image))


def slow_map(clip: Clip, pixels: torch.Tensor, prompt: torch.Tensor) -> tuple[np.ndarray, float]:
    """Grad-CAM by finite differences: a channel's mean gradient is what moving it in all patches at once does, shared out."""
    seen: list[np.ndarray] = []
    visual: Any = clip.model.visual
    hook = visual.transformer.resblocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0][0].numpy()))
    with torch.no_grad():
        visual(pixels[None])
    hook.remove()
    block = LastBlock(clip, seen[0], prompt.numpy())
    normed = block.norm(seen[0], block.weight("ln_1.weight"), block.weight("ln_1.bias"))
    channels = np.empty(WIDTH)
    for channel in range(WIDTH):
        step = np.zeros_like(normed)
        step[1:, channel] = 1e-5
        channels[channel] = (block.cosine(normed + step) - block.cosine(normed - step)) / 2e-5 / (ROWS * COLUMNS)
    found = np.maximum(normed[1:] @ channels, 0)
    return found.reshape(ROWS, COLUMNS), block.cosine(normed)


def test_activation_maps_are_those_of_finite_differences_through_a_tower_written_anew(
    clip: Clip, pixels: torch.Tensor
) -> None:
    prompts = unit_prompts(clip.dim, len(pixels))
    maps, cosines = patches.grad_cam(clip, pixels, prompts)
    assert float(maps.max()) > 0
    for place in range(len(pixels)):
        expected, cosine = slow_map(clip, pixels[place], prompts[place])
        assert maps[place].numpy() == pytest.approx(expected, abs=1e-8, rel=1e-5)
        assert float(cosines[place]) == pytest.approx(cosine)


def test_what_speaks_for_a_prompt_speaks_against_its_opposite(clip: Clip, pixels: torch.Tensor) -> None:
    prompts = unit_prompts(clip.dim, len(pixels))
    there, back = (patches.grad_cam(clip, pixels, side * prompts)[0] for side in (1, -1))
    assert not bool(((there > 1e-12) & (back > 1e-12)).any())
    assert bool(((there > 1e-12) | (back > 1e-12)).all())


def test_a_map_depends_on_its_own_image_alone(clip: Clip, pixels: torch.Tensor) -> None:
    prompts = unit_prompts(clip.dim, len(pixels))
    alone, _ = patches.grad_cam(clip, pixels[1:2], prompts[1:2])
    assert patches.grad_cam(clip, pixels, prompts)[0][1].numpy() == pytest.approx(alone[0].numpy(), abs=1e-12)


def test_the_model_is_left_as_it_was(clip: Clip, pixels: torch.Tensor) -> None:
    visual: Any = clip.model.visual
    with torch.no_grad():
        before = visual(pixels)
    patches.grad_cam(clip, pixels, unit_prompts(clip.dim, len(pixels)))
    with pytest.raises(RuntimeError):
        patches.grad_cam(clip, pixels, unit_prompts(clip.dim + 1, len(pixels)))
    assert not visual.transformer.resblocks[-1].ln_1._forward_hooks
    assert all(parameter.grad is None for parameter in clip.model.parameters())
    with torch.no_grad():
        assert torch.equal(visual(pixels), before)


def test_patch_tokens_are_what_the_last_norm_gives_of_the_patches(clip: Clip, pixels: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []
    visual: Any = clip.model.visual
    hook = visual.ln_post.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        visual(pixels)
    hook.remove()
    found = patches.patch_tokens(clip, pixels)
    assert found.shape == (len(pixels), ROWS, COLUMNS, WIDTH)
    for row, column in np.ndindex(ROWS, COLUMNS):
        assert torch.allclose(found[:, row, column], seen[0][:, 1 + row * COLUMNS + column])


def test_a_change_of_one_patch_shows_most_in_its_own_place(clip: Clip, pixels: torch.Tensor) -> None:
    changed = pixels.clone()
    changed[:, :, PATCH : 2 * PATCH, 4 * PATCH : 5 * PATCH] *= -1
    moved = (patches.patch_tokens(clip, changed) - patches.patch_tokens(clip, pixels)).norm(dim=3)
    assert all(divmod(int(one.argmax()), COLUMNS) == (1, 4) for one in moved)


def test_a_pooling_vit_has_patches_before_its_pooler(tmp_path: Path) -> None:
    pooled = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16, "attentional_pool": True}
    clip = tiny_clip(tmp_path, **pooled, attn_pooler_heads=2)
    found = patches.patch_tokens(clip, torch.zeros(1, 3, 32, 32))
    assert found.shape == (1, 2, 2, 32)
    maps, _ = patches.grad_cam(clip, torch.zeros(1, 3, 32, 32), torch.eye(clip.dim)[:1])
    assert maps.shape == (1, 2, 2)


def test_towers_without_patches_say_so(clip: Clip, tmp_path: Path) -> None:
    convolutional = tiny_clip(tmp_path, layers=[1, 1, 1, 1], width=8, head_width=32, image_size=32, patch_size=None)
    assert patches.why_no_patches(clip) is None
    assert "ModifiedResNet" in (patches.why_no_patches(convolutional) or "")
