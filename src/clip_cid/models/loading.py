"""Load CLIP models with their trained weights, or fail.

When open_clip finds no weights, it logs a warning and continues with random ones. Here that is an error.
"""

from pathlib import Path
from typing import Any

import open_clip
import torch

from clip_cid import log
from clip_cid.errors import ConfigError, DataError
from clip_cid.models.architectures import (
    architecture,
    no_such_model,
    own_configs,
    random_model,
    read_config,
    tokenizer_of,
)
from clip_cid.models.clip import Clip, assemble, refuse_misfit
from clip_cid.models.device import resolve_device
from clip_cid.models.open_clip_errors import LOADING_ERRORS, clean_name, missing_package, one_line, open_clip_warnings
from clip_cid.models.references import CONFIG_FILE, HUB, LOCAL, RUN, WEIGHTS_FILE, is_checkpoint, split_checkpoint
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import DISTILL

NEEDS_ARCHITECTURE = (
    "Give NAME/FILE, or the architecture as embed.teacher (such as ViT-B-32) and the file as embed.pretrained."
)


def load_clip(reference: str, *, device: str = "cpu") -> Clip:
    """A trained model, ready for inference.

    Args:
        reference: `run:PATH` (the student of a finished run), `local-dir:PATH`, `hf-hub:ORG/NAME`, `NAME/TAG` of
            open_clip, or `NAME/FILE` with a checkpoint.
        device: As in `machine.device`.

    Raises:
        ConfigError: No such model or tag, or one whose sizes do not fit each other.
        RunError: The run has not finished its distill stage.
        DataError: The weights are missing, broken, of another architecture, or not finite.
    """
    target = resolve_device(device)

    if reference.startswith((RUN, LOCAL)):
        clip = _load_folder(_folder_of(reference), reference)
    elif reference.startswith(HUB):
        clip = _load_hub(reference)
    elif is_checkpoint(reference):
        name, path = _checkpoint(reference)
        clip = load_checkpoint(name, architecture(name)[0], path)
    else:
        clip = _load_tag(reference)

    _check_finite(clip)
    clip.model.to(target).eval()
    if reference.startswith((RUN, LOCAL)):  # of a configuration that open_clip does not know
        refuse_misfit(clip)
    return clip


