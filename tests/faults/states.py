"""States that mutants begin in: pairs in each format, embeddings from elsewhere, and unfinished work."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cases import CASES, STUDENT, Case, Cases, read_tars
from commands import CHANGE, REMOVE, Action, Harm
from disturbances import operations


def _as_table(write: Callable[[Path, list[dict[str, str]]], None], source: str) -> Callable[[Cases], None]:
    def make(cases: Cases) -> None:
        rows = _unpacked(cases)
        write(cases.here / "pairs", rows)
        _point(cases, {"pairs": {"source": [source]}})

    return make


def _unpacked(cases: Cases) -> list[dict[str, str]]:
    """The sample's pairs as files; returns image and caption of each."""
    cases.restore("data")
    folder = cases.here / "pairs" / "images"
    folder.mkdir(parents=True)
    rows: list[dict[str, str]] = []
    for stem, files in read_tars(cases.here / "data" / "pairs").items():
        suffix = next(suffix for suffix in files if suffix not in ("txt", "json"))
        caption = files["txt"].decode()
        (folder / f"{stem}.{suffix}").write_bytes(files[suffix])
        (folder / f"{stem}.txt").write_text(caption)
        rows.append({"image": f"images/{stem}.{suffix}", "caption": caption})
    return rows


def _point(cases: Cases, changed: Mapping[str, Any]) -> None:
    plain = {"balance": {"threshold": 0.002}, "cluster": {"num_centers": 4, "iterations": 3}}
    recipe = {**STUDENT, **plain, **changed}
    (cases.here / "student.yaml").write_text(json.dumps(recipe))


def _write_delimited(name: str, delimiter: str, **how: Any) -> Callable[[Path, list[dict[str, str]]], None]:
    def write(folder: Path, rows: list[dict[str, str]]) -> None:
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", **how)
            writer.writerows([["image", "caption"], *([row["image"], row["caption"]] for row in rows)])

    return write


def _write_parquet(folder: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")


def _embeddings(cases: Cases) -> np.ndarray:
    cases.restore("embed")
    rows = np.concatenate([np.load(path) for path in sorted((cases.here / "run/embed/img_emb").glob("*.npy"))])
    shutil.rmtree(cases.here / "run")
    (cases.here / "pairs").mkdir()
    return rows


def _make_npy(cases: Cases) -> None:
    rows = _embeddings(cases)
    np.save(cases.here / "pairs/rows.npy", rows)
    _point(cases, {"pairs": {}, "embed": {"existing": "pairs/rows.npy"}})


def _make_npz(cases: Cases) -> None:
    rows = _embeddings(cases)
    np.savez(cases.here / "pairs/00.npz", l14_img=rows, l14_txt=rows)
    columns = {"uid": [f"u{row}" for row in range(len(rows))], "text": ["a caption"] * len(rows)}
    pq.write_table(pa.table(columns), cases.here / "pairs/00.parquet")
    _point(cases, {"pairs": {}, "embed": {"existing": "pairs"}})


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def _unfinished(name: str, part: str) -> Callable[[Cases], None]:
    """A state in which the command was killed late in its work."""

    def make(cases: Cases) -> None:
        case = case_of(name)
        number = len(operations(cases, case, CHANGE | REMOVE))
        for at in range(int(number * 0.7), 1, -5):
            cases.begin(case)
            cases.run(case, Harm(Action.KILL, at))
            if sum(path.is_file() for path in (cases.here / part).rglob("*")) > 2:
                return
        raise AssertionError(f"{name}: no kill leaves unfinished work")

    return make


MAKERS: Mapping[str, Callable[[Cases], None]] = {
    "csv": _as_table(_write_delimited("table.csv", ","), "pairs/table.csv"),
    "tsv": _as_table(_write_delimited("table.tsv", "\t", quoting=csv.QUOTE_NONE), "pairs/table.tsv"),
    "parquet": _as_table(_write_parquet, "pairs/table.parquet"),
    "folder": _as_table(lambda folder, rows: None, "pairs/images"),
    "npy": _make_npy,
    "npz": _make_npz,
    **{
        f"unfinished {stage}": _unfinished(stage, f"run/{stage}.part")
        for stage in ("embed", "balance", "cluster", "distill", "evaluate")
    },
    "unfinished subset": _unfinished("subset --shards", "subset"),
}
