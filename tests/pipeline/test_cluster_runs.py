"""The cluster stage on embeddings from elsewhere: killed and resumed, refused, reported. Results are compared byte for byte."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid import cli, tasks
from clip_cid.method.cluster import range_tasks
from clip_cid.run_folder import RunFolder
from clip_cid.stages import cluster as stage

FILES = ("centers.npy", "labels.npy")
ROUNDS = 5


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    return given_in(tmp_path)


def given_in(folder: Path) -> list[str]:
    """Flags: 300 rows in some 20 clusters, of which 280 are kept, and 64 centers."""
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((20, 12))
    rows = oracles.unit(middles[rng.integers(0, 20, 300)] + 0.4 * rng.standard_normal((300, 12)))
    np.save(folder / "rows.npy", rows.astype(np.float16))
    np.save(folder / "kept.npy", np.sort(rng.permutation(300)[:280]))
    flags = ["--embeddings", str(folder / "rows.npy"), "--kept", str(folder / "kept.npy")]
    return [*flags, "--cluster.num-centers", "64", "--cluster.iterations", str(ROUNDS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clusters of what is given, by a training that was never stopped. Only to be read."""
    folder = tmp_path_factory.mktemp("clusters")
    return cluster(folder / "whole", given_in(folder))


def cluster(run: Path, given: list[str], *flags: str) -> Path:
    assert cli.main(["cluster", str(run), *given, *flags]) == 0
    return run / "cluster"


def summary_of(run: Path) -> dict[str, Any]:
    record = RunFolder(run).record("cluster")
    assert record is not None
    return record.summary


