"""One pass over all rows, in parts: the code, digest and cell of each row, and the cells it has to be compared with."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from clip_cid.method.balance.cell_windows import Windows
from clip_cid.method.balance.pair_plan import Layout, Plan
from clip_cid.method.balance.row_hashes import row_hashes
from clip_cid.method.balance.sketch import Sketch
from clip_cid.method.codes import Coding
from clip_cid.method.jobs import Context, in_parts
from clip_cid.method.unit_rows import UnitRows

_PART_BYTES = 1 << 27  # of what a part makes
_NUMBER_SECONDS, _CELL_SECONDS = 1e-8, 7e-9  # of a core, for estimates only


class ScannedRows:
    """What the scan found, by name: `code`, `error`, `hash`, `home` and (with cells) `visits`."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def column(self, name: str, out: np.ndarray) -> np.ndarray:
        """One thing of all rows, into an array."""
        for part, start in zip(self._parts, self._starts.tolist(), strict=False):
            out[start : start + len(part)] = part[name]
        return out

    def ascending(self, name: str, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        """One thing of some rows, which ascend."""
        found = np.empty(len(rows), dtype=self._parts[0].dtype[name])
        if not len(rows):
            return found
        first, last = (int(np.searchsorted(self._starts, row, side="right")) - 1 for row in (rows[0], rows[-1]))
        edges = np.searchsorted(rows, self._starts[first : last + 2]).tolist()
        for part, start, stop in zip(range(first, last + 1), edges, edges[1:], strict=False):
            found[start:stop] = self._parts[part][name][rows[start:stop] - self._starts[part]]
        return found


def scan(context: Context, limit: float, layout: Layout) -> ScannedRows:
    """Scan all rows for a search of pairs at squared distance `limit` or less."""
    images, arrays = context.images, _arrays_of(layout)
    most = max(1, _PART_BYTES // _row_type(layout).itemsize)
    sizes = np.diff([*range(0, len(images), most), len(images)]).tolist()

    cells = 0 if layout.centers is None else len(layout.centers)
    decided_by = layout.plan, layout.coding, limit
    make = functools.partial(_scan_part, *decided_by, most)
    row_seconds = images.dim * _NUMBER_SECONDS + cells * _CELL_SECONDS
    parts = in_parts(context, "scan", make, arrays, sizes, decided_by=decided_by, row_seconds=row_seconds)
    return ScannedRows(list(parts))


def _scan_part(
    plan: Plan,
    coding: Coding,
    limit: float,
    most: int,
    arrays: Mapping[str, np.ndarray],
    images: UnitRows,
    texts: UnitRows | None,
    part: int,
) -> np.ndarray:
    sketch = Sketch(arrays["basis"], arrays["rest"]) if "basis" in arrays else None
    layout = Layout(plan, coding, sketch, arrays.get("centers"))
    windows = None if layout.centers is None else Windows(layout.centers, limit, layout.error)

    first = part * most
    scanned = np.zeros(min(most, len(images) - first), dtype=_row_type(layout))
    for start in range(0, len(scanned), images.cached_rows):
        own = slice(start, start + images.cached_rows)
        rows = slice(first + start, min(first + start + images.cached_rows, first + len(scanned)))
        scanned["hash"][own] = row_hashes(images.raw(rows))
        projected = layout.projected(images.float32(rows))
        scanned["code"][own], scanned["error"][own] = coding.encode(layout.completed(projected))
        if windows is not None:
            scanned["home"][own], visited = windows(projected)
            scanned["visits"][own] = np.packbits(visited, axis=1)
    return scanned


def _row_type(layout: Layout) -> np.dtype:
    fields = [
        ("code", layout.coding.kind, (layout.coding.width,)),
        ("error", np.float32),
        ("hash", np.uint64, (2,)),
        ("home", np.int32),
    ]
    if layout.centers is not None:
        fields.append(("visits", np.uint8, (math.ceil(len(layout.centers) / 8),)))
    return np.dtype(fields)


def _arrays_of(layout: Layout) -> dict[str, np.ndarray]:
    arrays = {} if layout.sketch is None else {"basis": layout.sketch.basis, "rest": layout.sketch.rest}
    return arrays if layout.centers is None else {**arrays, "centers": layout.centers}
