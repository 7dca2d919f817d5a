"""Students: models to train, with fresh weights or weights to start from."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import open_clip

from clip_cid import log
from clip_cid.errors import ConfigError
from clip_cid.models.architectures import architecture, random_model, tokenizer_of
from clip_cid.models.clip import Clip, assemble, refuse_misfit
from clip_cid.models.loading import load_checkpoint, load_clip
from clip_cid.models.open_clip_errors import LOADING_ERRORS, clean_name, missing_package, one_line
from clip_cid.models.references import CONFIG_FILE, HUB, LOCAL, RUN, is_checkpoint
from clip_cid.models.text_tower import NOT_OF_IMAGE, TextTower, ignores_quick_gelu


def build_student(
    name: str,
    *,
    embed_dim: int | None,
    pretrained: str | None = None,
    seed: int = 0,
    with_bias: bool = False,
    text_tower: TextTower | None = None,
    own_scale: bool = True,
) -> Clip:
    """A model to train, on the CPU.

    Args:
        name: A model of open_clip, one of clip_cid's own (`cid-tiny`, `cid-small`), or the path of a JSON file with
            open_clip's `model_cfg`, alone or beside a `preprocess_cfg`.
        embed_dim: Overrides the configuration's width, to meet the teacher in its own space (`alignment: native`).
        pretrained: Start from this open_clip tag or exported student instead of random weights.
        seed: Equal seeds give equal weights. As in open_clip, a text tower of transformers (`hf_model_name`) starts
            from the weights of that name, unless its configuration says `hf_model_pretrained: false`.
        with_bias: A sigmoid loss needs a logit bias; a fresh model without one gets it, with SigLIP's first scale.
        text_tower: Of a teacher, to have instead of one of its own.
        own_scale: Off takes the logit scale (and bias) of that teacher too, fixed.

    Raises:
        ConfigError: No such model, a configuration that open_clip cannot build or whose sizes do not fit each other, or
            weights of another shape or without the bias.
        DataError: The weights could not be loaded.
    """
    model_cfg, preprocess_cfg = architecture(name)
    if embed_dim is not None:
        model_cfg["embed_dim"] = embed_dim
    if with_bias and pretrained is None:
        model_cfg = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0, **model_cfg}

    if pretrained is not None:
        ignored = () if text_tower is None else NOT_OF_IMAGE
        clip = _pretrained_student(name, model_cfg, pretrained, native=embed_dim is not None, ignored=ignored)
    elif text_tower is None:
        clip = _fresh_student(name, model_cfg, preprocess_cfg, seed)
    else:
        clip = _with_text_tower(name, model_cfg, preprocess_cfg, text_tower, seed, own_scale=own_scale)

    if with_bias and getattr(clip.model, "logit_bias", None) is None:
        raise ConfigError(
            f"distill.pretrained: {pretrained} has no logit bias, which the sigmoid loss needs.",
            fix="Start from a SigLIP-type model, or set distill.weights.siglip: 0.",
        )
    if pretrained is not None and text_tower is not None:
        clip = _with_text_tower(
            name, clip.model_cfg, clip.preprocess_cfg, text_tower, seed, own_scale=own_scale, start=clip
        )
    clip.model.train()
    return clip


def _fresh_student(name: str, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], seed: int) -> Clip:
    text_cfg = model_cfg["text_cfg"]
    try:
        with_text = "hf_model_name" in text_cfg and text_cfg.get("hf_model_pretrained", True)
        model = random_model(model_cfg, preprocess_cfg, seed, pretrained_text=with_text)
        if with_text:
            log.info(f"{name}: the text tower starts from the weights of {text_cfg['hf_model_name']}")
        clip = assemble(model, model_cfg, tokenizer_of(name, model_cfg), name)
    except ImportError as error:
        raise missing_package(name, error) from error
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"{name}: open_clip cannot build this model ({one_line(error)}).",
            fix="Compare its model_cfg with one of open_clip's own configurations.",
        ) from error
    refuse_misfit(clip)
    return clip


def _with_text_tower(
    name: str,
    model_cfg: dict[str, Any],
    preprocess_cfg: dict[str, Any],
    tower: TextTower,
    seed: int,
    *,
    own_scale: bool,
    start: Clip | None = None,
) -> Clip:
    """A model with the image tower of `model_cfg`, fresh or that of `start`, and the text tower of another one."""
    joined = tower.model_cfg_beside(model_cfg, loaded=start is not None, own_scale=own_scale)
    changed = joined.get("quick_gelu", False) != model_cfg.get("quick_gelu", False)
    if changed and not ignores_quick_gelu(model_cfg["vision_cfg"]):
        log.info(f"{name}: its image tower has the activation of {tower.reference} (quick_gelu), as open_clip has one")
    try:
        model: Any = random_model(joined, preprocess_cfg, seed)
        if start is not None:
            own = {key: value for key, value in start.model.state_dict().items() if _is_image_towers(key)}
            model.load_state_dict(own, strict=False)
        tower.put_into(model, own_scale=own_scale)
        clip = assemble(model, joined, tower.tokenizer, name)
    except ImportError as error:
        raise missing_package(name, error) from error
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"{name}: open_clip cannot build its image tower beside the text tower of {tower.reference}"
            f" ({one_line(error)}).",
            fix="Compare its model_cfg with one of open_clip's own configurations, or set distill.text_tower: own.",
        ) from error
    refuse_misfit(clip)
    return clip


def _is_image_towers(name: str) -> bool:
    """Whether a weight is the image tower's, or the scale it was trained with."""
    return name.startswith("visual.") or name in ("logit_scale", "logit_bias")


