"""What a run says to the world: its settings, names and messages without secrets and local paths.

The page, the model card, the exported student and the tables of ablations all cut through this module.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from clip_cid.models.references import LOCAL, RUN

_LOCAL_SCHEMES = (RUN, LOCAL)
_ONLY_HERE = ("machine", "draw", "report")  # recipe sections that decide nothing about the student
_UNKNOWN = "unknown"
_COMMAND, _NO_COMMAND = "pipe:", "pipe:..."
_END_OF_PATH = re.compile(r"[?#;]|%3F|%23", re.IGNORECASE)  # in an address
_QUERY = re.compile(r"[?&;#][^\s/=]+=.*", re.DOTALL)  # where no scheme says that it is an address
_SHORTEST_SECRET = 4  # characters: a shorter part of an address is not looked for in texts

# Parts of a text that are cut wherever they come from; what the recipe names is looked for as well.
_COMMANDS = re.compile(r"pipe:(?!\.\.\.)[^\n]*")
_ADDRESSES = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]*[^\s'\"<>`.,:;)\]}]")
_PATHS = re.compile(r"(?<![\w/.~<-])(?:~[\w.-]*)?(?:/[^\s/'\"`<>|:;,()\[\]]+)+/?|(?<!\w)(?:[A-Za-z]:\\|\\\\)[^\s'\"]+")
_QUERIES = re.compile(r"(?<=\w)\?[^\s'\"<>=]+=[^\s'\"<>)]*")


def public_name(value: str) -> str:
    """A setting that may name a file, cut to its last part.

    `hf-hub:` references and names open_clip itself knows are public and stay. An address also loses its user, password
    and query; a command behind `pipe:` is left out. Text without a slash stays as it is, without what looks like a
    user or a query.
    """
    if value.strip().lower().startswith(_COMMAND):
        return _NO_COMMAND
    for scheme in _LOCAL_SCHEMES:
        if value.startswith(scheme):
            return scheme + _last_part(value.removeprefix(scheme))
    return value if _is_public(value) else _last_part(value)


def unique_public_names(values: Iterable[str], cut: Callable[[str], str] = public_name) -> dict[str, str]:
    """Each of the values and what `cut` leaves of it; equal ones get a number in their order."""
    names: dict[str, str] = {}
    for value in values:
        name = first = cut(value)
        number = 1
        while name in names.values():
            number += 1
            name = f"{first} ({number})"
        names[value] = name
    return names


def public_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recipe without secrets and local paths."""
    return _public(recipe, PublicWords(recipe))


def public_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The `clip_cid` block of an exported student without local names (docs/export.md).

    The teacher keeps its name, its weights' digest and its precision.
    """
    public = dict(provenance)
    if "recipe" in provenance:
        sections = {name: values for name, values in provenance["recipe"].items() if name not in _ONLY_HERE}
        public["recipe"] = public_settings(sections)
    teacher = provenance.get("teacher")
    if isinstance(teacher, Mapping):
        public["teacher"] = _public_teacher(teacher)
    return public


class PublicWords:
    """Cuts secrets and local paths out of texts: messages, names, keys and captions."""

    def __init__(self, recipe: Mapping[str, Any], *folders: Path) -> None:
        """Look for what this recipe names, for these folders, and for the home and working directory."""
        forms: dict[str, Callable[[str], str]] = {}
        for value in _strings(recipe):
            if public_name(value) != value:
                forms |= _forms(value)
        for folder in (*folders, Path.home(), Path.cwd()):
            forms |= _path_forms(str(folder))

        longest_first = sorted(forms, key=len, reverse=True)
        self._cuts = [forms[form] for form in longest_first]
        self._known = re.compile("|".join(f"({_pattern(form)})" for form in longest_first) or "(?!)")

    def __call__(self, text: str) -> str:
        """A message or a name."""
        text = self.data(text)
        for pattern in (_COMMANDS, _ADDRESSES, _PATHS):
            text = pattern.sub(lambda match: public_name(match[0]), text)
        return _QUERIES.sub("", text)

    def data(self, text: str) -> str:
        """A caption, which may speak of addresses and paths of its own: only what this run names is cut."""
        return self._known.sub(lambda match: self._cuts[(match.lastindex or 1) - 1](match[0]), text)


def local_names(model_cfg: Any) -> list[str]:
    """Strings of a model's configuration that name files of this machine."""
    if isinstance(model_cfg, str):
        return [model_cfg] if re.match(r"[/~.\\]|[A-Za-z]:\\|local-dir:", model_cfg) else []
    values = model_cfg.values() if isinstance(model_cfg, dict) else model_cfg if isinstance(model_cfg, list) else ()
    return [name for value in values for name in local_names(value)]


