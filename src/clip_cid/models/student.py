"""CLIP models: built fresh as students, or loaded with weights that really are theirs.

The one place that calls open_clip's factory. open_clip logs a warning and goes on with random weights when it finds
none; here that is an error.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import math
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from clip_cid import log
from clip_cid.errors import ConfigError, DataError
from clip_cid.models.device import resolve_device
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import DISTILL

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_RUN, _LOCAL, _HUB = "run:", "local-dir:", "hf-hub:"
# What open_clip, torch and safetensors raise for a folder that is broken in one way or another.
_LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, AssertionError),
    *(SafetensorError, pickle.UnpicklingError, EOFError),
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A CLIP model with all that is needed to feed it."""

    model: torch.nn.Module
    model_cfg: dict[str, Any]
    """open_clip's constructor arguments; with them the weights alone rebuild the model."""
    preprocess_cfg: dict[str, Any]
    """size, mode, mean, std, interpolation, resize_mode, fill_color, in JSON's types."""
    tokenizer: Callable[[list[str]], Tensor]
    """Captions -> (captions, context length) int64."""
    preprocess: Callable[[Image.Image], Tensor]
    """An RGB image -> (3, height, width) float32, without any chance in it."""
    name: str

    @property
    def image_side(self) -> int:
        """The longer side of the images the model sees; open_clip writes one number for some towers, two for others."""
        size = self.preprocess_cfg["size"]
        return int(size) if isinstance(size, int) else max(size)

    @property
    def dim(self) -> int:
        """Width of its embeddings."""
        return int(self.model_cfg["embed_dim"])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


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
    model_cfg, preprocess_cfg = _architecture(name)
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


