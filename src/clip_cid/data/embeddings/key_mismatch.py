"""Why keys of pairs are not those of a store: the usual differences, and how many keys would match without them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

TRIED_KEYS = 200_000
"""Of each side, at most so many are compared."""


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """What hides the match of some keys."""

    differences: tuple[str, ...]
    """In words, such as "folders" and "the extension"."""
    matches: int
    """How many of the missing keys would match exactly one key of the store without them."""
    pair_key: str
    store_key: str
    """Two keys that would match."""

    def __str__(self) -> str:
        *most, last = self.differences
        what = f"{', '.join(most)} and {last}" if most else last
        return (
            f"without {what}, {self.matches:,} of them would match one key each:"
            f" {self.pair_key!r} is {self.store_key!r} there"
        )


def explain_mismatch(missing: pa.LargeStringArray, stored: pa.LargeStringArray) -> Mismatch | None:
    """The fewest differences without which the most keys match; None if no key does.

    Of very many keys only the first 200,000 of each are compared.
    """
    missing, stored = missing[:TRIED_KEYS], stored[:TRIED_KEYS]
    # Without folders, a/1 and b/1 may be the same; with them, all else may match.
    starts = [[step for step in _STEPS if step is not _FOLDERS], [*_STEPS]]
    best, steps = max(((_matched(missing, stored, steps), steps) for steps in starts), key=lambda one: len(one[0]))
    if not best:
        return None
    for step in reversed(_STEPS):
        fewer = [other for other in steps if other is not step]
        if len(matched := _matched(missing, stored, fewer)) >= len(best):
            steps, best = fewer, matched

    pair_key, store_key = next(iter(best.items()))
    return Mismatch(tuple(step.words for step in steps), len(best), pair_key, store_key)


@dataclasses.dataclass(frozen=True)
class _Step:
    words: str
    remove: Callable[[pa.LargeStringArray], pa.LargeStringArray]


def _matched(missing: pa.LargeStringArray, stored: pa.LargeStringArray, steps: Sequence[_Step]) -> dict[str, str]:
    """Key of a pair -> key of the store, where each is the only one of its side that is left the same."""
    sides: list[dict[str, str]] = []
    for keys in (missing, stored):
        left = keys
        for step in steps:
            left = step.remove(left)
        counts = left.value_counts()
        once = counts.field("values").filter(
            pc.call_function("equal", [counts.field("counts"), pa.scalar(1, pa.int64())])
        )
        unique = pc.call_function("is_in", [left], pc.SetLookupOptions(value_set=once))
        sides.append(dict(zip(left.filter(unique).to_pylist(), keys.filter(unique).to_pylist(), strict=True)))
    ours, theirs = sides
    return {key: theirs[same] for same, key in ours.items() if same in theirs}


def _replacing(pattern: str, by: str) -> Callable[[pa.LargeStringArray], pa.LargeStringArray]:
    options = pc.ReplaceSubstringOptions(pattern, by)
    return lambda keys: pc.call_function("replace_substring_regex", [keys], options)


def _without_common_folder(keys: pa.LargeStringArray) -> pa.LargeStringArray:
    if not len(keys):
        return keys
    ends = pc.call_function("min_max", [keys]).as_py()
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ends["min"], ends["max"], strict=False))
    start = "".join(char for char, _ in pairs).rfind("/") + 1
    return pc.call_function("utf8_slice_codeunits", [keys], pc.SliceOptions(start=start, stop=None, step=1))


def _unquoted(keys: pa.LargeStringArray) -> pa.LargeStringArray:
    return pa.array([unquote(key) if "%" in key else key for key in keys.to_pylist()], pa.large_string())


_FOLDERS = _Step("folders", _replacing(r"^.*[/\\]", ""))
_STEPS = (
    _Step("spaces at the ends", lambda keys: pc.call_function("utf8_trim_whitespace", [keys])),
    _Step("the codes of an address, such as %20", _unquoted),
    _Step(
        "the form of accents", lambda keys: pc.call_function("utf8_normalize", [keys], pc.Utf8NormalizeOptions("NFC"))
    ),
    _Step(r"\ in place of /", _replacing(r"\\", "/")),
    _Step("./ or / at the start", _replacing(r"^(?:\./+|/+)+", "")),
    _Step("upper and lower case", lambda keys: pc.call_function("utf8_lower", [keys])),
    _Step("the .0 of a number", _replacing(r"^([0-9]+)\.0$", r"\1")),
    _Step("zeros at the start of a number", _replacing(r"(^|[^0-9])0+([0-9])", r"\1\2")),
    _Step("the folder they have in common", _without_common_folder),
    _Step("the extension", _replacing(r"\.[A-Za-z][A-Za-z0-9]{0,4}$", "")),
    _FOLDERS,
)
"""In the order in which they are removed: what removes more, and may explain too much, stands further behind."""
