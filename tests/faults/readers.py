"""Independent readers of damaged pairs: what the store of embeddings should hold, or whether it is near to it."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cases import CAPTIONS, PAIRS

_RETURN = "\ue000"  # of no made caption


def _stored(here: Path) -> tuple[int, list[tuple[str, str]]]:
    """Rows of the store, and key and first caption of each good one."""
    shards = sorted((here / "run/embed/metadata").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(shard) for shard in shards]).to_pydict()
    good = [(key, caption) for key, caption, ok in zip(table["key"], table["caption"], table["ok"], strict=True) if ok]
    return len(table["key"]), good


def _plain(text: str) -> str:
    return " ".join(text.split())


def _rows_differ(here: Path, expected: list[tuple[str, str]]) -> bool:
    rows, good = _stored(here)
    captions = {Path(image).stem: _plain(caption) for image, caption in expected}
    return rows != len(expected) or any(captions.get(Path(key).stem) != _plain(caption) for key, caption in good)


def _delimited(path: Path, **how: Any) -> list[tuple[str, str]]:
    # A carriage return alone is a letter for us, and a line end for Python's module.
    text = re.sub(r"\r(?!\n)", _RETURN, path.read_bytes().decode("utf-8-sig", "replace"))
    split = [row for row in csv.reader(io.StringIO(text, newline=""), **how) if row]
    rows = [[cell.replace(_RETURN, "\r") for cell in row] for row in split]
    names = rows[0]
    image, caption = names.index("image"), names.index("caption")
    return [(row[image], row[caption]) for row in rows[1:] if len(row) == len(names)]


def csv_differs(here: Path, path: Path) -> bool:
    return _rows_differ(here, _delimited(path))


def tsv_differs(here: Path, path: Path) -> bool:
    return _rows_differ(here, _delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE))


def parquet_differs(here: Path, path: Path) -> bool:
    table = pq.read_table(path).to_pydict()
    return _rows_differ(here, list(zip(map(str, table["image"]), map(str, table["caption"]), strict=True)))


def most_rows_differ(here: Path, path: Path) -> bool:
    """A local damage touches few rows, and loses none."""
    rows, good = _stored(here)
    whole = json.loads((here / CAPTIONS).read_text())
    return rows != PAIRS or sum(whole.get(Path(key).stem) != _plain(caption) for key, caption in good) > 2


def npy_differs(here: Path, path: Path) -> bool:
    stored = here / "run/embed/img_emb/img_emb_0000.npy"
    return stored.exists() and not np.array_equal(np.load(stored), np.load(path, allow_pickle=False))
