"""Images that are never removed, and images near those of an evaluation: worked by hand on a circle."""

from pathlib import Path

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest

from clip_cid import cli
from clip_cid.run_folder import RunFolder
from clip_cid.summaries import BalanceSummary, read_summary

DEGREES = (0, 4, 9, 12, 13, 90, 90, 180)  # a chain, two equal ones, one alone
THRESHOLD = ("--balance.metric", "euclidean", "--threshold", "0.1")  # 5.73 degrees


def on_circle(degrees: tuple[float, ...]) -> np.ndarray:
    angles = np.array(degrees) * np.pi / 180
    return oracles.unit(np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", on_circle(DEGREES))
    return tmp_path / "run"


def balance(run: Path, *flags: str, code: int = 0) -> tuple[list[int], list[int]]:
    """The kept rows, and for each row the one kept for it (-1 for none)."""
    arguments = ["balance", str(run), "--embeddings", str(run.parent / "rows.npy"), *THRESHOLD, *flags]
    assert cli.main(arguments) == code
    if code:
        return [], []
    kept, set_of = (np.load(run / "balance" / name) for name in ("kept.npy", "set_of.npy"))
    return kept.tolist(), np.where(set_of < 0, -1, kept[set_of]).tolist()


def listed(run: Path, name: str, *keys: str) -> str:
    path = run.parent / f"{name}.txt"
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


@pytest.mark.slow
def test_protected_images_stay_and_of_their_sets_no_other(run: Path) -> None:
    path = listed(run, "mine", "rows/0", "rows/4", "rows/7", "not among these")
    assert balance(run, "--balance.protect", path) == ([0, 4, 5, 7], [0, 0, 4, 4, 4, 5, 5, 7])
    everything = list(range(len(DEGREES)))
    assert balance(run, "--balance.protect", "ro*") == (everything, everything)
    assert balance(run, "--balance.protect", path, "{rows,other}")[0] == everything


@pytest.mark.slow
def test_an_entry_that_protects_nothing_is_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    balance(run, "--balance.protect", listed(run, "others", "row/0"), code=1)
    assert "names none of the images, which are of sources such as 'rows' and have keys such as 'rows/0'" in (
        capfd.readouterr().err
    )
    balance(run, "--balance.protect", "*.tar", code=1)
    assert "*.tar names none of the images" in capfd.readouterr().err


@pytest.mark.slow
def test_images_near_an_evaluation_are_removed_and_listed_with_their_match(run: Path) -> None:
    np.save(run.parent / "test.npy", 3 * on_circle((200, 91, 179.5, 88)))
    np.save(run.parent / "far.npy", on_circle((270,)))
    sets = ("--balance.against", "mine", str(run.parent / "test.npy"), "far", str(run.parent / "far.npy"))
    kept, kept_for = balance(run, *sets)
    assert kept == [2]
    assert kept_for == [2, 2, 2, 2, 2, -1, -1, -1]

    table = pq.read_table(run / "balance" / "against.parquet")
    assert table.schema.metadata == {b"metric": b"euclidean"}
    lines = table.to_pylist()
    assert [(line["row"], line["key"], line["set"], line["match"]) for line in lines] == [
        (5, "rows/5", "mine", "row 1"),
        (6, "rows/6", "mine", "row 1"),
        (7, "rows/7", "mine", "row 2"),
    ]
    chords = [2 * np.sin(np.radians(degrees) / 2) for degrees in (1, 1, 0.5)]
    assert [line["distance"] for line in lines] == pytest.approx(chords, abs=1e-6)

    record = RunFolder(run).record("balance")
    assert record is not None
    compared = read_summary(BalanceSummary, record.summary).against
    assert compared is not None
    assert [(one.name, one.images, one.near) for one in compared] == [("mine", 4, 3), ("far", 1, 0)]
    assert "mine (4 images): 3; far (1 images): 0." in (run / "balance.html").read_text()

    assert cli.main(["subset", str(run), str(run.parent / "list")]) == 0
    left_out = pq.read_table(run.parent / "list" / "removed.parquet").to_pylist()
    assert [line["reason"] for line in left_out] == ["duplicate"] * 4 + ["near an image of mine"] * 3
    assert [line["kept_row"] for line in left_out] == [2] * 4 + [None] * 3


@pytest.mark.slow
def test_other_images_in_the_set_make_the_balance_stale_and_its_place_does_not(run: Path) -> None:
    np.save(run.parent / "test.npy", on_circle((91,)))
    assert balance(run, "--balance.against", "mine", str(run.parent / "test.npy"))[0] == [2, 7]
    (run.parent / "test.npy").rename(run.parent / "moved.npy")
    before = RunFolder(run).record("balance")
    assert balance(run, "--balance.against", "mine", str(run.parent / "moved.npy"))[0] == [2, 7]
    assert RunFolder(run).record("balance") == before
    np.save(run.parent / "moved.npy", on_circle((181,)))
    assert balance(run)[0] == [2, 5]


@pytest.mark.slow
def test_what_must_stay_and_must_go_is_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.save(run.parent / "test.npy", on_circle((91, 180)))
    against = ("--balance.against", "mine", str(run.parent / "test.npy"))
    balance(run, *against, "--balance.protect", listed(run, "keep", "rows/7"), code=1)
    assert "balance.against removes 1 image that balance.protect or balance.decisions keeps" in capfd.readouterr().err
    np.save(run.parent / "test.npy", np.ones((2, 3)))
    balance(run, *against, code=1)
    assert "mine has embeddings of width 3, the images of 2" in capfd.readouterr().err
    (run.parent / "pictures").mkdir()
    balance(run, "--balance.against", "mine", str(run.parent / "pictures"), code=2)
    assert "mine has images, but the embeddings were made elsewhere" in capfd.readouterr().err


@pytest.mark.slow
def test_a_threshold_rules_over_a_remembered_share_and_both_at_once_are_refused(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["balance", str(run), "--embeddings", str(run.parent / "rows.npy"), "--balance.metric", "euclidean"]
    assert cli.main([*arguments, "--target-removed", "0.1", "--balance.max-threshold", "0.1"]) == 0
    assert len(np.load(run / "balance" / "kept.npy")) == 7
    assert cli.main([*arguments, "--threshold", "0.1"]) == 0
    assert len(np.load(run / "balance" / "kept.npy")) == 3
    assert "so balance.target_removed: 0.1 of the recipe no longer counts" in capfd.readouterr().err

    assert cli.main([*arguments, "--threshold", "0.1", "--target-removed", "0.1"]) == 2
    assert "has no effect with balance.target_removed: 0.1, and both are given" in capfd.readouterr().err
