"""The settings of a run for publication, without the folders and hosts of the machine it ran on."""

import re
from typing import Any

import open_clip

_LOCAL_SCHEMES = ("run:", "local-dir:")
_ONLY_HERE = ("machine", "draw", "report")  # recipe sections that decide nothing about the student
_UNKNOWN = "unknown"


def public_name(value: str) -> str:
    """A setting that may name a file, cut to its last part.

    `hf-hub:` references and names open_clip itself knows are public and stay. An address also loses its user, password
    and query; a command behind `pipe:` is left out. Text without a slash stays as it is.
    """
    if value.startswith("pipe:"):
        return "pipe:..."
    for scheme in _LOCAL_SCHEMES:
        if value.startswith(scheme):
            return scheme + _last_part(value.removeprefix(scheme))
    return value if _is_public(value) else _last_part(value)


def public_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    """The `clip_cid` block of an exported student without local names (docs/export.md).

    The teacher keeps its name, its weights' digest and its precision.
    """
    public = dict(provenance)
    if "recipe" in provenance:
        sections = {name: values for name, values in provenance["recipe"].items() if name not in _ONLY_HERE}
        public["recipe"] = _public(sections)
    teacher = provenance.get("teacher")
    if teacher is not None:
        kept = {key: teacher[key] for key in ("weights_sha256", "precision") if key in teacher}
        public["teacher"] = {"reference": _teacher_name(teacher["reference"]), **kept}
    return public


def local_names(model_cfg: Any) -> list[str]:
    """Strings of a model's configuration that name files of this machine."""
    if isinstance(model_cfg, str):
        return [model_cfg] if re.match(r"[/~.]", model_cfg) else []
    values = model_cfg.values() if isinstance(model_cfg, dict) else model_cfg if isinstance(model_cfg, list) else ()
    return [name for value in values for name in local_names(value)]


def _public(value: Any) -> Any:
    """Every string in nested settings through `public_name`; the keys are names the user chose."""
    if isinstance(value, dict):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def _teacher_name(reference: str) -> str:
    """Embeddings made elsewhere name no teacher, only the folder they came from."""
    return _UNKNOWN if reference.startswith(_UNKNOWN) else public_name(reference)


def _is_public(value: str) -> bool:
    if re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+", value):
        return True
    name, _, tag = value.replace("/", "-", value.count("/") - 1).rpartition("/")  # `ViT-B/32` is also `ViT-B-32`
    return (name, tag) in open_clip.list_pretrained() or value.replace("/", "-") in open_clip.list_models()


def _last_part(value: str) -> str:
    scheme, slashes, rest = value.partition("://")
    if slashes:  # what follows the host, without query and fragment
        value = re.split(r"[?#]", rest)[0].partition("/")[2] or f"{scheme}:"
    return value.rstrip("/").rpartition("/")[2]
