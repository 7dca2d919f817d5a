"""Architectures by name or JSON file, and models of them with random weights or none."""

import difflib
import json
import os
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from clip_cid.errors import ConfigError
from clip_cid.models.open_clip_errors import LOADING_ERRORS, clean_name, open_clip_warnings
from clip_cid.models.references import CONFIG_FILE, LOCAL

_TOWERS = ("hf_model_name", "hf_tokenizer_name")


def build_skeleton(model_cfg: dict[str, Any]) -> torch.nn.Module | None:
    """A model without weights (on PyTorch's meta device), to be counted; None if open_clip cannot build it so.

    A text tower of transformers is None, too: open_clip would fetch its configuration.
    """
    if "hf_model_name" in model_cfg["text_cfg"]:
        return None
    try:
        return random_model(model_cfg, {}, 0, device="meta")
    except (ImportError, NotImplementedError, *LOADING_ERRORS):
        return None


def own_configs() -> list[str]:
    """Names of the configurations that come with clip_cid."""
    folder = resources.files("clip_cid.models") / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def architecture(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` (may be empty) of a name or a JSON path."""
    if name.endswith(".json"):
        return read_config(Path(name))
    if name in own_configs():
        text = (resources.files("clip_cid.models") / "configs" / f"{name}.json").read_text(encoding="utf-8")
        return _split_config(json.loads(text), name)

    model_cfg = open_clip.get_model_config(clean_name(name)) if ":" not in name else None
    if model_cfg is None:
        raise no_such_model(name)
    return model_cfg, {}


def tokenizer_of(name: str, model_cfg: dict[str, Any]) -> Callable[[list[str]], Tensor]:
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


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` (may be empty) of a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot read this model configuration ({error}).", fix="Give the path of a JSON file."
        ) from error
    return _split_config(_with_absolute_towers(values), str(path))


def _with_absolute_towers(values: Any) -> Any:
    """A text tower or tokenizer in a folder here by its absolute path, so that it is found from any other folder."""
    if isinstance(values, dict):
        return {
            key: _absolute(value) if key in _TOWERS else _with_absolute_towers(value) for key, value in values.items()
        }
    return values


def _absolute(name: Any) -> Any:
    return os.path.abspath(name) if isinstance(name, str) and Path(name).is_dir() else name


def _split_config(values: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accepts a bare `model_cfg`, or one beside a `preprocess_cfg` as in open_clip_config.json."""
    wrapped = isinstance(values, dict) and "model_cfg" in values
    model_cfg = values["model_cfg"] if wrapped else values
    preprocess_cfg = values.get("preprocess_cfg", {}) if wrapped else {}

    needed = ("embed_dim", "vision_cfg", "text_cfg")
    missing = [key for key in needed if not isinstance(model_cfg, dict) or key not in model_cfg]
    if missing or not isinstance(preprocess_cfg, dict):
        raise ConfigError(
            f"{where}: not a model configuration;"
            f" {', '.join(missing) or 'preprocess_cfg'} is missing or not an object.",
            fix=f"It needs {', '.join(needed)}, as in open_clip's own configurations.",
        )
    return model_cfg, preprocess_cfg


def no_such_model(name: str) -> ConfigError:
    known = [*own_configs(), *open_clip.list_models()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return ConfigError(
        f"No model is named {name!r}.",
        fix=f"Did you mean {' or '.join(near)}?" if near else f"open_clip has {len(known)}, such as ViT-B-32.",
    )


def random_model(
    model_cfg: dict[str, Any],
    preprocess_cfg: dict[str, Any],
    seed: int,
    device: str = "cpu",
    *,
    pretrained_text: bool = False,
) -> torch.nn.Module:
    """A model with random weights: open_clip makes one of a folder with a configuration and no weights.

    Args:
        model_cfg: As `architecture` gives it.
        preprocess_cfg: Likewise.
        seed: Equal seeds give equal weights.
        device: Where it is made.
        pretrained_text: Whether a text tower of transformers gets the weights of the model it is named after.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        open_clip_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        torch.default_generator.manual_seed(seed)
        with torch.device(device):
            return open_clip.create_model(f"{LOCAL}{folder}", pretrained_text=pretrained_text, device=device)
