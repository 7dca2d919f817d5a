"""How references to models begin, and the files behind one. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any

from clip_cid.stage_names import DISTILL

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
RUN, LOCAL, HUB = "run:", "local-dir:", "hf-hub:"

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_TYPES = (*_WEIGHTS, ".json", ".txt", ".model", ".jinja")
"""What open_clip and transformers read: weights, configuration, tokenizer."""
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def files_behind_model(reference: str) -> list[Path]:
    """The files on this machine that decide what a model computes, sorted: weights, configuration and tokenizer.

    None for a model that open_clip or the Hub names, or for a folder that does not exist.
    """
    if (split := split_checkpoint(reference)) is not None:
        architecture, checkpoint = split
        config = Path(architecture)
        return sorted([checkpoint, config] if config.suffix == ".json" and config.is_file() else [checkpoint])
    folder = _folder_of(reference)
    if folder is None or not folder.is_dir():
        return []
    return sorted(_model_files(folder) + _text_tower_files(folder / CONFIG_FILE))


def files_beside_weights(reference: str) -> list[Path]:
    """Those of `files_behind_model` that neither the weights nor `model_cfg` and `preprocess_cfg` hold: the tokenizer's."""
    files = [] if split_checkpoint(reference) else files_behind_model(reference)
    return [path for path in files if path.suffix not in _WEIGHTS and path.name != CONFIG_FILE]


def is_of_files(reference: str) -> bool:
    """Whether a reference to a model stands for files of this machine, also if these are not here now."""
    return reference.startswith((RUN, LOCAL)) or is_checkpoint(reference)


def is_checkpoint(name: str) -> bool:
    """Whether this is the name of a file of weights, such as open_clip's training writes, and not a tag."""
    return name.lower().endswith(_CHECKPOINTS)


def split_checkpoint(reference: str) -> tuple[str, Path] | None:
    """Architecture and file of `NAME/FILE`, such as `ViT-B-32//data/epoch_32.pt`; None if it names no file."""
    if not is_checkpoint(reference) or reference.startswith((RUN, LOCAL, HUB)) or Path(reference).is_file():
        return None
    slashes = [place for place, letter in enumerate(reference) if letter == "/" and place]
    splits = ((reference[:place], Path(reference[place + 1 :]).expanduser()) for place in slashes)
    return next(((name, path) for name, path in splits if path.is_file()), None)


def _folder_of(reference: str) -> Path | None:
    if reference.startswith(RUN):
        return Path(reference.removeprefix(RUN)) / DISTILL / "student"
    return Path(reference.removeprefix(LOCAL)) if reference.startswith(LOCAL) else None


def _model_files(folder: Path) -> list[Path]:
    return [
        path for path in folder.iterdir() if path.suffix in _TYPES and not path.name.startswith(".") and path.is_file()
    ]


def _text_tower_files(config: Path) -> list[Path]:
    """The configuration of a text tower of transformers that lies in a folder of its own."""
    try:
        values: Any = json.loads(config.read_text(encoding="utf-8"))
        tower = Path(values["model_cfg"]["text_cfg"]["hf_model_name"])
        return [tower / "config.json"] if (tower / "config.json").is_file() else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
