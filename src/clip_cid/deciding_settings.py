"""The settings that decide a result, as they are compared.

Three kinds are left out. What does not change a result, such as `distill.log_every`, may change at any time. What
another setting of its section overrules has no effect: `balance.threshold` beside `balance.existing`. And a path
says only where files are: what they hold decides, and is compared by digest.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clip_cid.addresses import is_remote, without_secrets
from clip_cid.loss_table import LOSSES
from clip_cid.overruling import OVERRULINGS
from clip_cid.recipe import Recipe

Settings = Mapping[str, Any]
"""Sections by name, as `Recipe.model_dump(mode="json")` gives them, or some of them."""

DEFAULTS = Recipe().model_dump(mode="json")
OF_FILES = "(its files decide)"
_PATHS = ("run:", "local-dir:", "/", "./", "../", "~")
_FILE_TYPES = (".json", ".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_WITHOUT_EFFECT = {
    "pairs": ("source", "max_bad_share", "keep_fields"),
    "embed": ("existing", "max_bad_share"),
    "balance": ("existing", "decisions", "grow_from"),
    "cluster": ("existing",),
    "distill": ("log_every", "skip_limit"),
}
_ADDED = {
    "pairs": ("captions", "key_field"),
    "embed": ("views", "view_crop_scale", "match"),
    "balance": ("merge_captions", "protect", "against"),
    "cluster": ("texts", "num_text_centers"),
    "distill": (
        "per_cluster",
        "merged_captions",
        "shuffle_window",
        "text_tower",
        "labels",
        "ignore_near",
        "bank_size",
        "bank_scale",
        "weigh_gradients_every",
        "loss_precision",
    ),
}
"""Settings that came after runs were made. At their defaults, which must therefore stay, they change nothing: left
out, unfinished work and checkpoints of a version without them go on."""
_ADDED_LOSSES = (
    "cosine_image",
    "cosine_text",
    "bank_image",
    "bank_text",
    "text_cluster_cls",
    "text_cluster_kl",
    "cross_cluster_image",
    "cross_cluster_text",
)


def deciding(settings: Settings) -> dict[str, Any]:
    """A copy of the sections without what does not decide their results."""
    sections: dict[str, Any] = copy.deepcopy(dict(settings))
    for name, values in sections.items():
        if not isinstance(values, dict):
            continue  # views are a text beside the sections
        _leave_out_added(name, values)
        for setting in (*_overruled(name, values), *_WITHOUT_EFFECT.get(name, ())):
            values.pop(setting, None)
        if name in _PLACES:
            _PLACES[name](values)
    return sections


def _leave_out_added(section: str, values: dict[str, Any]) -> None:
    for setting in _ADDED.get(section, ()):
        if setting in values and values[setting] == DEFAULTS[section][setting]:
            del values[setting]
    weights = values.get("weights")
    if section == "distill" and isinstance(weights, dict):
        for loss in _ADDED_LOSSES:
            if weights.get(loss) == 0:
                del weights[loss]


def _overruled(section: str, values: Settings) -> Iterator[str]:
    """The settings of a section that have no effect, since another one of it overrules them."""
    for overruling in OVERRULINGS:
        of, _, name = overruling.setting.partition(".")
        if of == section and name in values and overruling.overrules(values[name]):
            yield from (other.removeprefix(f"{of}.") for other in overruling.overruled)


def is_local(reference: Any) -> bool:
    """Whether a model is named by a path: its files are compared, and not its name."""
    if not isinstance(reference, str) or reference.startswith("hf-hub:"):
        return False
    return reference.startswith(_PATHS) or reference.lower().endswith(_FILE_TYPES)


def _embed(values: dict[str, Any]) -> None:
    _by_files(values, "teacher", is_local)
    _by_files(values, "pretrained", is_local)
    if not values.get("views"):
        values.pop("view_crop_scale", None)


def _distill(values: dict[str, Any]) -> None:
    weights = values.get("weights") or {}
    learns = any(weights.get(loss.name) for loss in LOSSES if loss.learns_from_texts)
    if not (values.pop("texts", None) and learns):  # if so, the results of their stage decide
        values.pop("texts_per_step", None)
    _by_files(values, "student", is_local)
    _by_files(values, "pretrained", lambda weights: is_local(weights) or ("/" in weights and ":" not in weights))
    _by_files(values, "text_tower", is_local)
    for setting, overruled in (("steps", "epochs"), ("head_perplexity", "head_scale")):
        if values.get(setting) is not None:
            values.pop(overruled, None)
    watched = values.get("validation")
    if isinstance(watched, dict) and watched.get("keep", "last") == "last" and watched.get("patience") is None:
        # The student is the last one, whatever was measured; only the pairs that are held out are not trained on.
        values["validation"] = {"share": watched.get("share", 0.0)}


def _balance(values: dict[str, Any]) -> None:
    if isinstance(rules := values.get("keep"), list) and len(rules) == 1:
        values["keep"] = rules[0]  # as earlier versions wrote it
    for name in values.get("against") or {}:
        values["against"][name] = _without_secrets(values["against"][name])
        _by_files(values["against"], name, lambda value: not _is_elsewhere(value))


def _evaluate(values: dict[str, Any]) -> None:
    for entries, elsewhere in (("sets", _is_elsewhere), ("retrieval", _is_elsewhere), ("compare", _is_no_path)):
        for name in values.get(entries) or {}:
            values[entries][name] = _without_secrets(values[entries][name])
            _by_files(values[entries], name, lambda value, elsewhere=elsewhere: not elsewhere(value))


def _without_secrets(value: Any) -> Any:
    """A place as records have it; those of earlier versions may hold what signs an address."""
    if not isinstance(value, str):
        return [_without_secrets(place) for place in value]
    return without_secrets(value) if is_remote(value) else value


def _is_elsewhere(value: Any) -> bool:
    """A set that is no file here: built in, or behind a URL."""
    places = value if isinstance(value, list) else [value]
    return any("://" in str(place) or str(place).startswith(("builtin:", "pipe:")) for place in places)


def _is_no_path(value: Any) -> bool:
    return not is_local(value)


def _by_files(values: dict[str, Any], name: str, local: Callable[[Any], bool]) -> None:
    if values.get(name) is not None and local(values[name]):
        values[name] = OF_FILES


_PLACES: dict[str, Callable[[dict[str, Any]], None]] = {
    "embed": _embed,
    "balance": _balance,
    "distill": _distill,
    "evaluate": _evaluate,
}
