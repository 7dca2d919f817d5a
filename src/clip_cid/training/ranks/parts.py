"""Arrays of all rows, computed once by all ranks: a part is some rows in files of its own, there whole or not at all.

What a part holds does not depend on the rank that computes it, so any number of ranks leaves the same numbers, and
resumes what any other number has left.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from clip_cid import log
from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.data.npy_files import new_npy
from clip_cid.run_folder import atomic_file, read_json, write_json
from clip_cid.training.ranks.distributed import Ranks

BLOCK_ROWS = 8192
"""Rows that are computed together, the same ones whatever the parts and ranks."""
_MOST_PARTS = 2048  # as many files of each array: enough for any number of ranks, few enough for a folder
_PARTS = "parts.json"
_OLDER = "done.json"  # before there were parts: one file of all rows, and how many are done


class Column(NamedTuple):
    """An array of the pass: what a number is, and how many of them a row has."""

    kind: type[np.generic]
    width: int


def compute_by_parts(
    folder: Path,
    columns: Mapping[str, Column],
    compute: Callable[[slice], Mapping[str, Tensor]],
    *,
    rows: int,
    key: str,
    what: str,
    ranks: Ranks,
) -> dict[str, ShardedRows]:
    """Each array by its name, of all rows. All ranks call this; parts that a killed attempt has left are not computed.

    Args:
        folder: Of the parts. What else lies in it, such as parts of another key, is removed.
        columns: The arrays by name.
        compute: What belongs in the rows of a slice, by name.
        rows: Of each array.
        key: Digest of everything that decides the result.
        what: They are, for the progress.
        ranks: Who share the parts.

    Raises:
        RunError: This rank does not see what another has written.
    """
    # The main process alone looks for what is there: to a host that has looked too early, files seem to be missing.
    edges, missing = ranks.from_main(_begin(folder, columns, rows, key) if ranks.is_main else ([], []))
    ranks.find(folder / _PARTS)
    parts = [range(*bounds) for bounds in itertools.pairwise(edges)]

    own = missing[ranks.rank :: ranks.size]
    with log.progress(what, sum(len(parts[part]) for part in own), unit="images") as bar:
        for part in own:
            for computed in _write(folder, columns, compute, part, parts[part]):
                bar.advance(computed)
    ranks.wait()

    sizes = [len(part) for part in parts]
    found: dict[str, ShardedRows] = {}
    for name, (kind, width) in columns.items():
        files = [ranks.find(_file(folder, name, part)) for part in range(len(parts))]
        found[name] = ShardedRows(files, sizes, dim=width, dtype=np.dtype(kind))
    return found


def part_edges(rows: int) -> list[int]:
    """The first row of each part, and the number of rows: whole blocks, in at most 2,048 parts of equal size."""
    blocks = math.ceil(rows / BLOCK_ROWS)
    step = BLOCK_ROWS * max(math.ceil(blocks / _MOST_PARTS), 1)
    return [*range(0, rows, step), rows]


def _begin(folder: Path, columns: Mapping[str, Column], rows: int, key: str) -> tuple[list[int], list[int]]:
    """The edges of the parts, and the parts that are to be computed."""
    folder.mkdir(parents=True, exist_ok=True)
    _adopt_older(folder, columns, rows, key)
    state = read_json(folder / _PARTS) if (folder / _PARTS).is_file() else {}
    edges = state["edges"] if (same := state.get("key") == key) else part_edges(rows)

    # Parts of another key, and what a killed rank has not finished.
    parts = range(len(edges) - 1)
    wanted = {_file(folder, name, part) for name in columns for part in parts} if same else set[Path]()
    there = set(folder.iterdir()) - {folder / _PARTS}
    for path in there - wanted:
        path.unlink()
    if not same:
        write_json(folder / _PARTS, {"key": key, "edges": edges})
    return edges, [part for part in parts if not {_file(folder, name, part) for name in columns} <= wanted & there]


def _write(
    folder: Path,
    columns: Mapping[str, Column],
    compute: Callable[[slice], Mapping[str, Tensor]],
    part: int,
    rows: range,
) -> Iterator[int]:
    """Write the files of a part: the numbers of some rows. Yields how many of these each block has added."""
    with contextlib.ExitStack() as stack:
        arrays: dict[str, np.memmap] = {}
        for name, (kind, width) in columns.items():
            temporary = stack.enter_context(atomic_file(_file(folder, name, part)))
            arrays[name] = new_npy(temporary, kind, (len(rows), width))

        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            for name, values in compute(slice(block.start, block.stop)).items():
                arrays[name][start : start + BLOCK_ROWS] = values.cpu().numpy().reshape(len(block), -1)
            yield len(block)
        for array in arrays.values():
            array.flush()


def _adopt_older(folder: Path, columns: Mapping[str, Column], rows: int, key: str) -> None:
    """Take the finished arrays of an earlier version as one part; what it has not finished is computed anew."""
    if not (folder / _OLDER).is_file() or read_json(folder / _OLDER) != {"key": key, "rows": rows}:
        return
    for name in columns:
        older, part = folder / f"{name}.npy", _file(folder, name, 0)
        if not older.is_file():
            continue  # a killed attempt has moved it
        values = np.load(older, mmap_mode="r")
        if values.ndim > 1:
            older.replace(part)
        else:
            with atomic_file(part) as temporary, temporary.open("wb") as handle:
                np.save(handle, values[:, None])
    write_json(folder / _PARTS, {"key": key, "edges": [0, rows]})


def _file(folder: Path, name: str, part: int) -> Path:
    return folder / f"{name}-{part:04d}.npy"
