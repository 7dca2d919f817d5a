"""The balance stage on embeddings from elsewhere: resumed, shared, grown, swept. Results are compared byte for byte."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import processes
import pytest

from clip_cid import cli, pipeline, tasks
from clip_cid.data.balance.forest_file import read_forest
from clip_cid.data.balance.tables import BalanceTables
from clip_cid.method.balance import plan_choice
from clip_cid.run_folder import RunFolder

FILES = ("kept.npy", "set_of.npy", "forest.parquet", "row_hashes.npy", "sets.parquet", "members.parquet")


def planted(rows: int, *, seed: int = 0) -> np.ndarray:
    """Two near-duplicates in five, some of them equal bit for bit."""
    rng = np.random.default_rng(seed)
    found = oracles.unit(rng.standard_normal((rows, 12)))
    copies = rng.permutation(rows)[: 2 * rows // 5]
    noise = rng.choice([0, 0.02, 0.1], (len(copies), 1)) * rng.standard_normal((len(copies), 12))
    found[copies] = oracles.unit(found[rng.integers(0, rows, len(copies))] + noise)
    return found.astype(np.float16)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_choice, "_LEAST_CHUNK", 50)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The balance of `planted(300)`, never interrupted. Only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_choice, "_LEAST_CHUNK", 50)
        return balance(tmp_path_factory.mktemp("balance") / "whole", planted(300))


def source(run: Path, rows: np.ndarray) -> str:
    """The rows on disk, by one name in all runs: keys are made of it."""
    folder = run.with_name(f"{run.name}-data")
    folder.mkdir(exist_ok=True)
    path = folder / "rows.npy"
    if not path.exists() or np.load(path).tobytes() != rows.tobytes():  # written anew it would be another input
        np.save(path, rows)
    return str(path)


def balance(run: Path, rows: np.ndarray, *flags: str, page: bool = True) -> Path:
    """The folder that the command leaves. The page takes longer than the balance: for the same bytes one is enough."""
    with pytest.MonkeyPatch.context() as patch:
        if not page:
            patch.setattr(pipeline, "_show_balance", lambda *_: None)
        assert cli.main(["balance", str(run), "--embeddings", source(run, rows), *flags]) == 0
    return run / "balance"


def assert_equal(one: Path, other: Path, files: tuple[str, ...] = FILES) -> None:
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_the_stage_finds_what_the_slow_version_finds(tmp_path, small_chunks):
    rows = planted(300)
    out = balance(tmp_path / "run", rows)
    kept, set_of = oracles.balance(rows, 0.07, "cosine")
    assert np.load(out / "kept.npy").tolist() == kept
    assert np.load(out / "set_of.npy").tolist() == set_of
    assert not (out / "work").exists()


@pytest.mark.slow
def test_a_threshold_that_removes_nearly_all_is_warned_of(tmp_path, capsys):
    near = oracles.unit(np.eye(12)[0] + 0.01 * np.random.default_rng(0).standard_normal((50, 12))).astype(np.float16)
    balance(tmp_path / "near", near)
    assert "balance: keeps 1 of 50 images: threshold 0.07 may be wide for these embeddings" in capsys.readouterr().err
    balance(tmp_path / "far", planted(50))
    assert "may be wide" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.resume
def test_an_interrupted_balance_does_only_what_is_missing(tmp_path, small_chunks, whole, monkeypatch):
    rows = planted(300)
    done: list[tuple[int, int]] = []
    original = tasks.run_tasks

    def interrupted(tasks, begin, *, on_done, **rest):
        original(tasks[:4], begin, on_done=on_done, **rest)
        done.extend(tasks[:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "run_tasks", interrupted)
    assert cli.main(["balance", str(tmp_path / "cut"), "--embeddings", source(tmp_path / "cut", rows)]) == 130
    assert not (tmp_path / "cut" / "balance").exists()

    def watched(tasks, begin, *, on_done, **rest):
        assert len(tasks) > 4
        assert not set(tasks) & set(done)
        original(tasks, begin, on_done=on_done, **rest)

    monkeypatch.setattr(tasks, "run_tasks", watched)
    assert_equal(balance(tmp_path / "cut", rows, page=False), whole)


@pytest.mark.slow
@pytest.mark.resume
def test_what_an_older_version_left_is_named_and_done_again(tmp_path, small_chunks, whole, monkeypatch, capsys):
    """It did not record the known rows; links of its tasks must not be taken for ours."""
    rows = planted(300)
    original = tasks.run_tasks

    def interrupted(tasks, begin, *, on_done, **rest):
        original(tasks[:4], begin, on_done=on_done, **rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "run_tasks", interrupted)
    assert cli.main(["balance", str(tmp_path / "cut"), "--embeddings", source(tmp_path / "cut", rows)]) == 130
    monkeypatch.setattr(tasks, "run_tasks", original)

    facts = tmp_path / "cut" / "balance.part" / "work" / "arrays.json"
    written = json.loads(facts.read_text())
    written["arrays"].remove("known")
    facts.write_text(json.dumps(written))
    capsys.readouterr()
    assert_equal(balance(tmp_path / "cut", rows, page=False), whole)
    assert "of another version; its tasks run again" in capsys.readouterr().err


def killed(left: int, command: list[str]) -> None:
    """The command, in a process that is killed when `left` tasks are done, before the last of them is noted."""
    plan_choice._LEAST_CHUNK = 50
    original = tasks.run_tasks

    def killing(tasks: Any, begin: Any, *, on_done: Any, **rest: Any) -> None:
        def count(task: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            on_done(task)

        original(tasks, begin, on_done=count, **rest)

    tasks.run_tasks = killing
    sys.exit(cli.main(command))


@pytest.mark.slow
@pytest.mark.resume
def test_a_killed_balance_ends_byte_identical(tmp_path, small_chunks, whole):
    rows = planted(300)
    command = ["balance", str(tmp_path / "cut"), "--embeddings", source(tmp_path / "cut", rows)]
    for after in (1, 3):
        assert processes.exit_code(killed, after, command) == -signal.SIGKILL
        assert len(list((tmp_path / "cut" / "balance.part" / "work").glob("links-*"))) == (1 if after == 1 else 4)
    assert_equal(balance(tmp_path / "cut", rows, page=False), whole)


def killed_while_removing(left: int, command: list[str]) -> None:
    """The command, in a process that is killed when it has removed `left` files or folders of the work folder."""
    plan_choice._LEAST_CHUNK = 50
    removers = {name: getattr(os, name) for name in ("unlink", "rmdir")}

    def count(name: str) -> Any:
        def remove(path: Any, *arguments: Any, **flags: Any) -> None:
            nonlocal left
            removers[name](path, *arguments, **flags)
            if str(path).endswith((".npy", ".json", "work")):
                left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return remove

    for name in removers:
        setattr(os, name, count(name))
    sys.exit(cli.main(command))


@pytest.mark.slow
@pytest.mark.resume
def test_a_balance_killed_while_it_removes_its_work_ends_byte_identical(tmp_path, small_chunks, whole):
    """`strace -e inject=unlinkat:signal=SIGKILL`: once what is left was taken for whole, and every command failed."""
    rows = planted(300)
    for after in (1, 5, 12):
        cut = tmp_path / f"cut{after}"
        command = ["balance", str(cut), "--embeddings", source(cut, rows)]
        assert processes.exit_code(killed_while_removing, after, command) == -signal.SIGKILL
        assert not (cut / "balance").exists()
        assert_equal(balance(cut, rows, page=False), whole)

    for after in (1, 4):  # of the forced one
        assert processes.exit_code(killed_while_removing, after, [*command, "--force"]) == -signal.SIGKILL
        assert_equal(cut / "balance", whole)
    assert_equal(balance(cut, rows, "--force", page=False), whole)


def nothing(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    """The numbers of an array, or the second half of another file."""
    whole = path.read_bytes()
    start = 128 if path.suffix == ".npy" else len(whole) // 2
    path.write_bytes(whole[:start] + bytes(len(whole) - start))


def header_damaged(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[9:14] = b"((((("
    path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize("damage", [nothing, emptied, cut_short, zeroed, header_damaged])
def test_damaged_work_is_done_again_and_never_trusted(tmp_path, small_chunks, whole, monkeypatch, damage):
    rows = planted(300)
    original, counts = tasks.run_tasks, []

    def interrupted(tasks, begin, *, on_done, **rest):
        original(tasks[:4], begin, on_done=on_done, **rest)
        raise KeyboardInterrupt

    def counted(tasks, begin, *, on_done, **rest):
        counts.append(len(tasks))
        original(tasks, begin, on_done=on_done, **rest)

    for name, again in (
        ("links-00000-00001.npy", 18),  # of 21 tasks
        ("codes.npy", 21),
        ("hashes.npy", 21),
        ("known.npy", 21),
        ("arrays.json", 21),
    ):
        cut = tmp_path / name
        monkeypatch.setattr(tasks, "run_tasks", interrupted)
        assert cli.main(["balance", str(cut), "--embeddings", source(cut, rows)]) == 130
        damage(cut / "balance.part" / "work" / name)
        monkeypatch.setattr(tasks, "run_tasks", counted)
        assert_equal(balance(cut, rows, page=False), whole)
        assert counts.pop() == again, name


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, small_chunks, whole):
    rows = planted(300)
    assert_equal(balance(tmp_path / "shared", rows, "--machine.balance-processes", "2", page=False), whole)


@pytest.mark.slow
def test_another_threshold_looks_at_no_pair_again(tmp_path, small_chunks, monkeypatch):
    rows = planted(300)
    balance(tmp_path / "run", rows, "--balance.max-threshold", "0.2")
    fresh = balance(tmp_path / "fresh", rows, "--balance.threshold", "0.15", page=False)
    monkeypatch.setattr(tasks, "run_tasks", None)
    again = balance(tmp_path / "run", rows, "--balance.threshold", "0.15", "--balance.max-threshold", "0.15")
    assert_equal(again, fresh)


@pytest.mark.slow
def test_a_larger_threshold_than_is_known_looks_again(tmp_path, small_chunks):
    rows = planted(300)
    balance(tmp_path / "run", rows, "--balance.threshold", "0.05")
    again = balance(tmp_path / "run", rows, "--balance.threshold", "0.15")
    assert_equal(again, balance(tmp_path / "fresh", rows, "--balance.threshold", "0.15", page=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (slice(0, 250), slice(0, 300)),
        (slice(20, 300), slice(0, 300)),
        (slice(0, 300), slice(30, 280)),
        (slice(0, 200), slice(100, 300)),
        (slice(0, 100), slice(200, 300)),
    ],
)
def test_rows_that_come_and_go_give_what_a_run_from_scratch_gives(tmp_path, small_chunks, before, after):
    rows = planted(300)
    earlier = balance(tmp_path / "earlier", rows[before], page=False)
    grown = balance(tmp_path / "grown", rows[after], "--balance.grow-from", str(earlier))
    assert_equal(grown, balance(tmp_path / "fresh", rows[after], page=False))


@pytest.mark.slow
def test_a_changed_row_is_a_new_row(tmp_path, small_chunks, whole):
    changed = planted(300)
    changed[7] = changed[250]
    grown = balance(tmp_path / "grown", changed, "--balance.grow-from", str(whole))
    assert_equal(grown, balance(tmp_path / "fresh", changed, page=False))


@pytest.mark.slow
def test_new_rows_that_are_all_copies_of_known_ones_need_no_comparison(tmp_path, small_chunks, monkeypatch):
    rows = planted(200)
    more = np.concatenate([rows, rows[[3, 3, 150]]])
    fresh = balance(tmp_path / "fresh", more, page=False)
    earlier = balance(tmp_path / "earlier", rows, page=False)
    monkeypatch.setattr(tasks, "run_tasks", None)
    assert_equal(balance(tmp_path / "grown", more, "--balance.grow-from", str(earlier)), fresh)


@pytest.mark.slow
def test_growing_looks_at_new_pairs_only(tmp_path, small_chunks, monkeypatch):
    rows = planted(300)
    earlier = balance(tmp_path / "earlier", rows[:250])
    seen: list[tuple[int, int]] = []
    original = tasks.run_tasks

    def watched(tasks, begin, *, on_done, **rest):
        seen.extend(tasks)
        original(tasks, begin, on_done=on_done, **rest)

    monkeypatch.setattr(tasks, "run_tasks", watched)
    balance(tmp_path / "grown", rows, "--balance.grow-from", str(earlier))
    assert {a for a, _ in seen} == {0}  # the one chunk of new rows, against every chunk
    assert len(seen) > 3


@pytest.mark.slow
def test_a_tampered_forest_is_not_built_upon(tmp_path, small_chunks, capfd):
    rows = planted(200)
    earlier = balance(tmp_path / "earlier", rows[:150], page=False)
    path = earlier / "forest.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    flags = ["--embeddings", source(tmp_path / "grown", rows), "--balance.grow-from", str(earlier)]
    assert cli.main(["balance", str(tmp_path / "grown"), *flags]) == 1
    assert "forest.parquet: missing, or changed since a balance stage wrote it" in capfd.readouterr().err
    again = balance(tmp_path / "earlier", rows[:150])  # its own results: made anew
    assert_equal(again, balance(tmp_path / "fresh", rows[:150], page=False))


@pytest.mark.slow
def test_force_makes_the_forest_from_nothing(tmp_path, small_chunks, monkeypatch):
    rows = planted(200)
    balance(tmp_path / "run", rows)
    calls: list[int] = []
    original = tasks.run_tasks
    monkeypatch.setattr(
        tasks, "run_tasks", lambda tasks, *rest, **named: (calls.append(len(tasks)), original(tasks, *rest, **named))
    )
    balance(tmp_path / "run", rows)
    assert calls == []
    balance(tmp_path / "run", rows, "--force")
    assert calls == [10]  # four chunks


@pytest.mark.slow
def test_the_target_share_is_met_by_the_smallest_threshold(tmp_path, small_chunks, capfd):
    rows = planted(300)
    out = balance(tmp_path / "run", rows, "--target-removed", "0.2", "--balance.max-threshold", "0.1")
    record = RunFolder(tmp_path / "run").record("balance")
    assert record is not None
    assert record.summary["removed"] == 60
    threshold = record.summary["threshold"]["cosine"]
    kept, _ = oracles.balance(rows, threshold + 1e-12, "cosine")
    fewer, _ = oracles.balance(rows, threshold - 1e-12, "cosine")
    assert (len(kept), len(fewer)) == (240, 241)
    assert BalanceTables(out).threshold == threshold
    flags = ["--embeddings", source(tmp_path / "other", rows), "--target-removed", "0.99"]
    assert cli.main(["balance", str(tmp_path / "other"), *flags]) == 2
    assert "Give a larger balance.max_threshold" in capfd.readouterr().err


@pytest.mark.slow
def test_a_threshold_given_after_a_share_or_a_list_counts(tmp_path, small_chunks, whole, capfd):
    rows = planted(300)
    out = balance(tmp_path / "run", rows, "--target-removed", "0.1", "--balance.max-threshold", "0.2")
    assert len(np.load(out / "kept.npy")) == 270
    assert_equal(balance(tmp_path / "run", rows, "--balance.threshold", "0.07"), whole, ("kept.npy", "set_of.npy"))
    assert "balance.threshold given, so balance.target_removed: 0.1" in capfd.readouterr().err

    np.save(tmp_path / "k.npy", np.arange(5))
    assert len(np.load(balance(tmp_path / "run", rows, "--kept", str(tmp_path / "k.npy")) / "kept.npy")) == 5
    assert_equal(balance(tmp_path / "run", rows, "--balance.threshold", "0.07"), whole, ("kept.npy", "set_of.npy"))


@pytest.mark.slow
def test_the_sweep_prints_the_curve_of_runs_of_their_own(tmp_path, small_chunks, capfd):
    rows = planted(300)
    out = balance(tmp_path / "run", rows, "--balance.max-threshold", "0.14", "--sweep")
    lines = [line for line in capfd.readouterr().out.splitlines() if "%" in line]
    assert len(lines) == 14  # 0.07 is one of the 14 steps to 0.14
    for line in lines[::5]:
        cells = [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]
        kept, set_of = oracles.balance(rows, float(cells[-6]) * (1 + 1e-4), "cosine")
        assert cells[-3:] == [
            f"{300 - len(kept)}",
            f"{100 * (1 - len(kept) / 300):.2f} %",
            f"{np.bincount(set_of).max()}",
        ]
    assert (tmp_path / "run" / "sweep" / "removed_share.svg").stat().st_size > 1000
    assert read_forest(out / "forest.parquet").limit == pytest.approx(0.28)


@pytest.mark.slow
def test_a_radius_keeps_more_and_says_which(tmp_path, small_chunks):
    angles = np.deg2rad(np.arange(0, 60))
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    out = balance(tmp_path / "run", rows, "--balance.threshold", "0.001", "--balance.max-radius", "0.001")
    distances = BalanceTables(out).distances
    assert distances.max() <= 0.001
    plain = balance(tmp_path / "plain", rows, "--balance.threshold", "0.001")
    assert len(np.load(plain / "kept.npy")) == 1 < len(np.load(out / "kept.npy"))


@pytest.mark.slow
def test_the_giant_of_a_drift_is_warned_of_in_numbers(tmp_path, capfd):
    angles = np.deg2rad(np.linspace(0, 170, 400))
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    balance(tmp_path / "run", rows, "--balance.threshold", "0.01")
    assert "the largest has 400 images (100.0 % of all)" in capfd.readouterr().err


def test_the_best_caption_needs_captions(tmp_path, capfd):
    flags = ["--embeddings", source(tmp_path / "run", planted(50)), "--balance.keep", "best_caption"]
    assert cli.main(["balance", str(tmp_path / "run"), *flags]) == 2
    assert "best_caption needs embeddings of captions" in capfd.readouterr().err


def test_the_manifest_tells_all_three_scales(tmp_path):
    balance(tmp_path / "run", planted(50), "--balance.metric", "euclidean", "--balance.threshold", "0.3")
    summary = json.loads((tmp_path / "run" / "balance" / "manifest.json").read_text())["summary"]
    assert summary["threshold"] == pytest.approx({"cosine": 0.045, "squared_euclidean": 0.09, "euclidean": 0.3})


@pytest.mark.slow
def test_the_list_of_a_stale_balance_is_not_exported(tmp_path, small_chunks, capsys):
    rows, run = planted(300), tmp_path / "run"
    balance(run, rows)
    recipe = (run / "recipe.yaml").read_text()

    def export(name: str) -> int:
        capsys.readouterr()
        return cli.main(["subset", str(run), str(tmp_path / name)])

    assert export("fresh") == 0
    for was, becomes, words in (
        ("threshold: 0.07", "threshold: 0.2", "balance is stale (balance.threshold 0.07 -> 0.2)"),
        ("enabled: true", "enabled: false", "the run's recipe does not use balance"),
        ("normalize: false", "normalize: true", "balance is stale (embed runs again)"),
    ):
        (run / "recipe.yaml").write_text(recipe.replace(was, becomes, 1))
        assert export("stale") != 0
        assert words in capsys.readouterr().err
        assert not (tmp_path / "stale").exists()
    (run / "recipe.yaml").write_text(recipe)

    np.save(run / "balance" / "kept.npy", np.arange(3))
    assert export("stale") == 1
    assert "kept.npy has" in capsys.readouterr().err
    np.save(tmp_path / "run-data" / "rows.npy", planted(300, seed=1))
    assert export("stale") == 1
    assert "balance is stale (embed runs again)" in capsys.readouterr().err


@pytest.mark.slow
def test_an_even_sample_is_of_clusters_that_are_current(tmp_path, small_chunks, capsys):
    run = tmp_path / "run"
    balance(run, planted(100))

    def export(name: str, *flags: str) -> int:
        capsys.readouterr()
        return cli.main(["subset", str(run), str(tmp_path / name), "--total", "20", "--levels", "4", "2", *flags])

    assert export("before") == 1
    assert "cluster" in capsys.readouterr().err
    assert cli.main(["cluster", str(run), "--cluster.num_centers", "12"]) == 0
    assert export("list") == 0
    assert "20 images, 10 to 10 (median 10) of each of 2 clusters of clusters" in capsys.readouterr().err
    assert len((tmp_path / "list" / "keys.txt").read_text().splitlines()) == 20

    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("num_centers: 12", "num_centers: 13"))
    assert export("stale") == 1
    assert "cluster is stale (cluster.num_centers 12 -> 13)" in capsys.readouterr().err
    assert not (tmp_path / "stale").exists()
