"""Students: models to train, with fresh weights or weights to start from."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from clip_cid.errors import ConfigError
from clip_cid.models.architectures import architecture, own_configs, random_model
from clip_cid.models.clip import Clip, assemble
from clip_cid.models.loading import load_clip
from clip_cid.models.open_clip_errors import LOADING_ERRORS, clean_name, missing_package, one_line
from clip_cid.models.references import CONFIG_FILE, HUB, LOCAL, RUN


def build_student(
    name: str, *, embed_dim: int | None, pretrained: str | None = None, seed: int = 0, with_bias: bool = False
) -> Clip:
    """A model to train, on the CPU.

    Args:
        name: A model of open_clip, one of clip_cid's own (`cid-tiny`, `cid-small`), or the path of a JSON file with
            open_clip's `model_cfg`, alone or beside a `preprocess_cfg`.
        embed_dim: Overrides the configuration's width, to meet the teacher in its own space (`alignment: native`).
        pretrained: Start from this open_clip tag or exported student instead of random weights.
        seed: Equal seeds give equal weights.
        with_bias: A sigmoid loss needs a logit bias; a fresh model without one gets it, with SigLIP's first scale.

    Raises:
        ConfigError: No such model, a configuration open_clip cannot build, or weights of another shape or without the
            bias.
        DataError: The weights could not be loaded.
    """
    model_cfg, preprocess_cfg = architecture(name)
    if embed_dim is not None:
        model_cfg["embed_dim"] = embed_dim
    if with_bias and pretrained is None:
        model_cfg = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0, **model_cfg}

    if pretrained is not None:
        clip = _pretrained_student(name, model_cfg, pretrained)
    else:
        clip = _fresh_student(name, model_cfg, preprocess_cfg, seed)

    if with_bias and getattr(clip.model, "logit_bias", None) is None:
        raise ConfigError(
            f"distill.pretrained: {pretrained} has no logit bias, which the sigmoid loss needs.",
            fix="Start from a SigLIP-type model, or set distill.weights.siglip: 0.",
        )
    clip.model.train()
    return clip


def _fresh_student(name: str, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], seed: int) -> Clip:
    try:
        model = random_model(model_cfg, preprocess_cfg, seed)
        return assemble(model, model_cfg, _tokenizer(name, model_cfg), name)
    except ImportError as error:
        raise missing_package(name, error) from error
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"{name}: open_clip cannot build this model ({one_line(error)}).",
            fix="Compare its model_cfg with one of open_clip's own configurations.",
        ) from error


def _tokenizer(name: str, model_cfg: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a model that is not loaded from a folder, chosen as open_clip chooses."""
    text_cfg = model_cfg["text_cfg"]
    if not name.endswith(".json") and name not in own_configs():
        return open_clip.get_tokenizer(clean_name(name))

    length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs", {})
    if source := text_cfg.get("hf_tokenizer_name"):
        mode = text_cfg.get("tokenizer_mode")
        return HFTokenizer(source, context_length=length, tokenizer_mode=mode, **options)
    return SimpleTokenizer(context_length=length, **options)


def _pretrained_student(name: str, model_cfg: dict[str, Any], pretrained: str) -> Clip:
    """The model with its weights, whose architecture must be `model_cfg`."""
    folder = Path(pretrained.removeprefix(LOCAL))
    if (folder / CONFIG_FILE).is_file():
        clip = load_clip(f"{LOCAL}{folder}")
    elif pretrained.startswith((RUN, HUB)):
        clip = load_clip(pretrained)
    elif "/" in pretrained or clean_name(name) not in open_clip.list_models():
        raise ConfigError(
            f"distill.pretrained: {pretrained} is not the folder of an exported student, nor weights known for {name}.",
            fix=f"Give a folder with {CONFIG_FILE}, run:PATH, hf-hub:ORG/NAME, or an open_clip tag of an"
            " open_clip model.",
        )
    else:
        clip = load_clip(f"{name}/{pretrained}")
        # The activation belongs to the weights; everything else must be as the recipe says.
        model_cfg = {**model_cfg, "quick_gelu": clip.model_cfg.get("quick_gelu", False)}

    # The weights replace what starts with `init_`.
    keys = sorted(key for key in {*model_cfg, *clip.model_cfg} if not key.startswith("init_"))
    different = [key for key in keys if model_cfg.get(key) != clip.model_cfg.get(key)]
    if different:
        listed = ", ".join(f"{key} {model_cfg.get(key)} but {clip.model_cfg.get(key)}" for key in different)
        raise ConfigError(
            f"distill.pretrained: {pretrained} is not a {name}: {listed}.",
            fix="Set distill.alignment: linear to keep the width of the weights, or drop distill.pretrained."
            if different == ["embed_dim"]
            else "Give weights of the same architecture, or drop distill.pretrained.",
        )
    return dataclasses.replace(clip, name=name)
