"""open_clip's towers as the classes of transformers: which of them map, their configuration and their weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import timm.layers
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from clip_cid.errors import RunError
from clip_cid.models.clip import Clip

_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "pos_embed_type"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"}
_TOKENIZER = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
_OF_BOTH = {"act_kwargs", "norm_kwargs"}
_WITHOUT_EFFECT = {"patch_dropout", "final_ln_after_pool", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
"""In the towers that map: dropped patches are of the training, and the class token is alone behind its norm."""

_CLIP_TEXT: dict[str, tuple[Any, ...]] = {"pool_type": ("argmax", "eos")}
_SIGLIP_TEXT: dict[str, tuple[Any, ...]] = {
    "no_causal_mask": (True,),
    "proj_bias": (True,),
    "pool_type": ("last",),
}
_ARGMAX = 2  # the eos_token_id that makes transformers' CLIP pool at the highest token, as open_clip's argmax does


class Mapped(NamedTuple):
    """A model of transformers with the outputs of one of open_clip."""

    kind: str
    """`clip` or `siglip`."""
    config: dict[str, Any]
    """The arguments of `CLIPConfig` or `SiglipConfig`."""
    weights: dict[str, Tensor]
    """By their names in `CLIPModel` or `SiglipModel`."""

    @property
    def model_class(self) -> str:
        return "CLIPModel" if self.kind == "clip" else "SiglipModel"


def mapped(clip: Clip) -> Mapped:
    """The model as `CLIPModel` (open_clip's ViT, CLIP's text tower) or `SiglipModel` (timm's ViT, SigLIP's text tower).

    Raises:
        RunError: A part of it has no place in either; each such part is named.
    """
    visual: Any = clip.model.visual
    kind = "siglip" if isinstance(visual, TimmModel) else "clip"
    misfits = _misfits(clip, kind)
    if misfits:
        raise _does_not_map(clip, misfits)

    try:
        made = _siglip(clip) if kind == "siglip" else _clip(clip)
    except KeyError as error:
        raise _does_not_map(clip, [f"no weights {error}"]) from error
    return made


def _does_not_map(clip: Clip, misfits: list[str]) -> RunError:
    return RunError(
        f"{clip.name}: transformers has no model of these parts: {'; '.join(misfits[:4])}.",
        fix="Nothing is written. A ViT of open_clip with CLIP's text tower maps to CLIPModel, a ViT of timm with"
        " SigLIP's text tower to SiglipModel; for others use the open_clip folder, or --onnx.",
    )


def _misfits(clip: Clip, kind: str) -> list[str]:
    """What the configuration says of parts that the classes of transformers do not have."""
    model: Any = clip.model
    if type(model) not in (CLIP, CustomTextCLIP):
        return [f"a {type(model).__name__}"]

    vision_cfg, text_cfg = clip.model_cfg["vision_cfg"], clip.model_cfg["text_cfg"]
    misfits = _timm_misfits(model.visual, vision_cfg) if kind == "siglip" else _vit_misfits(model.visual, vision_cfg)
    if text_cfg.get("hf_model_name"):
        misfits.append(f"text tower {text_cfg['hf_model_name']} (text_cfg.hf_model_name)")
    else:
        allowed = _SIGLIP_TEXT if kind == "siglip" else _CLIP_TEXT
        misfits += _other_than(text_cfg, "text_cfg", CLIPTextCfg, _TEXT | _TOKENIZER, allowed)
    if kind == "clip" and getattr(model, "logit_bias", None) is not None:
        misfits.append("logit_bias (CLIPModel has none)")
    return misfits + _tokenizer_misfits(clip) + _preprocess_misfits(clip.preprocess_cfg)


def _vit_misfits(visual: Any, vision_cfg: Mapping[str, Any]) -> list[str]:
    if not isinstance(visual, VisionTransformer):
        return [f"image tower {type(visual).__name__}"]
    return _other_than(vision_cfg, "vision_cfg", CLIPVisionCfg, _VISION, {})


def _timm_misfits(visual: Any, vision_cfg: Mapping[str, Any]) -> list[str]:
    name, trunk = vision_cfg["timm_model_name"], visual.trunk
    if not isinstance(trunk, TimmVisionTransformer):
        return [f"image tower {name} of timm"]
    misfits: list[str] = []
    if trunk.global_pool != "map":
        misfits.append(f"pooling {trunk.global_pool} of {name} (SiglipModel pools by attention: timm_pool map)")
    if len(visual.head):
        misfits.append(f"a projection behind {name} (SiglipModel has none: timm_proj none)")
    return misfits


def _other_than(
    cfg: Mapping[str, Any],
    where: str,
    kind: type[CLIPVisionCfg] | type[CLIPTextCfg],
    free: set[str],
    allowed: Mapping[str, tuple[Any, ...]],
) -> list[str]:
    """The settings of a tower that are neither free, nor without effect, nor as transformers has them built in."""
    whole = kind(**cfg)
    misfits = [
        f"{where}.{name} {value}"
        for part in fields(kind)
        if (name := part.name) not in free | _OF_BOTH | _WITHOUT_EFFECT
        and (value := getattr(whole, name)) not in allowed.get(name, (part.default,))
    ]
    known = {"act_kwargs": {"approximate"}, "norm_kwargs": {"eps"}}
    return misfits + [
        f"{where}.{name} {sorted(unknown)}"
        for name, names in known.items()
        if (unknown := set(getattr(whole, name) or {}) - names)
    ]


def _tokenizer_misfits(clip: Clip) -> list[str]:
    tokenizer: Any = clip.tokenizer
    if isinstance(tokenizer, SimpleTokenizer):
        misfits = ["a tokenizer that drops words (reduction_mask)"] if tokenizer.reduction_fn is not None else []
        if len(tokenizer.all_special_ids) > 2:
            misfits.append("a tokenizer with tokens of its own (additional_special_tokens)")
        return misfits
    misfits = ["text_cfg.tokenizer_mode"] if tokenizer.tokenizer_mode else []
    if tokenizer.strip_sep_token:
        misfits.append("text_cfg.tokenizer_kwargs.strip_sep_token")
    if not hasattr(tokenizer.tokenizer, "backend_tokenizer"):
        misfits.append(f"tokenizer {type(tokenizer.tokenizer).__name__}, not of the library `tokenizers`")
    if clip.model_cfg["text_cfg"].get("pool_type") == "eos" and clip.model_cfg["text_cfg"].get("eos_id", 2) == _ARGMAX:
        misfits.append(f"text_cfg.eos_id {_ARGMAX} (CLIPModel takes it for the highest token)")
    return misfits


def _preprocess_misfits(preprocess_cfg: Mapping[str, Any]) -> list[str]:
    size, mode = preprocess_cfg["size"], preprocess_cfg["resize_mode"]
    misfits = [f"images of {' x '.join(map(str, size))}"] if not isinstance(size, int) and len(set(size)) > 1 else []
    return misfits + ([f"resize_mode {mode}"] if mode not in ("shortest", "squash") else [])


def _clip(clip: Clip) -> Mapped:
    model: Any = clip.model
    state = _State(model)
    vision, text = _vit(model.visual, state), _text(clip, state)
    weights: dict[str, Tensor] = {
        "logit_scale": state.take("logit_scale").reshape(()),
        "visual_projection.weight": state.take("visual.proj").T,
        "text_projection.weight": state.take(f"{_text_prefix(model)}text_projection").T,
        **vision.weights,
        **text.weights,
    }
    state.refuse_left(clip)
    text_config = {**text.config, "projection_dim": clip.dim, "eos_token_id": _eos(clip)}
    config = {
        "vision_config": {**vision.config, "projection_dim": clip.dim},
        "text_config": text_config,
        "projection_dim": clip.dim,
    }
    return Mapped("clip", config, weights)


def _siglip(clip: Clip) -> Mapped:
    model: Any = clip.model
    state = _State(model)
    vision, text = _timm_vit(model.visual.trunk, state), _text(clip, state)
    bias = getattr(model, "logit_bias", None)
    head = f"{_text_prefix(model)}text_projection"
    weights: dict[str, Tensor] = {
        "logit_scale": state.take("logit_scale").reshape(1),
        "logit_bias": torch.zeros(1) if bias is None else state.take("logit_bias").reshape(1),
        "text_model.head.weight": state.take(f"{head}.weight"),
        "text_model.head.bias": state.take(f"{head}.bias"),
        **vision.weights,
        **text.weights,
    }
    state.refuse_left(clip)
    config = {"vision_config": vision.config, "text_config": {**text.config, "projection_size": clip.dim}}
    return Mapped("siglip", config, weights)


class _State:
    """The weights of a model, each taken once."""

    def __init__(self, model: nn.Module) -> None:
        self._left = {name: value.detach() for name, value in model.state_dict().items()}

    def take(self, name: str) -> Tensor:
        return self._left.pop(name)

    def refuse_left(self, clip: Clip) -> None:
        """Refuse weights that have no place."""
        parts = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in self._left)
        if parts:
            raise _does_not_map(clip, [f"weights {name}" for name in parts])


class _Tower(NamedTuple):
    config: dict[str, Any]
    weights: dict[str, Tensor]


def _vit(visual: Any, state: _State) -> _Tower:
    resblocks, place = visual.transformer.resblocks, "vision_model"
    weights = {
        f"{place}.embeddings.class_embedding": state.take("visual.class_embedding"),
        f"{place}.embeddings.patch_embedding.weight": state.take("visual.conv1.weight"),
        f"{place}.embeddings.position_embedding.weight": state.take("visual.positional_embedding"),
        **_pair(state, "visual.ln_pre", f"{place}.pre_layrnorm"),  # transformers spells it so
        **_pair(state, "visual.ln_post", f"{place}.post_layernorm"),
    }
    for layer in range(len(resblocks)):
        weights |= _resblock(state, f"visual.transformer.resblocks.{layer}", f"{place}.encoder.layers.{layer}")
    config = {"image_size": visual.image_size[0], "patch_size": visual.patch_size[0], **_sizes(resblocks)}
    return _Tower(config, weights)


def _text(clip: Clip, state: _State) -> _Tower:
    model: Any = clip.model
    prefix, text, place = _text_prefix(model), getattr(model, "text", model), "text_model"
    resblocks = text.transformer.resblocks
    positions = state.take(f"{prefix}positional_embedding")
    weights = {
        f"{place}.embeddings.token_embedding.weight": state.take(f"{prefix}token_embedding.weight"),
        f"{place}.embeddings.position_embedding.weight": positions,
        **_pair(state, f"{prefix}ln_final", f"{place}.final_layer_norm"),
    }
    for layer in range(len(resblocks)):
        weights |= _resblock(state, f"{prefix}transformer.resblocks.{layer}", f"{place}.encoder.layers.{layer}")
    sizes = {"vocab_size": int(text.vocab_size), "max_position_embeddings": len(positions), **_sizes(resblocks)}
    return _Tower({**sizes, "bos_token_id": None, "pad_token_id": None, "eos_token_id": None}, weights)


def _timm_vit(trunk: Any, state: _State) -> _Tower:
    source, place = "visual.trunk", "vision_model"
    weights = {
        **_pair(state, f"{source}.patch_embed.proj", f"{place}.embeddings.patch_embedding"),
        f"{place}.embeddings.position_embedding.weight": state.take(f"{source}.pos_embed")[0],
        **_pair(state, f"{source}.norm", f"{place}.post_layernorm"),
        f"{place}.head.probe": state.take(f"{source}.attn_pool.latent"),
        **_pair(state, f"{source}.attn_pool.proj", f"{place}.head.attention.out_proj"),
        **_pair(state, f"{source}.attn_pool.norm", f"{place}.head.layernorm"),
        **_pair(state, f"{source}.attn_pool.mlp.fc1", f"{place}.head.mlp.fc1"),
        **_pair(state, f"{source}.attn_pool.mlp.fc2", f"{place}.head.mlp.fc2"),
    }
    for kind in ("weight", "bias"):
        parts = [state.take(f"{source}.attn_pool.{name}.{kind}") for name in ("q", "kv")]
        weights[f"{place}.head.attention.in_proj_{kind}"] = torch.cat(parts)

    for layer in range(len(trunk.blocks)):
        old, new = f"{source}.blocks.{layer}", f"{place}.encoder.layers.{layer}"
        names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
        for name, theirs in (names | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
            weights |= _pair(state, f"{old}.{name}", f"{new}.{theirs}")
        weights |= _split(new, {kind: state.take(f"{old}.attn.qkv.{kind}") for kind in ("weight", "bias")})

    block = trunk.blocks[0]
    config = {
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_size": int(trunk.embed_dim),
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }
    return _Tower(config, weights)


def _resblock(state: _State, old: str, new: str) -> dict[str, Tensor]:
    """A block of open_clip's transformers as a layer of transformers' encoders."""
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    weights: dict[str, Tensor] = {}
    for name, theirs in names.items():
        weights |= _pair(state, f"{old}.{name}", f"{new}.{theirs}")
    return weights | _split(new, {kind: state.take(f"{old}.attn.in_proj_{kind}") for kind in ("weight", "bias")})


def _split(layer: str, joined: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values, which open_clip and timm keep in one matrix."""
    return {
        f"{layer}.self_attn.{name}_proj.{kind}": part
        for kind, values in joined.items()
        for name, part in zip("qkv", values.chunk(3), strict=True)
    }


