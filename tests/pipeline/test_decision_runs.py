"""Decisions of a person in the balance stage: obeyed, part of its key, and refused with a word where they do not fit."""

import json
from pathlib import Path

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest

from clip_cid import cli, pipeline
from clip_cid.data.balance.decided_file import read_cut
from clip_cid.data.balance.decisions import Decision, Image, append_line, hash_text
from clip_cid.data.balance.forest_file import read_forest
from clip_cid.data.balance.tables import BalanceTables

FILES = ("kept.npy", "set_of.npy", "forest.parquet", "row_hashes.npy", "sets.parquet", "members.parquet")
DEGREES = (0, 4, 9, 12, 13, 90, 90, 180)  # a chain, two equal ones, one alone
THRESHOLD = ("--balance.metric", "euclidean", "--balance.threshold", "0.1")


def rows(degrees=DEGREES) -> np.ndarray:
    angles = np.array(degrees) * np.pi / 180
    return oracles.unit(np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run that is balanced, without its page: other balances of these rows have one."""
    np.save(tmp_path / "rows.npy", rows())
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_show_balance", lambda *_: None)
        balance(tmp_path / "run")
    return tmp_path / "run"


def balance(run: Path, *flags: str, code: int = 0) -> Path:
    arguments = ["balance", str(run), "--embeddings", str(run.parent / "rows.npy"), *THRESHOLD, *flags]
    assert cli.main(arguments) == code
    return run / "balance"


def image(run: Path, row: int) -> Image:
    return Image(hash_text(np.load(run / "balance" / "row_hashes.npy")[row]), f"rows/{row}")


def decide(run: Path, *lines: tuple, name: str = "decisions.jsonl") -> str:
    path = run.parent / name
    path.touch()
    for number, (kind, *of) in enumerate(lines):
        images = tuple(image(run, row) for row in of)
        append_line(path, Decision(f"{number}-{kind}-{of}", kind, images).as_json())
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.slow
def test_decisions_are_obeyed_and_told(run):
    path = decide(run, ("not_duplicates", 0, 3), ("keep", 4), ("remove_all", 0, 1), ("keep_all", 5, 6))
    out = balance(run, "--balance.decisions", path)
    assert np.load(out / "kept.npy").tolist() == [4, 5, 6, 7]
    assert np.load(out / "set_of.npy").tolist() == [-1, -1, 0, 0, 0, 1, 2, 3]

    # The forest is whole, for growth and for other thresholds; what joins nothing is beside it.
    forest, cut = read_forest(out / "forest.parquet"), read_cut(out)
    assert [(forest.left[link], forest.right[link]) for link in cut] == [(1, 2)]
    decided = pq.read_table(out / "decided.parquet").to_pydict()
    assert decided["decision"] == ["keep", "keep", "keep", "remove", "remove", "not_duplicates", "cut"]
    assert decided["key"] == [f"rows/{row}" for row in (4, 5, 6, 0, 1, 0, 1)]
    assert decided["other_key"][-2:] == ["rows/3", "rows/2"]
    assert BalanceTables(out).sets["size"].tolist() == [3]
    assert contents(out)["forest.parquet"] == contents(balance(run.with_name("other")))["forest.parquet"]


@pytest.mark.slow
def test_an_empty_file_and_one_with_all_undone_change_nothing(run, caplog):
    plain = contents(run / "balance")
    caplog.clear()
    empty = balance(run, "--balance.decisions", decide(run))
    assert "up to date" in caplog.text
    assert contents(empty) == plain

    path = decide(run, ("keep", 0))
    assert contents(balance(run, "--balance.decisions", path)) != plain
    append_line(Path(path), {"id": "u", "decision": "undo", "of": "0-keep-[0]"})
    caplog.clear()
    assert contents(balance(run, "--balance.decisions", path)) == plain
    assert "balance.decisions is not given any more" in caplog.text
    assert not (run / "balance" / "decided.parquet").exists()


@pytest.mark.slow
def test_what_is_decided_is_part_of_the_key_and_the_order_of_the_lines_is_not(run, caplog):
    path = Path(decide(run, ("keep", 0), ("remove_all", 4), ("not_duplicates", 5, 6)))
    first = contents(balance(run, "--balance.decisions", str(path)))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))
    caplog.clear()
    moved = path.rename(path.with_name("moved.jsonl"))
    assert contents(balance(run, "--balance.decisions", str(moved))) == first
    assert "up to date" in caplog.text

    caplog.clear()
    append_line(moved, Decision("more", "keep", (image(run, 1),)).as_json())
    assert contents(balance(run)) != first
    assert "balance.decisions" in caplog.text


@pytest.mark.slow
def test_they_survive_growth_under_other_row_numbers(run):
    path = decide(run, ("not_duplicates", 0, 3), ("keep", 4))
    np.save(run.parent / "rows.npy", np.concatenate([rows((200, 201)), rows()]))
    out = balance(run, "--balance.decisions", path)
    assert np.load(out / "kept.npy").tolist() == [0, 2, 6, 7, 9]


@pytest.mark.slow
def test_decisions_of_other_embeddings_are_refused_and_those_on_gone_rows_left_out(run, capsys, caplog):
    path = decide(run, ("keep", 0), ("remove_all", 7))
    before = Path(path).read_bytes()
    np.save(run.parent / "rows.npy", rows(DEGREES[:-1]))
    caplog.clear()
    assert 0 in np.load(balance(run, "--balance.decisions", path) / "kept.npy")
    assert "of 2 images decided about, 1 not found here, such as 'rows/7'" in caplog.text

    np.save(run.parent / "rows.npy", rows((20, 21, 22)))
    kept = contents(run / "balance")
    balance(run, "--balance.decisions", path, code=1)
    error = capsys.readouterr().err
    assert "none of the 2 images it decides about is here" in error
    assert contents(run / "balance") == kept
    assert Path(path).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([("keep", 0), ("remove_all", 0, 1)], "'rows/0' is both to be kept and to be removed"),
        ([("remove_all", *range(8))], "decisions.jsonl: every image is removed"),
    ],
)
def test_decisions_that_cannot_be_obeyed_leave_the_results_as_they_are(run, capsys, lines, problem):
    kept = contents(run / "balance")
    balance(run, "--balance.decisions", decide(run, *lines), code=1)
    assert problem in capsys.readouterr().err
    assert contents(run / "balance") == kept


@pytest.mark.slow
def test_a_broken_or_missing_file_is_refused(run, capsys):
    balance(run, "--balance.decisions", str(run.parent / "none.jsonl"), code=1)
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    (run.parent / "broken.jsonl").write_text(json.dumps({"decision": "keep"}) + "\n")
    balance(run, "--balance.decisions", str(run.parent / "broken.jsonl"), code=1)
    assert "broken.jsonl, line 1" in capsys.readouterr().err