def load_checkpoint(name: str, model_cfg: dict[str, Any], path: Path) -> Clip:
    """A model with the weights of a checkpoint: one of open_clip's training, or its `state_dict` alone.

    It is read without running any code in it.

    Args:
        name: Of the architecture: open_clip's, one of ours, or the path of a JSON file.
        model_cfg: Of the architecture.
        path: The file.

    Raises:
        ConfigError: open_clip cannot build the architecture.
        DataError: The file is missing, not a checkpoint, or of another architecture.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint.", fix="Give the file that open_clip's training wrote.")
    with open_clip_warnings():
        try:
            model: Any = random_model(model_cfg, architecture(name)[1], seed=0)
            clip = assemble(model, model_cfg, tokenizer_of(name, model_cfg), f"{name}/{path}")
            open_clip.load_checkpoint(model, str(path), weights_only=True)
        except ImportError as error:
            raise missing_package(name, error) from error
        except (StopIteration, *LOADING_ERRORS) as error:
            raise DataError(
                f"{path}: not the weights of a {name} ({one_line(error)}).",
                fix="Name the architecture that it was trained with. It must hold tensors only, or a training's"
                " `state_dict`; export a TorchScript archive to one first.",
            ) from error
    _check_finite(clip)
    return clip


def known_architecture(reference: str) -> dict[str, Any] | None:
    """The `model_cfg` of a model that `load_clip` would load; None if it would have to be fetched.

    Raises:
        ConfigError: No such model.
        RunError: The run has not finished its distill stage.
        DataError: The folder is no exported model.
    """
    if reference.startswith(HUB):
        return None
    if reference.startswith((RUN, LOCAL)):
        return _folder_architecture(_folder_of(reference))
    if is_checkpoint(reference):
        return architecture(_checkpoint(reference)[0])[0]
    return _tag_architecture(reference)


def _folder_of(reference: str) -> Path:
    if reference.startswith(RUN):
        return RunFolder(Path(reference.removeprefix(RUN))).stage(DISTILL) / "student"
    return Path(reference.removeprefix(LOCAL))


def _checkpoint(reference: str) -> tuple[str, Path]:
    """Architecture and file of `NAME/FILE`."""
    if (split := split_checkpoint(reference)) is None:
        raise DataError(
            f"{reference}: no NAME/FILE with a checkpoint that is there.",
            fix=NEEDS_ARCHITECTURE,
        )
    return split


def _folder_architecture(path: Path) -> dict[str, Any]:
    if path.is_file() and is_checkpoint(path.name):
        raise ConfigError(f"{path}: a checkpoint does not say its architecture.", fix=NEEDS_ARCHITECTURE)
    if not (path / CONFIG_FILE).is_file():
        raise DataError(
            f"{path}: no {CONFIG_FILE} here, so this is not an exported model.",
            fix=f"Give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as `clip-cid export` writes it.",
        )
    return read_config(path / CONFIG_FILE)[0]


def _load_folder(path: Path, reference: str) -> Clip:
    fix = f"The folder needs a whole {WEIGHTS_FILE}; export it again."
    return _load(f"{LOCAL}{path}", _folder_architecture(path), reference, fix=fix)


def _load_hub(reference: str) -> Clip:
    fix = "Check the name on the Hub and the network; without one, a model must be in the cache of huggingface_hub."
    try:
        with open_clip_warnings():
            model_cfg = open_clip.get_model_config(reference)
    except LOADING_ERRORS as error:
        raise DataError(f"{reference}: its configuration could not be fetched ({one_line(error)}).", fix=fix) from error
    if model_cfg is None or "embed_dim" not in model_cfg:
        raise DataError(f"{reference}: this is not an open_clip model (no model_cfg).", fix=fix)
    return _load(reference, model_cfg, reference, fix=fix)


def _load_tag(reference: str) -> Clip:
    model_cfg = _tag_architecture(reference)
    name, _, tag = reference.rpartition("/")
    fix = "Check the network; the weights are downloaded once and then kept in the cache of huggingface_hub."
    return _load(
        clean_name(name), model_cfg, reference, fix=fix, pretrained=tag, quick_gelu=bool(model_cfg["quick_gelu"])
    )


def _tag_architecture(reference: str) -> dict[str, Any]:
    """The `model_cfg` of weights that open_clip knows, with the activation they were trained with."""
    name, _, tag = reference.rpartition("/")
    model_cfg = open_clip.get_model_config(clean_name(name)) if name else None
    if model_cfg is None:
        if not name and (clean_name(tag) in open_clip.list_models() or tag in own_configs()):
            raise ConfigError(
                f"{reference}: this names an architecture, not trained weights.",
                fix="Give NAME/TAG, run:PATH, local-dir:PATH or hf-hub:ORG/NAME.",
            )
        raise no_such_model(name or tag)

    known = open_clip.get_pretrained_cfg(clean_name(name), tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(clean_name(name))
        raise ConfigError(f"{name} has no weights named {tag!r}.", fix=f"There are {', '.join(tags) or 'none'}.")

    quick_gelu = bool(known.get("quick_gelu", False))
    if quick_gelu != bool(model_cfg.get("quick_gelu", False)):
        # open_clip only warns, and accuracy drops by some points.
        log.info(f"{reference}: these weights were trained with quick_gelu {quick_gelu}; the model is built so")
    return {**model_cfg, "quick_gelu": quick_gelu}


def _load(source: str, model_cfg: dict[str, Any], reference: str, *, fix: str, **options: Any) -> Clip:
    """Let open_clip build `source` and insist on its weights."""
    with open_clip_warnings() as logged:
        try:
            model = open_clip.create_model_from_pretrained(source, return_transform=False, **options)
            tokenizer = open_clip.get_tokenizer(source)
            return assemble(model, model_cfg, tokenizer, reference)
        except ImportError as error:
            raise missing_package(reference, error) from error
        except LOADING_ERRORS as error:
            reason = one_line(error)
            # open_clip only logs why there are no weights; what it also raises is not repeated.
            reason += "".join(f"; {one_line(line)}" for line in logged if line[:60] not in reason)
            raise DataError(f"{reference}: its weights could not be loaded ({reason}).", fix=fix) from error


def _check_finite(clip: Clip) -> None:
    for key, tensor in clip.model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DataError(
                f"{clip.name}: {bad:,} of {tensor.numel():,} numbers of {key} are not finite.",
                fix="The file is damaged or the training diverged; use other weights.",
            )
