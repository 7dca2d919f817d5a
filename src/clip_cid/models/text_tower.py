"""A teacher's text tower, kept as it is beside a student's image tower (locked-text tuning, arXiv 2111.07991)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor

from clip_cid.errors import ConfigError, DataError
from clip_cid.models.clip import Clip
from clip_cid.models.loading import load_clip
from clip_cid.models.teacher import weights_sha256

_SCALES = ("logit_scale", "logit_bias")
_OF_TEXT = ("text_cfg", "custom_text")
"""Parts of a `model_cfg` that are the text tower's."""
NOT_OF_IMAGE = (*_OF_TEXT, "quick_gelu")
"""Parts that do not tell one image tower from another: with weights, the activation is theirs."""
_OF_SCALES = ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")


@dataclasses.dataclass(frozen=True)
class TextTower:
    """The text tower of a trained model, with its tokenizer."""

    reference: str
    model_cfg: dict[str, Any]
    """Of the whole model it is from."""
    tokenizer: Callable[[list[str]], Tensor]
    weights: dict[str, Tensor] | None
    """By their names in the whole model, with its logit scale and bias. None leaves those of a model it is put into:
    they come from elsewhere."""

    @property
    def dim(self) -> int:
        return int(self.model_cfg["embed_dim"])

    def without_weights(self) -> "TextTower":
        """The same tower, to build a model whose weights come from elsewhere."""
        return dataclasses.replace(self, weights=None)

    def model_cfg_beside(self, image_cfg: dict[str, Any], *, loaded: bool, own_scale: bool) -> dict[str, Any]:
        """The `model_cfg` of a model with the image tower of `image_cfg` and this text tower.

        Args:
            image_cfg: Of the model with the image tower.
            loaded: Whether the image tower has trained weights, which fix its activation.
            own_scale: Whether the model has its own logit scale and bias, and not those of this tower's model.

        Raises:
            ConfigError: open_clip cannot give each of the two towers its activation.
        """
        model_cfg = {key: value for key, value in image_cfg.items() if key not in _OF_TEXT}
        model_cfg |= {key: self.model_cfg[key] for key in _OF_TEXT if key in self.model_cfg}
        model_cfg["embed_dim"] = self.dim
        if not own_scale:
            model_cfg = {key: value for key, value in model_cfg.items() if key not in _OF_SCALES}
            model_cfg |= {key: self.model_cfg[key] for key in _OF_SCALES if key in self.model_cfg}
        quick_gelu = self._quick_gelu(image_cfg, loaded=loaded)
        return {**model_cfg, "quick_gelu": quick_gelu} if quick_gelu or "quick_gelu" in model_cfg else model_cfg

    def put_into(self, model: torch.nn.Module, *, own_scale: bool) -> None:
        """Give a model of `model_cfg_beside` the weights of this tower, and fix the scale if it is this tower's."""
        target: Any = model
        if self.weights is not None:
            weights = {name: value for name, value in self.weights.items() if not (own_scale and name in _SCALES)}
            missing, unknown = target.load_state_dict(weights, strict=False)
            lacking = [name for name in missing if not name.startswith("visual.") and name not in _SCALES]
            if lacking or unknown:
                raise DataError(
                    f"{self.reference}: its text tower has other weights than its model_cfg says"
                    f" ({', '.join([*lacking, *unknown][:3])}).",
                    fix="Export the teacher again, or train with distill.text_tower: own.",
                )
        if not own_scale:
            for name in _SCALES:
                if (scale := getattr(target, name, None)) is not None:
                    scale.requires_grad_(False)

    def _quick_gelu(self, image_cfg: dict[str, Any], *, loaded: bool) -> bool:
        """open_clip has one switch for both towers; towers of timm and transformers, and ResNets, do not look at it."""
        image, text = (bool(cfg.get("quick_gelu", False)) for cfg in (image_cfg, self.model_cfg))
        vision_cfg = image_cfg["vision_cfg"]
        if "hf_model_name" in self.model_cfg["text_cfg"]:
            return image
        if loaded and image != text and not ignores_quick_gelu(vision_cfg):
            raise ConfigError(
                f"distill.text_tower: {self.reference} was trained with quick_gelu {text}, and the weights of"
                f" distill.pretrained with {image}; open_clip builds both towers of a model with one of them.",
                fix="Drop distill.pretrained, or give weights of the same activation.",
            )
        return text


def load_text_tower(reference: str, *, weights_digest: str | None = None) -> TextTower:
    """The text tower of a trained model, on the CPU.

    Args:
        reference: As for `load_clip`.
        weights_digest: SHA-256 that all weights of the model must have, if it is known.

    Raises:
        ConfigError: No such model, or one whose text tower cannot be taken out of it.
        RunError: As `load_clip`.
        DataError: The weights cannot be loaded, or are not those of the digest.
    """
    clip = load_clip(reference)
    _refuse_joined_towers(clip)
    if weights_digest is not None and (found := weights_sha256(clip.model)) != weights_digest:
        raise DataError(
            f"{reference}: its weights are not those that made the embeddings (SHA-256 {found[:12]}..., not"
            f" {weights_digest[:12]}...), so its text tower may not fit them.",
            fix="Give the teacher of the embeddings as distill.text_tower, or run the embed stage again.",
        )
    return TextTower(reference, clip.model_cfg, clip.tokenizer, _text_weights(clip))


def _refuse_joined_towers(clip: Clip) -> None:
    """Refuse a model that is not an image tower beside a text tower, as CoCa."""
    if "multimodal_cfg" in clip.model_cfg or type(clip.model) not in (CLIP, CustomTextCLIP):
        raise ConfigError(
            f"distill.text_tower: {clip.name} is a {type(clip.model).__name__}, whose text tower does not stand beside"
            " its image tower as that of a CLIP does.",
            fix="Set distill.text_tower: own; the student learns from the stored embeddings of this teacher then.",
        )


def _text_weights(clip: Clip) -> dict[str, Tensor]:
    state = clip.model.state_dict()
    return {name: value.detach() for name, value in state.items() if not name.startswith("visual.")}


def ignores_quick_gelu(vision_cfg: dict[str, Any]) -> bool:
    """Whether an image tower has its activation from elsewhere."""
    return bool(vision_cfg.get("timm_model_name")) or isinstance(vision_cfg.get("layers"), list | tuple)