def _pair(state: _State, old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.{kind}": state.take(f"{old}.{kind}") for kind in ("weight", "bias")}


def _sizes(resblocks: Any) -> dict[str, Any]:
    block = resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
    }


def _activation(module: nn.Module) -> str:
    """The name that transformers has for it."""
    names: list[tuple[Callable[[Any], bool], str]] = [
        (lambda one: isinstance(one, QuickGELU | timm.layers.QuickGELU), "quick_gelu"),
        (lambda one: isinstance(one, timm.layers.GELUTanh), "gelu_pytorch_tanh"),
        (lambda one: isinstance(one, nn.GELU) and one.approximate == "tanh", "gelu_pytorch_tanh"),
        (lambda one: isinstance(one, nn.GELU | timm.layers.GELU), "gelu"),
    ]
    for holds, name in names:
        if holds(module):
            return name
    raise KeyError(f"for the activation {type(module).__name__}")


def _text_prefix(model: Any) -> str:
    return "text." if isinstance(model, CustomTextCLIP) else ""


def _eos(clip: Clip) -> int:
    """The token at which `CLIPModel` pools."""
    if isinstance(clip.tokenizer, SimpleTokenizer):
        return clip.tokenizer.eot_token_id
    text_cfg = clip.model_cfg["text_cfg"]
    return text_cfg.get("eos_id", 2) if text_cfg.get("pool_type") == "eos" else _ARGMAX