def _pretrained_student(
    name: str, model_cfg: dict[str, Any], pretrained: str, *, native: bool, ignored: Collection[str] = ()
) -> Clip:
    """The model with its weights, whose architecture must be `model_cfg`, but for what is ignored."""
    if is_checkpoint(pretrained):  # which holds no configuration of its own
        return dataclasses.replace(load_checkpoint(name, model_cfg, Path(pretrained).expanduser()), name=name)
    folder = Path(pretrained.removeprefix(LOCAL))
    if (folder / CONFIG_FILE).is_file():
        clip = load_clip(f"{LOCAL}{folder}")
    elif pretrained.startswith((RUN, HUB)):
        clip = load_clip(pretrained)
    elif "/" in pretrained or clean_name(name) not in open_clip.list_models():
        raise ConfigError(
            f"distill.pretrained: {pretrained} is not the folder of an exported student, nor weights known for {name}.",
            fix=f"Give a folder with {CONFIG_FILE}, run:PATH, hf-hub:ORG/NAME, a checkpoint (.pt), or an open_clip tag"
            " of an open_clip model.",
        )
    else:
        clip = load_clip(f"{name}/{pretrained}")
        # The activation belongs to the weights; everything else must be as the recipe says.
        model_cfg = {**model_cfg, "quick_gelu": clip.model_cfg.get("quick_gelu", False)}

    # The weights replace what starts with `init_`.
    keys = sorted(key for key in {*model_cfg, *clip.model_cfg}.difference(ignored) if not key.startswith("init_"))
    different = [key for key in keys if model_cfg.get(key) != clip.model_cfg.get(key)]
    if different:
        listed = ", ".join(f"{key} {model_cfg.get(key)} but {clip.model_cfg.get(key)}" for key in different)
        raise ConfigError(
            f"distill.pretrained: {pretrained} is not a {name}: {listed}.",
            fix=_remedy(different, clip.dim, native=native),
        )
    return dataclasses.replace(clip, name=name)


def _remedy(different: list[str], width: int, *, native: bool) -> str:
    """What to do about weights that differ from the configuration in these parts."""
    if different != ["embed_dim"]:
        return "Give weights of the same architecture, or drop distill.pretrained."
    if native:
        return "Set distill.alignment: linear to keep the width of the weights, or drop distill.pretrained."
    return f"Give a model config in JSON with embed_dim {width} as distill.student, or drop distill.pretrained."