def train_transform(
    clip: Clip, *, crop_scale: float, more: Mapping[str, float] | None = None
) -> Callable[[Image.Image], Tensor]:
    """open_clip's training transform: a random crop of at least `crop_scale` of the image's area.

    Args:
        clip: Whose images they are.
        crop_scale: Smallest share.
        more: Others of open_clip's `AugmentationCfg`; of `color_jitter` the strength for brightness, contrast and
            saturation, of which hue gets a quarter.
    """
    options: dict[str, Any] = {"scale": (crop_scale, 1.0), **(more or {})}
    if (strength := options.get("color_jitter")) is not None:
        options["color_jitter"] = (strength, strength, strength, strength / 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unused augmentation")  # said of those that are used, too
        return _transform(clip.preprocess_cfg, is_train=True, aug_cfg=options)


def keep_fewer_activations(clip: Clip) -> None:
    """Have both towers compute their activations again in the backward pass.

    Raises:
        ConfigError: A tower cannot.
    """
    model: Any = clip.model
    with open_clip_warnings() as said:  # of a tower that goes on without
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
            said.append(str(error))
    if isinstance(model.visual, ModifiedResNet):  # which says nothing
        said.append("not supported by ModifiedResNet")
    if said:
        raise ConfigError(
            f"machine.grad_checkpointing: {clip.name} cannot do it ({_one_line(said[0])}).",
            fix="Set it to false; machine.micro_batch saves memory with any student that has no batch normalization.",
        )


def load_clip(reference: str, *, device: str = "cpu") -> Clip:
    """A trained model, ready for inference.

    Args:
        reference: `run:PATH` (the student of a finished run), `local-dir:PATH`, `hf-hub:ORG/NAME`, or `NAME/TAG` of
            open_clip.
        device: As in `machine.device`.

    Raises:
        ConfigError: No such model or tag.
        RunError: The run has not finished its distill stage.
        DataError: The weights are missing, broken, of another architecture, or not finite.
    """
    target = resolve_device(device)
    if reference.startswith((_RUN, _LOCAL)):
        clip = _load_folder(_folder_of(reference), reference)
    elif reference.startswith(_HUB):
        clip = _load_hub(reference)
    else:
        clip = _load_tag(reference)
    _check_finite(clip)
    clip.model.to(target).eval()
    return clip


def known_architecture(reference: str) -> dict[str, Any] | None:
    """The `model_cfg` of a model as `load_clip` names it, of which nothing is fetched; None where that would be needed.

    Raises:
        ConfigError: No such model.
        RunError: The run has not finished its distill stage.
        DataError: The folder is no exported model.
    """
    if reference.startswith(_HUB):
        return None
    if reference.startswith((_RUN, _LOCAL)):
        return _folder_architecture(_folder_of(reference))
    return _tag_architecture(reference)


def build_skeleton(model_cfg: dict[str, Any]) -> torch.nn.Module | None:
    """A model without weights (on PyTorch's meta device), to be counted; None where open_clip cannot build it so.

    A text tower of transformers is None, too: open_clip would fetch its configuration.
    """
    if "hf_model_name" in model_cfg["text_cfg"]:
        return None
    try:
        return _random_model(model_cfg, {}, 0, device="meta")
    except (ImportError, NotImplementedError, *_LOADING_ERRORS):
        return None


def own_configs() -> list[str]:
    """Names of the configurations that come with clip_cid."""
    folder = resources.files("clip_cid.models") / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def _architecture(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` (may be empty) of a name or a JSON path."""
    if name.endswith(".json"):
        return _read_config(Path(name))
    if name in own_configs():
        text = (resources.files("clip_cid.models") / "configs" / f"{name}.json").read_text(encoding="utf-8")
        return _split_config(json.loads(text), name)
    model_cfg = open_clip.get_model_config(_clean(name)) if ":" not in name else None
    if model_cfg is None:
        raise _no_such_model(name)
    return model_cfg, {}


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot read this model configuration ({error}).", fix="Give the path of a JSON file."
        ) from error
    return _split_config(values, str(path))


def _split_config(values: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accepts a bare `model_cfg`, or one beside a `preprocess_cfg` as in open_clip_config.json."""
    wrapped = isinstance(values, dict) and "model_cfg" in values
    model_cfg = values["model_cfg"] if wrapped else values
    preprocess_cfg = values.get("preprocess_cfg", {}) if wrapped else {}
    needed = ("embed_dim", "vision_cfg", "text_cfg")
    missing = [key for key in needed if not isinstance(model_cfg, dict) or key not in model_cfg]
    if missing or not isinstance(preprocess_cfg, dict):
        raise ConfigError(
            f"{where}: not a model configuration; {', '.join(missing) or 'preprocess_cfg'} is missing or not an object.",
            fix=f"It needs {', '.join(needed)}, as in open_clip's own configurations.",
        )
    return model_cfg, preprocess_cfg


def _no_such_model(name: str) -> ConfigError:
    known = [*own_configs(), *open_clip.list_models()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return ConfigError(
        f"No model is named {name!r}.",
        fix=f"Did you mean {' or '.join(near)}?" if near else f"open_clip has {len(known)}, such as ViT-B-32.",
    )


def _fresh_student(name: str, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], seed: int) -> Clip:
    try:
        model = _random_model(model_cfg, preprocess_cfg, seed)
        return _assemble(model, model_cfg, _tokenizer(name, model_cfg), name)
    except ImportError as error:
        raise _missing_package(name, error) from error
    except _LOADING_ERRORS as error:
        raise ConfigError(
            f"{name}: open_clip cannot build this model ({_one_line(error)}).",
            fix="Compare its model_cfg with one of open_clip's own configurations.",
        ) from error


def _missing_package(name: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{name}: this model needs a package that is not installed ({_one_line(error)}).",
        fix=f"pip install {error.name or 'transformers'}",
    )


def _random_model(
    model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], seed: int, device: str = "cpu"
) -> torch.nn.Module:
    """Fresh weights. A folder with a configuration and no weights is open_clip's public way to a model of one's own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_clip_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        torch.default_generator.manual_seed(seed)
        with torch.device(device):
            return open_clip.create_model(f"{_LOCAL}{folder}", pretrained_text=False, device=device)


def _tokenizer(name: str, model_cfg: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a model that is not loaded from a folder, chosen as open_clip chooses."""
    text_cfg = model_cfg["text_cfg"]
    if not name.endswith(".json") and name not in own_configs():
        return open_clip.get_tokenizer(_clean(name))
    length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs", {})
    if source := text_cfg.get("hf_tokenizer_name"):
        mode = text_cfg.get("tokenizer_mode")
        return HFTokenizer(source, context_length=length, tokenizer_mode=mode, **options)
    return SimpleTokenizer(context_length=length, **options)


def _pretrained_student(name: str, model_cfg: dict[str, Any], pretrained: str) -> Clip:
    folder = Path(pretrained.removeprefix(_LOCAL))
    if (folder / CONFIG_FILE).is_file():
        clip = load_clip(f"{_LOCAL}{folder}")
    elif pretrained.startswith((_RUN, _HUB)):
        clip = load_clip(pretrained)
    elif "/" in pretrained or _clean(name) not in open_clip.list_models():
        raise ConfigError(
            f"distill.pretrained: {pretrained} is not the folder of an exported student, nor weights known for {name}.",
            fix=f"Give a folder with {CONFIG_FILE}, run:PATH, hf-hub:ORG/NAME, or an open_clip tag of an open_clip model.",
        )
    else:
        clip = load_clip(f"{name}/{pretrained}")
        # The activation belongs to the weights; everything else must be as asked.
        model_cfg = {**model_cfg, "quick_gelu": clip.model_cfg.get("quick_gelu", False)}
    keys = sorted(
        key for key in {*model_cfg, *clip.model_cfg} if not key.startswith("init_")
    )  # the weights replace these
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


def _folder_of(reference: str) -> Path:
    if reference.startswith(_RUN):
        return RunFolder(Path(reference.removeprefix(_RUN))).stage(DISTILL) / "student"
    return Path(reference.removeprefix(_LOCAL))


def _folder_architecture(path: Path) -> dict[str, Any]:
    if not (path / CONFIG_FILE).is_file():
        raise DataError(
            f"{path}: no {CONFIG_FILE} here, so this is not an exported model.",
            fix=f"Give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as `clip-cid export` writes it.",
        )
    return _read_config(path / CONFIG_FILE)[0]


def _load_folder(path: Path, reference: str) -> Clip:
    fix = f"The folder needs a whole {WEIGHTS_FILE}; export it again."
    return _load(f"{_LOCAL}{path}", _folder_architecture(path), reference, fix=fix)


def _load_hub(reference: str) -> Clip:
    fix = "Check the name on the Hub and the network; without one, a model must be in the cache of huggingface_hub."
    try:
        with open_clip_warnings():
            model_cfg = open_clip.get_model_config(reference)
    except _LOADING_ERRORS as error:
        raise DataError(
            f"{reference}: its configuration could not be fetched ({_one_line(error)}).", fix=fix
        ) from error
    if model_cfg is None or "embed_dim" not in model_cfg:
        raise DataError(f"{reference}: this is not an open_clip model (no model_cfg).", fix=fix)
    return _load(reference, model_cfg, reference, fix=fix)


def _load_tag(reference: str) -> Clip:
    model_cfg = _tag_architecture(reference)
    name, _, tag = reference.rpartition("/")
    fix = "Check the network; the weights are downloaded once and then kept in the cache of huggingface_hub."
    return _load(_clean(name), model_cfg, reference, fix=fix, pretrained=tag, quick_gelu=bool(model_cfg["quick_gelu"]))


def _tag_architecture(reference: str) -> dict[str, Any]:
    """Of weights open_clip knows, with the activation they were trained with."""
    name, _, tag = reference.rpartition("/")
    model_cfg = open_clip.get_model_config(_clean(name)) if name else None
    if model_cfg is None:
        if not name and (_clean(tag) in open_clip.list_models() or tag in own_configs()):
            raise ConfigError(
                f"{reference}: this names an architecture, not trained weights.",
                fix="Give NAME/TAG, run:PATH, local-dir:PATH or hf-hub:ORG/NAME.",
            )
        raise _no_such_model(name or tag)
    known = open_clip.get_pretrained_cfg(_clean(name), tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(_clean(name))
        raise ConfigError(f"{name} has no weights named {tag!r}.", fix=f"There are {', '.join(tags) or 'none'}.")
    quick_gelu = bool(known.get("quick_gelu", False))
    if quick_gelu != bool(model_cfg.get("quick_gelu", False)):
        # open_clip only warns, and accuracy drops by some points.
        log.info(f"{reference}: these weights were trained with quick_gelu {quick_gelu}; the model is built so")
    return {**model_cfg, "quick_gelu": quick_gelu}


def _load(source: str, model_cfg: dict[str, Any], reference: str, *, fix: str, **options: Any) -> Clip:
    """Build `source` by open_clip and insist on its weights."""
    with open_clip_warnings() as said:
        try:
            model = open_clip.create_model_from_pretrained(source, return_transform=False, **options)
            tokenizer = open_clip.get_tokenizer(source)
            return _assemble(model, model_cfg, tokenizer, reference)
        except ImportError as error:
            raise _missing_package(reference, error) from error
        except _LOADING_ERRORS as error:
            reason = _one_line(error)
            # Why there are no weights is only logged; what is also raised is not said twice.
            reason += "".join(f"; {_one_line(line)}" for line in said if line[:60] not in reason)
            raise DataError(f"{reference}: its weights could not be loaded ({reason}).", fix=fix) from error


def _assemble(model: Any, model_cfg: dict[str, Any], tokenizer: Any, name: str) -> Clip:
    text_cfg = model_cfg["text_cfg"]
    words = text_cfg.get("vocab_size", 49408)
    if isinstance(tokenizer, SimpleTokenizer) and "hf_model_name" not in text_cfg and words < tokenizer.vocab_size:
        raise ConfigError(
            f"{name}: text_cfg.vocab_size is {words:,}, but the tokenizer has {tokenizer.vocab_size:,} tokens.",
            fix=f"Set vocab_size to {tokenizer.vocab_size}.",
        )
    preprocess_cfg = json.loads(json.dumps(model.visual.preprocess_cfg))
    preprocess = _transform(preprocess_cfg, is_train=False)
    return Clip(model, json.loads(json.dumps(model_cfg)), preprocess_cfg, tokenizer, preprocess, name)


def _transform(preprocess_cfg: dict[str, Any], **options: Any) -> Any:
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    arguments = {name: preprocess_cfg[name] for name in names}
    return open_clip.image_transform(image_size=preprocess_cfg["size"], **arguments, **options)


def _check_finite(clip: Clip) -> None:
    for key, tensor in clip.model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DataError(
                f"{clip.name}: {bad:,} of {tensor.numel():,} numbers of {key} are not finite.",
                fix="The file is damaged or the training diverged; use other weights.",
            )


def _clean(name: str) -> str:
    """open_clip also knows `ViT-B/32` as `ViT-B-32`."""
    return name.replace("/", "-")


def _one_line(message: object) -> str:
    text = " ".join(str(message).split()) or type(message).__name__
    return text if len(text) <= 300 else text[:300] + "..."


@contextlib.contextmanager
def open_clip_warnings() -> Iterator[list[str]]:
    """Keep what open_clip logs away from the console (it logs to the root logger) and give its warnings to the caller."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if "open_clip" not in Path(record.pathname).parts:
            return True
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())
        return False

    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)  # without any handler, logging.warning would install one for good
    root.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # settled in _load_tag
            yield said
    finally:
        root.removeFilter(keep)
        root.removeHandler(silent)