def assert_equal(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert summary_of(one.parent) == summary_of(other.parent)
    assert sorted(path.name for path in one.iterdir()) == sorted(["manifest.json", *FILES])


def killed(left: int, where: str, command: list[str]) -> None:
    """The command, in a process that is killed before, within or after its `left`-th write of a state."""
    write = stage._StateFile.write

    def torn(handle: Any, **arrays: Any) -> None:
        handle.write(b"half")
        handle.flush()
        kill()

    def killing(self: Any, state: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0 and where == "before":
            kill()
        if left == 0 and where == "within":
            stage.np.savez = torn
        write(self, state)
        if left == 0:
            kill()

    stage._StateFile.write = killing
    sys.exit(cli.main(command))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def assert_killed(left: int, where: str, run: Path, flags: list[str]) -> None:
    assert processes.exit_code(killed, left, where, ["cluster", str(run), *flags]) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.resume
def test_a_killed_training_goes_on_after_the_last_round_and_ends_byte_identical(tmp_path, given, whole, capsys):
    states = 0
    for after, where in ((1, "after"), (2, "within"), (2, "before")):
        assert_killed(after, where, tmp_path / "cut", given)
        states += after - (where != "after")
        training = np.load(tmp_path / "cut" / "cluster.part" / "work" / "training.npz")
        done = states - 1  # the first state has the centers before the first round
        assert len(json.loads(str(training["history"]))[1]) == done
    capsys.readouterr()
    assert_equal(cluster(tmp_path / "cut", given), whole)
    said = (tmp_path / "cut" / "run.log").read_text()
    assert "resuming" in said
    assert f"cluster   resumes after round {done} of {ROUNDS}" in said


@pytest.mark.slow
@pytest.mark.resume
def test_a_training_killed_in_the_last_assignment_does_no_round_again(tmp_path, given, whole, monkeypatch):

    def stop(self: Any, images: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage._Progress, "assigned", stop)
        assert cli.main(["cluster", str(tmp_path / "cut"), *given]) == 130
    monkeypatch.setattr(stage._Progress, "round", None)
    assert_equal(cluster(tmp_path / "cut", given), whole)


def of_tasks(monkeypatch) -> None:
    """Ranges of some rows, as more rows have by themselves."""
    monkeypatch.setattr(range_tasks, "_LEAST_ROWS", 40)
    monkeypatch.setattr(range_tasks, "_ROWS_PER_CENTER", 1)


def killed_by_tasks(left: int, command: list[str]) -> None:
    """The command, in a process that is killed when it is told of so many tasks."""
    range_tasks._LEAST_ROWS, range_tasks._ROWS_PER_CENTER = 40, 1
    original = tasks.run_tasks

    def killing(tasks: Any, begin: Any, *, on_done: Any, **rest: Any) -> None:
        def count(task: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                kill()
            on_done(task)

        original(tasks, begin, on_done=count, **rest)

    tasks.run_tasks = killing
    sys.exit(cli.main(command))


@pytest.mark.slow
@pytest.mark.resume
def test_tasks_of_several_processes_leave_the_bytes_of_one_also_after_kills(tmp_path, given, monkeypatch):
    of_tasks(monkeypatch)
    whole = cluster(tmp_path / "whole", given)
    two = [*given, "--machine.balance-processes", "2"]
    assert_equal(cluster(tmp_path / "two", two), whole)
    for after in (3, 20):
        command = ["cluster", str(tmp_path / "cut"), *two]
        assert processes.exit_code(killed_by_tasks, after, command) == -signal.SIGKILL
    assert_equal(cluster(tmp_path / "cut", two), whole)
    said = (tmp_path / "cut" / "run.log").read_text()
    assert "tasks were done before" in said
    assert "resumes after round" in said


@pytest.mark.slow
@pytest.mark.resume
def test_what_tasks_began_one_process_ends_and_the_other_way_round(tmp_path, given, monkeypatch):
    """As before there were tasks, whose state a later version goes on from."""
    of_tasks(monkeypatch)
    whole = cluster(tmp_path / "whole", given)
    two = [*given, "--machine.balance-processes", "2"]
    assert processes.exit_code(killed_by_tasks, 24, ["cluster", str(tmp_path / "one"), *two]) == -signal.SIGKILL
    assert_equal(cluster(tmp_path / "one", given, "--machine.balance-processes", "1"), whole)
    assert "resumes after round" in (tmp_path / "one" / "run.log").read_text()
    assert_killed(3, "after", tmp_path / "other", given)
    assert_equal(cluster(tmp_path / "other", two), whole)
    assert "resumes after round 2" in (tmp_path / "other" / "run.log").read_text()


@pytest.mark.slow
def test_captions_are_clustered_by_tasks_to_the_same_bytes(tmp_path, monkeypatch):
    of_tasks(monkeypatch)
    rng = np.random.default_rng(1)
    folder = tmp_path / "given"
    for kind in ("img_emb", "text_emb"):
        (folder / kind).mkdir(parents=True)
        np.save(folder / kind / f"{kind}_0.npy", oracles.unit(rng.standard_normal((300, 12))).astype(np.float16))
    np.save(tmp_path / "kept.npy", np.arange(20, 300))
    flags = ["--embeddings", str(folder), "--kept", str(tmp_path / "kept.npy"), "--cluster.num-centers", "70"]
    flags += ["--cluster.texts", "--cluster.num-text-centers", "70", "--cluster.iterations", "2"]
    one, two = (cluster(tmp_path / n, flags, "--machine.balance-processes", n) for n in ("1", "2"))
    for name in (*FILES, *(f"text_{name}" for name in FILES)):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert summary_of(tmp_path / "1") == summary_of(tmp_path / "2")


def test_more_processes_share_long_work_as_far_as_their_memory_goes(tmp_path, given, monkeypatch):
    monkeypatch.setattr(stage.tasks, "available_cores", lambda: 8)
    found = []

    class Noted(stage._Work):
        def shared(self, on_assigned=None):
            found.append(self._processes)

    monkeypatch.setattr(stage, "_Work", Noted)
    cluster(tmp_path / "short", given)
    monkeypatch.setattr(stage, "_LONG", 0.0)
    cluster(tmp_path / "long", given)
    monkeypatch.setattr(stage.tasks, "available_memory", lambda: 3.5 * 64 * 12 * 25 / stage._MEMORY_SHARE)
    cluster(tmp_path / "narrow", given)
    cluster(tmp_path / "threads", given, "--machine.threads", "2")
    assert found[::2] == [1, 8, 3, 2]


@pytest.mark.slow
def test_half_a_training_of_other_settings_or_rows_is_not_gone_on_with(tmp_path, given):
    state = tmp_path / "cut" / "cluster.part" / "work" / "training.npz"
    assert_killed(3, "after", tmp_path / "cut", given)
    assert state.is_file()
    other = ["--cluster.seed", "7"]
    assert_equal(
        cluster(tmp_path / "cut", given, *other),
        cluster(tmp_path / "whole", given, *other),
    )
    assert "resumes after" not in (tmp_path / "cut" / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut short", "empty", "zeroed", "damaged", "other rows"])
def test_a_state_that_does_not_fit_is_passed_over_and_said(tmp_path, given, whole, damage):
    assert_killed(3, "after", tmp_path / "cut", given)
    state = tmp_path / "cut" / "cluster.part" / "work" / "training.npz"
    if damage == "cut short":
        state.write_bytes(state.read_bytes()[:-40])
    elif damage == "empty":
        state.write_bytes(b"")
    elif damage == "zeroed":
        state.write_bytes(state.read_bytes()[:200] + bytes(100) + state.read_bytes()[300:])
    elif damage == "damaged":
        state.write_bytes(state.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    else:
        with np.load(state) as stored:
            arrays = dict(stored)
        np.savez(state, centers=arrays["centers"], history=np.array(json.dumps(["another", []])))
    assert_equal(cluster(tmp_path / "cut", given), whole)
    said = (tmp_path / "cut" / "run.log").read_text()
    assert "the k-means starts anew" in said
    assert "resumes after" not in said


def test_the_summary_and_the_log_say_how_it_went(tmp_path, given):
    out = cluster(tmp_path / "run", given)
    centers, labels = np.load(out / "centers.npy"), np.load(out / "labels.npy")
    rows = np.load(tmp_path / "rows.npy").astype(np.float64)[np.load(tmp_path / "kept.npy")]
    assert labels.tolist() == oracles.nearest(rows, centers)
    summary = summary_of(tmp_path / "run")
    assert len(summary["history"]) == ROUNDS
    assert summary["objective"] == pytest.approx(oracles.kmeans_objective(rows, centers, labels), abs=1e-6)
    sizes = np.bincount(labels, minlength=64)
    assert summary["size_quantiles"]["0"] == sizes.min() == summary["smallest"]
    assert summary["size_quantiles"]["1"] == sizes.max() == summary["largest"]
    assert summary["all_pairs_cosine"] < summary["within_cosine"] < 1
    assert summary["margin_sample"] == 280
    assert 0 <= summary["margin_quantiles"]["0"] <= summary["margin_quantiles"]["1"]
    said = (tmp_path / "run" / "run.log").read_text()
    for number in range(1, ROUNDS + 1):
        assert (
            f"cluster   round {number} of {ROUNDS}: objective {summary['history'][number - 1]['objective']:.5f}" in said
        )
    assert "imbalance" in said
    assert "cluster   mean cosine of two images of a cluster" in said


@pytest.mark.slow
def test_threads_change_no_bit(tmp_path, given):
    one, two = (cluster(tmp_path / n, given, "--machine.threads", n) for n in ("1", "2"))
    assert_equal(one, two)


def test_a_recipe_that_names_a_k_means_is_told_that_there_is_one(tmp_path, given, capsys):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("cluster: {algorithm: faiss}\n")
    assert cli.main(["cluster", str(tmp_path / "run"), *given, "--recipe", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "cluster.algorithm: this setting was removed; only one k-means is left, so delete this line" in said
    assert str(recipe) in said


@pytest.mark.slow
def test_mostly_singletons_are_warned_of_with_numbers(tmp_path, given, capsys):
    cluster(tmp_path / "run", given, "--cluster.num-centers", "200")
    single = summary_of(tmp_path / "run")["singletons"]
    assert f"{single} of 200 clusters hold one image; 280 images are few" in (tmp_path / "run" / "run.log").read_text()
    assert cli.main(["cluster", str(tmp_path / "run"), *given, "--cluster.num-centers", "281"]) == 2
    assert "cluster.num_centers: 281 centers for 280 kept images" in capsys.readouterr().err


def named(given: list[str], names: list[str]) -> list[str]:
    """Flags: the same rows, each with a class, or "" for none."""
    rows = Path(given[1])
    keys = [f"k{row}" for row in range(len(names))]
    pq.write_table(pa.table({"key": keys, "thing": names}), rows.with_suffix(".parquet"))
    recipe = rows.with_name("named.yaml")
    recipe.write_text("pairs: {keep_fields: [thing]}\ncluster: {truth_field: thing}\n")
    return [*given, "--recipe", str(recipe)]


def test_purity_is_measured_where_the_data_names_classes(tmp_path: Path, given: list[str], caplog):
    names = [["cat", "dog", ""][row % 3] for row in range(300)]
    labels = np.load(cluster(tmp_path / "run", named(given, names)) / "labels.npy")
    of_clusters = [Counter() for _ in range(64)]
    for row, label in zip(np.load(given[3]), labels, strict=True):
        of_clusters[label].update([names[row]] if names[row] else [])
    known = sum(counts.total() for counts in of_clusters)
    found = summary_of(tmp_path / "run")["truth"]
    assert found["share"] == pytest.approx(sum(max(counts.values(), default=0) for counts in of_clusters) / known)
    assert (found["field"], found["rows"], found["classes"]) == ("thing", known, 2)
    assert f"by 'thing' (2 classes, {known} images)" in caplog.text


def test_a_class_that_no_image_has_is_said_and_nothing_is_measured(tmp_path: Path, given: list[str], caplog):
    cluster(tmp_path / "run", named(given, [""] * 300))
    assert "cluster.truth_field: no kept image has 'thing'" in caplog.text
    assert "truth" not in summary_of(tmp_path / "run")
