"""The images of all sets for other tools: `members.parquet` with paths, and the same for a spreadsheet.

FiftyOne, LightlyStudio and others show pictures from files. An image that lies inside a tar or a table is written
out beside the tables, byte for byte.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clip_cid import log, units
from clip_cid.csv_tables import write_csv
from clip_cid.data.balance.kinds import KINDS
from clip_cid.data.embeddings.files import write_table
from clip_cid.data.pairs.pair import BadSample
from clip_cid.errors import DataError
from clip_cid.method.balance.kept_rows import distances_to
from clip_cid.method.distances import from_squared
from clip_cid.method.unit_rows import UnitRows
from clip_cid.publish.subset import image_extension, member_stem
from clip_cid.review.opened_run import OpenedRun
from clip_cid.review.pictures import NoPictureError, RowPictures

TABLE, SHEET, IMAGES = "members.parquet", "members.csv", "images"


def write_members(run: OpenedRun, out: Path) -> str:
    """Write both tables, and the images that are no files of their own; returns a line that says what is there.

    Sets are those of the balance's threshold, with the decisions that hold now.

    Raises:
        DataError: The folder holds something, or an image cannot be read any more.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already.", fix="Give the name of a new folder.")
    out.mkdir(parents=True, exist_ok=True)

    columns = _columns(run)
    rows = columns.pop("row")
    paths = _paths(run, out, rows)
    table = {"filepath": paths, **columns}
    write_table(out / TABLE, pa.table(table))
    write_csv(out / SHEET, table)
    sets = len({*columns["set"]})
    return f"{out}: {len(rows):,} images of {units.counted(sets, 'set')} in {TABLE} and {SHEET}."


def _columns(run: OpenedRun) -> dict[str, Any]:
    """What is known of each image of a set, set by set."""
    run.warm_up()
    sets = run.sets(run.squared)
    kept_for = run.kept_for(sets, range(len(sets)), most=None)
    rows = sets.rows.tolist()
    owner = np.array([kept_for[row] for row in rows], dtype=np.int64)
    keys, (sources, source_of), decided = run.store.keys, run.sources, run.decided.rows
    keep, remove = {*decided.keep.tolist()}, {*decided.remove.tolist()}

    has_owner = owner >= 0
    squared = np.full(len(rows), np.nan)
    if has_owner.any():
        both = np.unique(np.concatenate([sets.rows, owner[has_owner]]))
        images = UnitRows(run.store.images.select(both), name="images", any_length=False)
        places, of_owner = (np.searchsorted(both, some[has_owner]) for some in (sets.rows, owner))
        squared[has_owner] = distances_to(images, places, of_owner)
    distances = from_squared(squared, run.metric).tolist()
    return {
        "row": rows,
        "key": [keys[row] for row in rows],
        "caption": [run.caption(row) for row in rows],
        "source": [sources[source_of[row]] for row in rows],
        "set": np.repeat(np.arange(len(sets)), sets.size).tolist(),
        "set_size": np.repeat(sets.size, sets.size).tolist(),
        "kept": (owner == sets.rows).tolist(),
        "kept_key": [keys[row] if row >= 0 else None for row in owner.tolist()],
        f"{run.metric}_distance": [
            distance if known else None for distance, known in zip(distances, has_owner, strict=True)
        ],
        "kind": [KINDS[run.kind_of[row]] for row in rows],
        "decided": ["keep" if row in keep else "remove" if row in remove else "" for row in rows],
    }


def _paths(run: OpenedRun, out: Path, rows: Sequence[int]) -> list[str | None]:
    """The file of each picture, written out where it has none of its own; None for all without pairs."""
    if not run.recipe.pairs.source:
        log.warn("the recipe names no pairs, so there are no paths of pictures")
        return [None] * len(rows)

    pictures = RowPictures(run.folder, run.recipe, run.store)
    paths: list[str | None] = []
    with log.progress("images", len(rows)) as bar:
        for row in rows:
            try:
                path = pictures.file(row) or _written(pictures, row, out / IMAGES)
            except (BadSample, NoPictureError) as error:
                raise DataError(
                    f"{run.store.keys[row]!r}: its picture cannot be read any more ({error}).",
                    fix=f"Bring the pairs back as they were, delete {out}, and run the same command again.",
                ) from error
            paths.append(str(path.absolute()))
            bar.advance(1)
    return paths


def _written(pictures: RowPictures, row: int, folder: Path) -> Path:
    key, content = pictures.original(row)
    path = folder / f"{member_stem(key)}.{image_extension('', content)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
