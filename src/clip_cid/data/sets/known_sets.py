"""The table of the sets that CLIP is measured on (`known_sets.toml`) and their prompts (`prompts/*.toml`)."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from clip_cid.errors import DataError

MetricName = Literal["top1", "mean_per_class"]

IMAGENET = "imagenet"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Variant(_Row):
    """Counts of a split other than CLIP's that is in use."""

    train: int | None = None
    """Images to train on, validation images among them; None if the variant has none."""
    test: int
    words: str


class KnownSet(_Row):
    """One row of the table; the head of `known_sets.toml` says what its fields mean."""

    key: str
    title: str
    aliases: tuple[str, ...]
    metric: MetricName
    prompts: str
    readers: tuple[str, ...]
    counts: dict[Literal["train", "val", "test"], int]
    split: str
    layout: str
    licence: str
    where: str
    variants: tuple[Variant, ...] = ()
    shifted: bool = False
    """One of the five robustness sets."""
    folds: int | None = None
    crop: int = 0
    """Pixels of border cut off each side of every image."""
    draw: dict[Literal["train", "test"], int] | None = None
    always: str = ""


class Prompts(NamedTuple):
    """Class names by the set's own label, in label order, and templates with `{c}` for the name."""

    names: Mapping[str, str]
    templates: tuple[str, ...]
    superset: tuple[int, ...] | None = None
    """Positions of a subset of ImageNet's classes among the 1,000; some of ObjectNet's classes have several."""
    others: frozenset[str] = frozenset()
    """Labels the set has on disk and its protocol leaves out."""


@cache
def known_sets() -> dict[str, KnownSet]:
    """Every known set by its key, the 14 first."""
    return {key: KnownSet(key=key, **row) for key, row in _toml("known_sets.toml").items()}


def find_known_set(name: str) -> KnownSet | None:
    """The known set of a name in any spelling (`wds/vtab/cifar10`, `CIFAR-10`); None for a user's own set."""
    names = {
        spelled(alias): known for known in known_sets().values() for alias in (known.key, known.title, *known.aliases)
    }
    return names.get(without_prefixes(name))


def without_prefixes(name: str) -> str:
    """A name as `spelled`, without what CLIP_benchmark puts before it."""
    return spelled(name).removeprefix("wds").removeprefix("vtab")


def metric_of(name: str) -> MetricName:
    """The metric of a set's score: CLIP's for the sets it used (mean per class for four of them), else top-1."""
    known = find_known_set(name)
    return known.metric if known else "top1"


def spelled(text: str) -> str:
    """Without case and punctuation, in which copies of a set differ (`apple_pie`, `Apple Pie`)."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


@cache
def load_prompts(name: str) -> Prompts:
    """The class names and templates CLIP published for a set; ImageNet's come from open_clip, its labels from timm."""
    if name == IMAGENET:
        return _imagenet()

    values = _toml(f"prompts/{name}.toml")
    if "wnids" in values:
        return _subset(values["wnids"])
    if IMAGENET in values:
        return _objectnet(values)
    return Prompts(values["classes"], tuple(values["templates"]))


def match_keys(known: KnownSet, classes: Sequence[str], where: str) -> list[str]:
    """The set's own label of each class in a list of labels or class names, whatever their order and spelling.

    Raises:
        DataError: They are not the set's classes, each once.
    """
    names = load_prompts(known.prompts).names
    spellings = [{spelled(key), spelled(name)} for key, name in names.items()]
    listed = [spelled(text) for text in classes]

    # The usual order; it also tells apart ImageNet's two classes named missile.
    if len(listed) == len(names) and all(text in own for text, own in zip(listed, spellings, strict=True)):
        return list(names)

    # Any other order: each class by its key or its name.
    keys: dict[str, set[str]] = {}
    for key, own in zip(names, spellings, strict=True):
        for text in own:
            keys.setdefault(text, set()).add(key)

    unknown = [text for text, plain in zip(classes, listed, strict=True) if plain not in keys]
    shared = [text for text, plain in zip(classes, listed, strict=True) if len(keys.get(plain, ())) > 1]
    matched = {key for plain in listed for key in keys.get(plain, ())}
    missing = [key for key in names if key not in matched]
    if unknown or shared or missing or len(set(listed)) != len(listed):
        raise _not_the_classes(known, classes, unknown, shared, missing, where)
    return [next(iter(keys[plain])) for plain in listed]


def _not_the_classes(
    known: KnownSet, classes: Sequence[str], unknown: list[str], shared: list[str], missing: list[str], where: str
) -> DataError:
    parts = [f"{len(classes)} classes, but {known.title} has {len(load_prompts(known.prompts).names)}"]
    if unknown:
        parts.append(f"{len(unknown)} are not its own ({few(unknown)})")
    if shared:
        parts.append(f"{len(shared)} are each the name of two classes ({few(shared)})")
    if missing:
        parts.append(f"{len(missing)} of its own are missing ({few(missing)})")
    if len(parts) == 1:
        parts.append("one is named twice")
    return DataError(
        f"{where}: {'; '.join(parts)}.",
        fix=f"Complete the set, or give a set of your own a name that is not {known.title}'s: prompts go by class.",
    )


def few(texts: Sequence[str]) -> str:
    """The first three, for a message."""
    return ", ".join(texts[:3]) + (", ..." if len(texts) > 3 else "")


def _imagenet() -> Prompts:
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    from timm.data.imagenet_info import ImageNetInfo

    wnids = ImageNetInfo("imagenet-1k").label_names()
    names = dict(zip(wnids, IMAGENET_CLASSNAMES, strict=True))
    return Prompts(names, tuple(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES))


def _subset(wnids: list[str]) -> Prompts:
    whole = load_prompts(IMAGENET)
    position = {wnid: number for number, wnid in enumerate(whole.names)}
    names = {wnid: whole.names[wnid] for wnid in wnids}
    return Prompts(names, whole.templates, tuple(position[wnid] for wnid in wnids))


def _objectnet(values: dict[str, Any]) -> Prompts:
    whole = load_prompts(IMAGENET)
    position = {wnid: number for number, wnid in enumerate(whole.names)}
    behind = sorted(position[wnid] for wnids in values[IMAGENET].values() for wnid in wnids)
    return Prompts(values["classes"], whole.templates, tuple(behind), frozenset(values["others"]))


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("clip_cid.data.sets").joinpath(name).read_text(encoding="utf-8"))