def _public(value: Any, words: PublicWords) -> Any:
    """Every string in nested settings through `public_name`; the keys are names the user chose, and only cut."""
    if isinstance(value, Mapping):
        return {words(str(key)): _public(entry, words) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(entry, words) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def _public_teacher(teacher: Mapping[str, Any]) -> dict[str, Any]:
    if "joined" in teacher:
        names = [_teacher_name(one.get("reference", _UNKNOWN)) for one in teacher["joined"]]
        digests = [one.get("weights_sha256", "not recorded") for one in teacher["joined"]]
        return {"reference": " + ".join(names), "weights_sha256": " + ".join(digests)}
    kept = {key: teacher[key] for key in ("weights_sha256", "precision") if key in teacher}
    return {"reference": _teacher_name(teacher["reference"]), **kept}


def _teacher_name(reference: str) -> str:
    """Embeddings made elsewhere name no teacher, only the folder they came from."""
    return _UNKNOWN if reference.startswith(_UNKNOWN) else public_name(reference)


def _is_public(value: str) -> bool:
    if re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+", value):
        return True
    name, _, tag = value.replace("/", "-", value.count("/") - 1).rpartition("/")  # `ViT-B/32` is also `ViT-B-32`
    weights, models = _names_of_open_clip()
    return (name, tag) in weights or value.replace("/", "-") in models


@functools.cache
def _names_of_open_clip() -> tuple[frozenset[Any], frozenset[str]]:
    """Of weights and of models. Where it is not installed no name is known to be public, so all are cut."""
    try:
        import open_clip
    except ModuleNotFoundError:
        return frozenset(), frozenset()
    return frozenset(open_clip.list_pretrained()), frozenset(open_clip.list_models())


def _last_part(value: str) -> str:
    """What follows the last slash, without user, query and fragment."""
    scheme, slashes, rest = value.partition("://")
    if slashes:  # what follows the host
        value = _END_OF_PATH.split(rest)[0].partition("/")[2] or f"{scheme}:"
    elif re.match(r"[A-Za-z]:\\|\\\\", value):
        value = value.replace("\\", "/")

    last = _QUERY.split(value)[0].rstrip("/").rpartition("/")[2]
    return last.rpartition("@")[2] if ":" in last else last  # user:password@host


# What to look for in a text


def _strings(value: Any) -> Iterable[str]:
    """Every string among nested settings; their names are the user's choice."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Path):
        yield str(value)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)


def _forms(value: str) -> dict[str, Callable[[str], str]]:
    """The ways in which a message may write a setting -> how each is cut."""
    if value.strip().lower().startswith(_COMMAND):
        command = value.strip()[len(_COMMAND) :]
        return {value: lambda _: _NO_COMMAND, **({command: lambda _: "..."} if command.strip() else {})}
    if "://" in value:
        return {value: public_name, **{part: lambda _: "..." for part in _secret_parts(value)}}
    return {value: public_name, **_path_forms(re.sub(f"^({'|'.join(_LOCAL_SCHEMES)})", "", value))}


def _path_forms(path: str) -> dict[str, Callable[[str], str]]:
    """A path as it is written, absolute, and the folder it lies in; the root of all is no secret."""
    absolute = os.path.abspath(os.path.expanduser(path))
    written = [form for form in (path, absolute, os.path.dirname(absolute)) if form.strip("/.~") and "/" in form]
    return dict.fromkeys(written, public_name)


def _secret_parts(address: str) -> list[str]:
    """Host, user, password and the values of the query of an address."""
    try:
        parts = urlsplit(address)
        named = [parts.hostname or "", parts.username or "", parts.password or ""]
    except ValueError:  # not a valid host
        return []
    return [part for part in (*named, *(value for _, value in parse_qsl(parts.query))) if len(part) >= _SHORTEST_SECRET]


def _pattern(form: str) -> str:
    """A setting as a regular expression: its braces and wildcards stand for what a message has in their place."""
    pattern = re.sub(r"\\\{[^{}]*\\\}|(?:\\\*)+|\\\?", r"[^\\s]{0,200}?", re.escape(form))
    return pattern.removesuffix("[^\\s]{0,200}?") + "[^\\s]*" if pattern.endswith("?") else pattern
