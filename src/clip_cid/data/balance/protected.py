"""Rows that a balance never removes: those of some sources, and those whose keys a file lists."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from braceexpand import braceexpand
from jaxtyping import Bool, Int

from clip_cid import log, units
from clip_cid.data.text_files import read_text_lines
from clip_cid.errors import DataError


def protected_rows(
    sources: Sequence[str],
    lists: Sequence[Path],
    shards: Sequence[tuple[str, int]],
    keys: pa.LargeStringArray,
) -> Int[np.ndarray, " protected"]:
    """The rows that these name, ascending.

    Args:
        sources: Names of sources, with wildcards and brace ranges.
        lists: Files with a key a line.
        shards: Name and rows of each shard of the store, in order; a name begins with that of its source.
        keys: Of every row.

    Raises:
        DataError: A source or a list names no row, or a list cannot be read.
    """
    named: dict[str, Bool[np.ndarray, " rows"]] = {}
    for path in lists:
        named[str(path)] = _listed(path, keys)

    of_shards = [name.partition("#")[0] for name, _ in shards]
    shard_of_row = np.repeat(np.arange(len(shards)), [rows for _, rows in shards])
    for source in sources:
        patterns = list(braceexpand(source))
        fits = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in of_shards]
        named[source] = np.array(fits)[shard_of_row]

    for name, rows in named.items():
        if not rows.any():
            raise DataError(
                f"balance.protect: {name} names none of the images, which are of sources such as {of_shards[0]!r} and have"
                f" keys such as {keys[0].as_py()!r}.",
                fix="Name a source as in pairs.source (wildcards and brace ranges are allowed), or a .txt with one key"
                " a line.",
            )
    return np.flatnonzero(np.any([np.zeros(len(keys), dtype=bool), *named.values()], axis=0))


def _listed(path: Path, keys: pa.LargeStringArray) -> Bool[np.ndarray, " rows"]:
    """The rows whose keys the file has; spaces around a key do not count. Says which keys no row has."""
    wanted, own = (
        read_text_lines([path], setting="balance.protect").texts,
        pc.call_function("utf8_trim_whitespace", [keys]),
    )
    unknown = wanted.filter(pc.call_function("invert", [_is_in(wanted, own)]))
    if 0 < len(unknown) < len(wanted):
        log.warn(
            f"balance.protect: {units.counted(len(unknown), 'key')} of {len(wanted):,} in {path}"
            f" {'names' if len(unknown) == 1 else 'name'} no image, such as {unknown[0].as_py()!r}"
        )
    return _is_in(own, wanted).to_numpy(zero_copy_only=False)


def _is_in(values: pa.Array, those: pa.Array) -> pa.Array:
    return pc.call_function("is_in", [values], pc.SetLookupOptions(those))
