import gc
import hashlib
import io
import itertools
import json
import os
import signal
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fabricated_run import make_recipe, make_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.compat import WebDataset

from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.format import SourceFile
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.tars import METADATA, scan_tar
from clip_cid.errors import ClipCidError, ConfigError, DataError, RunError
from clip_cid.file_digests import sha256_file
from clip_cid.publish import subset
from clip_cid.publish.removed_rows import removed_rows, write_removed
from clip_cid.publish.subset import ClusterDraw, export_subset, image_extension, key_of_stem, member_stem
from clip_cid.recipe import PairsConfig, Recipe
from clip_cid.run_folder import RunFolder, StageRecord

DIM = 4


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def sample(key: str, seed: int) -> list[tuple[str, bytes]]:
    """A sample with a member that is none of ours, an extension in capitals, and json that no writer would give twice."""
    return [
        (f"{key}.PNG", picture(seed)),
        (f"{key}.txt", f"  caption of {key}\n".encode()),
        (f"{key}.json", f'{{ "captions":["one {key}",  "two"], "x": 1.50 }}'.encode()),
        (f"{key}.cls", b"7"),
    ]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uid, member.uname = len(data), 1_700_000_000, 501, "someone"
            tar.addfile(member, io.BytesIO(data))


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def publish(folder: RunFolder, stage: str) -> None:
    folder.publish(
        StageRecord(
            stage, f"key of {stage}", 1, {}, {}, {}, {}, "cpu", started="2026-01-01T00:00:00+00:00", seconds=1.0
        )
    )


def write_run(path: Path, keys: list[str], kept: list[int], source: Path | str | None, **pairs: Any) -> Recipe:
    """The finished embed and balance stages of a run whose embedding store has these keys."""
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).normal(size=(len(keys), DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    writer = StoreWriter(
        folder.begin("embed", {"key": "k"}, resumable=False).part, teacher={}, dim=DIM, fields=(), num_shards=1
    )
    ok, captions = np.ones(len(keys), dtype=bool), [("c",)] * len(keys)
    writer.add(ShardRows("s", rows, rows, rows[:0], ok, keys, captions, [(1, 1)] * len(keys), {}, []))
    writer.finish()
    publish(folder, "embed")
    part = folder.begin("balance", {"key": "k"}, resumable=False).part
    np.save(part / "kept.npy", np.array(kept, dtype=np.int64))
    table = {"key": pa.array([keys[row] for row in kept], pa.large_string()), "row": kept, "set_size": [1] * len(kept)}
    pq.write_table(pa.table(table), part / "kept.parquet")
    publish(folder, "balance")
    settings = {"source": [str(source)] if source is not None else [], **pairs}
    return Recipe.model_validate({"pairs": settings, "embed": {"teacher": "run:somewhere"}})


KEYS = [f"{number:03d}" for number in range(10)]
STORE_ORDER = KEYS[5:] + KEYS[:5]  # not that of the pairs
KEPT = [0, 1, 4, 5, 7, 8, 9]  # 005 006 009 000 002 003 004
KEPT_IN_PAIRS_ORDER = ["000", "002", "003", "004", "005", "006", "009"]


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, Recipe]:
    """A run over two tars of six and four samples."""
    write_tar(tmp_path / "tars" / "a.tar", [one for seed, key in enumerate(KEYS[:6]) for one in sample(key, seed)])
    write_tar(tmp_path / "tars" / "b.tar", [one for seed, key in enumerate(KEYS[6:], 6) for one in sample(key, seed)])
    recipe = write_run(tmp_path / "run", STORE_ORDER, KEPT, tmp_path / "tars" / "{a,b}.tar")
    return RunFolder(tmp_path / "run"), recipe


def by_webdataset(*paths: str) -> list[dict[str, Any]]:
    """What the library itself loads, images decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it leaves its files for the garbage collector to close
        loaded: Any = WebDataset(list(paths), shardshuffle=False).decode("rgb8")
        samples = list(loaded)
        gc.collect()
    return samples


def tree(folder: Path) -> dict[str, bytes]:
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


# Keys


def test_the_keys_are_those_kept_in_the_order_of_the_store(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    export_subset(*run, tmp_path / "out", shard_size=None)
    expected = ["005", "006", "009", "000", "002", "003", "004"]
    assert (tmp_path / "out" / "keys.txt").read_text() == "".join(f"{key}\n" for key in expected)
    assert pq.read_table(tmp_path / "out" / "keys.parquet").to_pydict() == {"key": expected}
    expected_files = ["keys.parquet", "keys.txt", "manifest.json", "removed.parquet", "rows.npy"]
    assert sorted(tree(tmp_path / "out")) == expected_files
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["finished"], manifest["count"], manifest["shards"]) == (True, 7, None)
    assert manifest["kept_sha256"] == sha256_file(run[0].path / "balance" / "kept.npy")
    assert manifest["keys_sha256"] == hashlib.sha256((tmp_path / "out" / "keys.txt").read_bytes()).hexdigest()


def test_a_run_without_pairs_exports_keys_and_says_why_there_are_no_tars(tmp_path: Path) -> None:
    recipe = write_run(tmp_path / "run", ["a/0", "a/1"], [1], None)
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=None)
    assert (tmp_path / "out" / "keys.txt").read_text() == "a/1\n"
    with pytest.raises(ConfigError, match="no pairs") as error:
        export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "tars", shard_size=5)
    assert "pairs.source" in error.value.fix
    assert not (tmp_path / "tars").exists()


@pytest.mark.parametrize("key", ["two\nlines", "return\r"])
def test_a_key_with_a_line_break_is_refused(tmp_path: Path, key: str) -> None:
    recipe = write_run(tmp_path / "run", ["a", key], [0, 1], None)
    with pytest.raises(DataError, match="1 keys hold a line break"):
        export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=None)
    assert not (tmp_path / "out").exists()


def test_a_run_without_balance_says_which_command_is_missing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="balance stage has not finished") as error:
        export_subset(RunFolder(tmp_path / "run"), Recipe(), tmp_path / "out", shard_size=None)
    assert "clip-cid balance" in error.value.fix


# Tars from tars


def test_the_tars_hold_every_kept_sample_byte_for_byte_in_the_order_of_the_pairs(
    tmp_path: Path, run: tuple[RunFolder, Recipe]
) -> None:
    export_subset(*run, tmp_path / "out", shard_size=3)
    found = [members(tmp_path / "out" / "shards" / f"{number:05d}.tar") for number in range(3)]
    expected = [sample(key, int(key)) for key in KEPT_IN_PAIRS_ORDER]
    assert [len(tar) for tar in found] == [12, 12, 4]
    assert list(itertools.chain(*found)) == list(itertools.chain(*expected))
    assert not (tmp_path / "out" / "shards" / "00003.tar").exists()


def test_the_manifest_names_each_tar_with_its_digest(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    export_subset(*run, tmp_path / "out", shard_size=3)
    shards = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert [(file["name"], file["pairs"]) for file in shards["files"]] == [
        ("shards/00000.tar", 3),
        ("shards/00001.tar", 3),
        ("shards/00002.tar", 1),
    ]
    for file in shards["files"]:
        path = tmp_path / "out" / file["name"]
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256_file(path))
    assert shards["sources"]["source"] == [Path(source).name for source in run[1].pairs.source]


def test_the_manifest_holds_no_secret_and_no_local_path(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    folder, recipe = run
    secret = "pipe:curl -H 'Authorization: SECRET' https://user:SECRET@host/a.tar?token=SECRET"
    sources = (*recipe.pairs.source, secret)
    kept = subset._read_kept(folder, recipe, ClusterDraw())
    plan = subset._plan(folder, recipe.pairs.model_copy(update={"source": sources}), kept, 3)
    other = subset._plan(folder, recipe.pairs.model_copy(update={"source": (*sources[:-1], secret + "2")}), kept, 3)
    assert plan is not None
    assert other is not None
    written = json.dumps(plan.described)
    assert "SECRET" not in written
    assert str(tmp_path) not in written

    # Where nobody recorded the contents, the true sources decide, also against a manifest that names them.
    assert plan.sources["contents"] is None
    assert subset._same_pairs(plan.sources, plan.sources)
    assert not subset._same_pairs(other.sources, plan.sources)
    assert subset._same_pairs({"source": list(sources)}, plan.sources)
    assert not subset._same_pairs({"source": list(recipe.pairs.source)}, plan.sources)


@pytest.mark.slow
def test_webdataset_and_our_own_reader_read_the_tars_and_the_pixels_are_equal(
    tmp_path: Path, run: tuple[RunFolder, Recipe]
) -> None:
    export_subset(*run, tmp_path / "out", shard_size=4)
    paths = [str(tmp_path / "out" / "shards" / f"0000{number}.tar") for number in range(2)]
    theirs = by_webdataset(*paths)
    assert [one["__key__"] for one in theirs] == KEPT_IN_PAIRS_ORDER
    ours = open_pairs(PairsConfig(source=tuple(paths)))
    assert ours.keys(0, len(ours)) == KEPT_IN_PAIRS_ORDER
    assert not ours.known_bad
    for row, one in enumerate(theirs):
        original = np.asarray(Image.open(io.BytesIO(picture(int(one["__key__"])))))
        assert np.array_equal(one["png"], original)
        assert np.array_equal(np.asarray(decode_image(ours.read(row).image, max_pixels=1000)), original)
        assert ours.read(row).captions == (f"one {one['__key__']}", "two")


def test_the_bytes_depend_on_the_samples_alone(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    export_subset(*run, tmp_path / "one", shard_size=3)
    export_subset(*run, tmp_path / "two", shard_size=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "shards" / "00000.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in tar} == {
            (0, 0, 0, "", 0o644)
        }


def test_kept_keys_that_are_not_among_the_pairs_are_counted_and_the_keys_can_still_be_had(
    tmp_path: Path, run: tuple[RunFolder, Recipe]
) -> None:
    folder, recipe = run
    fewer = recipe.model_copy(update={"pairs": PairsConfig(source=(str(tmp_path / "tars" / "a.tar"),))})
    with pytest.raises(DataError, match=r"2 of 7 kept keys are not among the usable pairs .* such as '006'") as error:
        export_subset(folder, fewer, tmp_path / "out", shard_size=3)
    assert "leave --shards out" in error.value.fix
    assert tree(tmp_path / "out") == {}
    export_subset(folder, fewer, tmp_path / "out", shard_size=None)
    assert len((tmp_path / "out" / "keys.txt").read_text().splitlines()) == 7
    export_subset(folder, recipe, tmp_path / "out", shard_size=3)  # the pairs are mended
    assert len(list((tmp_path / "out" / "shards").glob("*.tar"))) == 3


def test_a_kept_pair_that_is_broken_among_the_pairs_is_counted_as_missing(
    tmp_path: Path, run: tuple[RunFolder, Recipe]
) -> None:
    both = [one for seed, key in enumerate(KEYS) for one in sample(key, seed) if one[0] != "003.PNG"]
    write_tar(tmp_path / "c.tar", both)
    recipe = run[1].model_copy(update={"pairs": PairsConfig(source=(str(tmp_path / "c.tar"),))})
    with pytest.raises(DataError, match=r"1 of 7 kept keys are not among the usable pairs .* such as '003'"):
        export_subset(run[0], recipe, tmp_path / "out", shard_size=3)


@pytest.mark.parametrize("shard_size", [None, 2])
def test_a_list_older_than_the_embeddings_is_refused(
    tmp_path: Path, run: tuple[RunFolder, Recipe], shard_size: int | None
) -> None:
    folder, recipe = run
    write_run(tmp_path / "other", KEYS, KEPT, None)
    (folder.path / "embed").rename(tmp_path / "old embed")
    (tmp_path / "other" / "embed").rename(folder.path / "embed")
    with pytest.raises(RunError, match="embed was run again after balance"):
        export_subset(folder, recipe, tmp_path / "out", shard_size=shard_size)


def test_a_changed_kept_file_is_refused(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    np.save(run[0].path / "balance" / "kept.npy", np.array([0, 1, 2]))
    with pytest.raises(RunError, match=r"kept\.npy has"):
        export_subset(*run, tmp_path / "out", shard_size=None)


def test_a_tar_that_changed_after_it_was_indexed_is_refused(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    pairs = open_pairs(run[1].pairs)
    with open(tmp_path / "tars" / "b.tar", "ab") as handle:
        handle.write(bytes(10240))
    with pytest.raises(DataError, match=r"b\.tar: changed or went away"):
        list(pairs.original_files(np.array([0, 8])))


def test_original_files_are_those_of_the_rows_asked_for_and_other_tars_are_left_alone(
    tmp_path: Path, run: tuple[RunFolder, Recipe]
) -> None:
    pairs = open_pairs(run[1].pairs)
    for rows in ([], [0], [5, 6], [1, 4, 9], range(10)):
        expected = [sample(KEYS[row], row) for row in rows]
        assert list(pairs.original_files(np.array(rows, dtype=np.int64))) == expected
    (tmp_path / "tars" / "a.tar").unlink()
    assert list(pairs.original_files(np.array([7]))) == [sample("007", 7)]


# Going on, and refusing


class Killed(BaseException):
    """Stands for a kill at a certain write."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Stop at the `number`-th sample that would be read."""
    original, seen = Pairs.original_files, iter(range(10**9))

    def until(self: Pairs, rows: np.ndarray) -> Any:
        for files in original(self, rows):
            if next(seen) == number:
                raise Killed
            yield files

    monkeypatch.setattr(Pairs, "original_files", until)


@pytest.mark.resume
@pytest.mark.parametrize("number", range(7))
def test_a_killed_export_goes_on_and_leaves_the_same_bytes(
    tmp_path: Path, run: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    export_subset(*run, tmp_path / "whole", shard_size=2)
    with monkeypatch.context() as patch:
        kill_at(patch, number)
        with pytest.raises(Killed):
            export_subset(*run, tmp_path / "out", shard_size=2)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["finished"] is False
    (tmp_path / "out" / "shards" / ".00009.tar.tmp-1").write_bytes(b"torn")
    with open(tmp_path / "out" / "shards" / "finished.jsonl", "a") as journal:
        journal.write('{"name": "shards/000')
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").glob("0*.tar")}
    assert len(times) == number // 2
    export_subset(*run, tmp_path / "out", shard_size=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert {name: (tmp_path / "out" / "shards" / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.resume
@pytest.mark.parametrize("damage", [b"\0" * 40, b"[", b'[1]\n{"name": 3}\n', b"\xff\xff\n"])
def test_a_damaged_list_of_finished_tars_is_said_and_they_are_written_again(
    tmp_path: Path,
    run: tuple[RunFolder, Recipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: bytes,
) -> None:
    export_subset(*run, tmp_path / "whole", shard_size=2)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            export_subset(*run, tmp_path / "out", shard_size=2)
    journal = tmp_path / "out" / "shards" / "finished.jsonl"
    journal.write_bytes(damage + journal.read_bytes()[len(damage) :])
    export_subset(*run, tmp_path / "out", shard_size=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert "finished.jsonl: damaged" in caplog.text or damage.startswith(b"[1]")


def killed_export(left: int, run: Path, recipe: Recipe, out: Path) -> None:
    replace = os.replace

    def killing(source: Path, target: Path) -> None:
        nonlocal left
        replace(source, target)
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killing
    export_subset(RunFolder(run), recipe, out, shard_size=2)


@pytest.mark.slow
@pytest.mark.resume
def test_a_process_killed_by_the_system_goes_on(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    """SIGKILL right after each rename in turn, until the command ends by itself."""
    folder, recipe = run
    export_subset(folder, recipe, tmp_path / "whole", shard_size=2)
    codes = []
    for renames in (0, 1, 4, 100):
        codes.append(processes.exit_code(killed_export, renames, folder.path, recipe, tmp_path / "out"))
        assert codes[-1] in (0, -signal.SIGKILL)
    assert codes[0] == codes[1] == -signal.SIGKILL
    assert codes[-1] == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_finished_export_writes_nothing_again_and_mends_a_damaged_tar(
    tmp_path: Path, run: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    export_subset(*run, tmp_path / "out", shard_size=2)
    before = tree(tmp_path / "out")
    with monkeypatch.context() as patch:
        kill_at(patch, 0)
        export_subset(*run, tmp_path / "out", shard_size=2)
    damaged = bytearray(before["shards/00001.tar"])
    damaged[700] ^= 1
    (tmp_path / "out" / "shards" / "00001.tar").write_bytes(damaged)
    (tmp_path / "out" / "shards" / "00003.tar").unlink()
    untouched = (tmp_path / "out" / "shards" / "00000.tar").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            export_subset(*run, tmp_path / "out", shard_size=2)
    export_subset(*run, tmp_path / "out", shard_size=2)
    assert tree(tmp_path / "out") == before
    assert (tmp_path / "out" / "shards" / "00000.tar").stat().st_mtime_ns == untouched


def test_tars_are_added_to_keys_and_keys_alone_leave_the_tars(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    export_subset(*run, tmp_path / "out", shard_size=None)
    export_subset(*run, tmp_path / "out", shard_size=2)
    export_subset(*run, tmp_path / "whole", shard_size=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    export_subset(*run, tmp_path / "out", shard_size=None)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.resume
def test_an_export_killed_before_its_manifest_goes_on(
    tmp_path: Path, run: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(subset, "write_table", stop)
        with pytest.raises(Killed):
            export_subset(*run, tmp_path / "out", shard_size=None)
    assert (tmp_path / "out" / "keys.txt").exists()
    export_subset(*run, tmp_path / "out", shard_size=None)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["finished"] is True


def test_the_folder_of_another_list_is_refused_and_left_alone(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    folder, recipe = run
    export_subset(folder, recipe, tmp_path / "out", shard_size=2)
    before = tree(tmp_path / "out")
    write_run(tmp_path / "fewer", STORE_ORDER, KEPT[:-1], None)
    write_run(tmp_path / "keys", [f"x{key}" for key in STORE_ORDER], KEPT, None)
    for name, differ in (("fewer", "7 keys there, 6 now"), ("keys", "keys_sha256 differ")):
        with pytest.raises(DataError, match=differ) as error:
            export_subset(RunFolder(tmp_path / name), Recipe(), tmp_path / "out", shard_size=None)
        assert "another folder" in error.value.fix
    with pytest.raises(ConfigError, match="of 2 pairs each, not 3"):
        export_subset(folder, recipe, tmp_path / "out", shard_size=3)
    (tmp_path / "c").mkdir()
    write_tar(tmp_path / "c" / "a.tar", [one for seed, key in enumerate(KEYS) for one in sample(key, seed + 1)])
    other = recipe.model_copy(update={"pairs": PairsConfig(source=(str(tmp_path / "c" / "a.tar"),))})
    with pytest.raises(DataError, match="its tars are of other pairs"):
        export_subset(folder, other, tmp_path / "out", shard_size=2)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("where", ["run", "run/balance", "tars", "tars/a.tar"])
def test_a_folder_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, run: tuple[RunFolder, Recipe], where: str
) -> None:
    (run[0].path / "recipe.yaml").write_text("{}")
    before = {path.name for path in (tmp_path / where).parent.rglob("*")}
    with pytest.raises(DataError, match=r"holds other files|not a subset|a file, not a folder"):
        export_subset(*run, tmp_path / where, shard_size=None)
    assert {path.name for path in (tmp_path / where).parent.rglob("*")} == before


def test_no_pair_in_a_tar_is_refused(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    with pytest.raises(ClipCidError, match="--shard-size: must be at least 1, got 0"):
        export_subset(*run, tmp_path / "out", shard_size=0)


# What is beside the keys


def images_and_table(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(seed))


def test_rows_and_what_is_removed_stand_beside_the_keys(tmp_path: Path, run: tuple[RunFolder, Recipe]) -> None:
    export_subset(*run, tmp_path / "out", shard_size=None)
    assert np.load(tmp_path / "out" / "rows.npy").tolist() == KEPT
    left_out = pq.read_table(tmp_path / "out" / "removed.parquet").to_pydict()
    assert left_out["row"] == [2, 3, 6]
    assert left_out["key"] == [STORE_ORDER[row] for row in (2, 3, 6)]
    assert left_out["reason"] == ["not in the list of kept rows"] * 3  # this balance has no table of sets
    assert left_out["kept_row"] == left_out["distance"] == left_out["kept_key"] == [None] * 3


@pytest.mark.slow
def test_each_removed_row_names_its_reason_its_distance_and_the_kept_row(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    folder = make_run(tmp_path, recipe)
    set_of, kept = (np.load(folder.stage("balance") / name) for name in ("set_of.npy", "kept.npy"))
    store = EmbeddingStore.open(folder.stage("embed"))
    (tmp_path / "out").mkdir()
    write_removed(tmp_path / "out", removed_rows(folder, store, kept), store.keys.packed)

    table = pq.read_table(tmp_path / "out" / "removed.parquet")
    assert table.schema.metadata == {b"metric": b"cosine", b"threshold": b"0.05"}
    lines = table.to_pylist()
    assert [line["row"] for line in lines] == sorted(set(range(len(set_of))) - set(kept.tolist()))
    vectors = store.images[np.arange(store.rows)].astype(np.float64)
    for line in lines[:-1]:
        assert line["reason"] == "duplicate"
        assert line["kept_row"] == kept[set_of[line["row"]]]
        assert (line["key"], line["kept_key"]) == (store.keys[line["row"]], store.keys[line["kept_row"]])
        one, other = (vectors[row] / np.linalg.norm(vectors[row]) for row in (line["row"], line["kept_row"]))
        assert line["distance"] == pytest.approx(1 - one @ other, abs=1e-9)
    assert lines[-1]["reason"].startswith("no embedding: image <i>cannot</i> be decoded")
    assert lines[-1]["kept_row"] is lines[-1]["distance"] is None


def test_of_a_cluster_so_many_are_listed_and_the_others_have_their_reason(
    tmp_path: Path, run: tuple[RunFolder, Recipe]
) -> None:
    folder, recipe = run
    part = folder.begin("cluster", {"key": "k"}, resumable=False).part
    labels = np.array([0, 0, 0, 1, 0, 0, 2], dtype=np.int32)
    np.save(part / "labels.npy", labels)
    publish(folder, "cluster")
    export_subset(folder, recipe, tmp_path / "out", shard_size=10, draw=ClusterDraw(per_cluster=2))
    rows = np.load(tmp_path / "out" / "rows.npy")
    assert sorted(labels[np.isin(KEPT, rows)].tolist()) == [0, 0, 1, 2]
    assert len(members(tmp_path / "out" / "shards" / "00000.tar")) == 4 * len(sample("x", 0))
    left_out = {line["row"]: line["reason"] for line in pq.read_table(tmp_path / "out" / "removed.parquet").to_pylist()}
    beyond = sorted(set(KEPT) - set(rows.tolist()))
    assert len(beyond) == 3
    assert {left_out[row] for row in beyond} == {"beyond the cap of its cluster"}

    with pytest.raises(DataError, match="a subset of another run or of another balance"):
        export_subset(folder, recipe, tmp_path / "out", shard_size=10)
    with pytest.raises(ConfigError, match="--per-cluster: must be at least 1, got 0"):
        export_subset(folder, recipe, tmp_path / "none", shard_size=None, draw=ClusterDraw(per_cluster=0))


def test_a_total_is_shared_by_clusters_of_clusters_and_what_they_are_is_said(
    tmp_path: Path, run: tuple[RunFolder, Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    """Clusters 0 and 1 are of one theme, 3 is of another, and 2 has no image: half of the total for each theme."""
    folder, recipe = run
    part = folder.begin("cluster", {"key": "k"}, resumable=False).part
    labels = np.array([0, 0, 1, 1, 3, 3, 3], dtype=np.int32)
    np.save(part / "labels.npy", labels)
    np.save(part / "centers.npy", np.array([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32))
    publish(folder, "cluster")

    def counts(**draw: Any) -> list[int]:
        out = tmp_path / "-".join(map(str, draw.values()))
        export_subset(folder, recipe, out, shard_size=None, draw=ClusterDraw(**draw))
        left_out = pq.read_table(out / "removed.parquet").to_pylist()
        rows = np.load(out / "rows.npy")
        assert {line["row"] for line in left_out if line["reason"] == "beyond the share of its cluster"} == set(
            KEPT
        ) - set(rows.tolist())
        return np.bincount(labels[np.isin(KEPT, rows)], minlength=4).tolist()

    assert counts(total=6) == [2, 2, 0, 2]
    assert counts(total=4, levels=(2,)) == [1, 1, 0, 2]
    assert "4 images, 2 to 2 (median 2) of each of 2 clusters of clusters" in caplog.text
    assert counts(total=6, levels=(2,)) in ([2, 1, 0, 3], [1, 2, 0, 3])
    assert counts(total=6, levels=(2,), per_cluster=2) == [2, 2, 0, 2]
    assert counts(total=100, levels=(2, 1)) == [2, 2, 0, 3]

    refused: list[tuple[dict[str, Any], str]] = [
        ({"total": 0}, "--total: must be at least 1, got 0"),
        ({"levels": (2,)}, "--levels: there is no total to share"),
        ({"levels": (2,), "per_cluster": 1}, "--levels: there is no total to share"),
        ({"levels": (3,), "total": 4}, "--levels 3: 3 clusters of the 3 below; there must be fewer"),
        ({"levels": (1, 2), "total": 4}, "--levels 1 2: 2 clusters of the 1 below"),
        ({"levels": (0,), "total": 4}, "--levels 0: 0 clusters of the 3 below; there must be fewer, and at least 1"),
    ]
    for draw, words in refused:
        with pytest.raises(ConfigError, match=words):
            export_subset(folder, recipe, tmp_path / "none", shard_size=None, draw=ClusterDraw(**draw))
        assert not (tmp_path / "none").exists()


CSV = (
    '\ufeffimage,caption,"more, of it"\r\n'
    'a.png,"two\r\nlines, with ""quotes""",1\r\n'
    "\r\n"
    "b.png,plain,2\r\n"
    '"c.png",last without an end,3'
)


@pytest.mark.parametrize(
    ("name", "text", "kept", "expected"),
    [
        ("t.csv", CSV, [0, 2], CSV.replace("b.png,plain,2\r\n", "").replace("1\r\n\r\n", "1\r\n")),
        ("t.csv", CSV, [1], CSV[: CSV.index("a.png")] + "b.png,plain,2\r\n"),
        ("t.tsv", 'image\tcaption\na.png\t6" tall\nb.png\tx\nc.png\ty\n', [0, 2], 'image\tcaption\na.png\t6" tall\nc.png\ty\n'),
        ("t.csv", "image;caption\ra.png;x\rb.png;y\rc.png;z\r", [1, 2], "image;caption\rb.png;y\rc.png;z\r"),
    ],
)  # fmt: skip
def test_a_text_table_comes_back_as_its_kept_lines_byte_for_byte(
    tmp_path: Path, name: str, text: str, kept: list[int], expected: str
) -> None:
    names = ["a.png", "b.png", "c.png"]
    images_and_table(tmp_path, names)
    (tmp_path / name).write_bytes(text.encode())
    recipe = write_run(tmp_path / "run", names, kept, tmp_path / name)
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=None)
    assert (tmp_path / "out" / "tables" / name).read_bytes().decode() == expected


def test_a_parquet_table_keeps_its_columns_metadata_and_compression(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(5)]
    images_and_table(tmp_path, names)
    columns = {
        "image": names,
        "caption": [["a", "b"], ["c"], ["d"], ["e"], ["f"]],
        "size": pa.array([1, None, 3, 4, 5]),
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd", row_group_size=2)
    recipe = write_run(tmp_path / "run", names, [1, 3], tmp_path / "t.parquet")
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=None)
    again = pq.ParquetFile(tmp_path / "out" / "tables" / "t.parquet")
    assert again.read().equals(table.take([1, 3]))
    assert again.schema_arrow.equals(pq.read_schema(tmp_path / "t.parquet"), check_metadata=True)
    assert again.metadata.row_group(0).column(0).compression == "ZSTD"


def test_tables_of_one_name_and_rows_that_are_merged_all_come_back(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        images_and_table(tmp_path / folder, [f"{folder}-a.png", f"{folder}-b.png"])
        lines = [f"{folder}-{name}.png,caption {number}" for number, name in enumerate("abab")]
        (tmp_path / folder / "t.csv").write_text("\n".join(["image,caption", *lines, ""]))
    keys = ["two-a.png", "one-a.png", "one-b.png", "two-b.png"]
    recipe = write_run(tmp_path / "run", keys, [1, 3], tmp_path / "{one,two}" / "t.csv", repeated_rows="merge")
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=None)
    tables = {path.name: path.read_text() for path in (tmp_path / "out" / "tables").iterdir()}
    assert tables == {
        "00000-t.csv": "image,caption\none-a.png,caption 0\none-a.png,caption 2\n",
        "00001-t.csv": "image,caption\ntwo-b.png,caption 1\ntwo-b.png,caption 3\n",
    }


def test_without_the_tables_the_lists_are_written_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_run(tmp_path / "run", ["a.png"], [0], tmp_path / "gone.csv")
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=None)
    assert (tmp_path / "out" / "keys.txt").read_text() == "a.png\n"
    assert not (tmp_path / "out" / "tables").exists()
    assert "tables/ is not written" in caplog.text


# Tars from tables and folders


@pytest.mark.slow
def test_a_table_becomes_tars_with_the_image_as_it_is_and_the_key_in_the_json(tmp_path: Path) -> None:
    keys = ["dir/a.b.jpg", "/abs/../c.PNG", "é d", "noext"]
    images = [picture(0, "JPEG"), picture(1), picture(2, "WEBP"), picture(3, "JPEG")]
    for name, data in zip(("a.b.jpg", "c.PNG", "d.webp", "noext"), images, strict=True):
        (tmp_path / name).write_bytes(data)
    captions = [["one", " two "], ["three"], ["four"], ["five"]]
    columns = {"image": ["a.b.jpg", "c.PNG", "d.webp", "noext"], "key": keys, "caption": captions, "dup": list("abcd")}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    recipe = write_run(
        tmp_path / "run", keys, [0, 1, 2, 3], tmp_path / "t.parquet", key_column="key", keep_fields=["dup"]
    )
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=10)
    found = members(tmp_path / "out" / "shards" / "00000.tar")
    stems = ["dir/a%2Eb%2Ejpg", "%2Fabs%2F%2E%2E%2Fc%2EPNG", "é d", "noext"]
    extensions = ["jpg", "png", "webp", "jpg"]
    assert [name for name, _ in found] == [
        f"{stem}.{extension}"
        for stem, image in zip(stems, extensions, strict=True)
        for extension in (image, "txt", "json")
    ]
    assert [data for name, data in found if not name.endswith((".txt", ".json"))] == images
    assert [json.loads(data)["key"] for name, data in found if name.endswith(".json")] == keys
    again = open_pairs(PairsConfig(source=(str(tmp_path / "out" / "shards" / "00000.tar"),), keep_fields=("dup",)))
    assert [again.read(row).captions for row in range(4)] == [("one", "two"), ("three",), ("four",), ("five",)]
    assert [again.read(row).fields for row in range(4)] == [{"dup": group} for group in "abcd"]
    theirs = by_webdataset(str(tmp_path / "out" / "shards" / "00000.tar"))
    assert [key_of_stem(one["__key__"]) for one in theirs] == keys


def test_merged_captions_are_listed_and_stand_in_the_json_of_made_samples(tmp_path: Path) -> None:
    images_and_table(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "t.csv").write_text("image,caption\na.png,one\nb.png,two\nc.png,three\n")
    recipe = write_run(tmp_path / "run", ["a.png", "b.png", "c.png"], [0, 2], tmp_path / "t.csv")
    merged = pa.table({"row": [2], "key": pa.array(["c.png"], pa.large_string()), "captions": [["three", "two"]]})
    pq.write_table(merged, tmp_path / "run" / "balance" / "captions.parquet")
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=10)
    listed = pq.read_table(tmp_path / "out" / "captions.parquet").to_pylist()
    assert listed == [{"key": "c.png", "captions": ["three", "two"]}]
    files = dict(members(tmp_path / "out" / "shards" / "00000.tar"))
    assert json.loads(files["c%2Epng.json"])["captions"] == ["three", "two"]
    assert json.loads(files["a%2Epng.json"])["captions"] == ["one"]
    assert files["c%2Epng.txt"] == b"three"


def test_merged_captions_take_none_of_the_kept_pair_away(tmp_path: Path) -> None:
    """As where imported embeddings know only the first caption of each image."""
    images_and_table(tmp_path, ["a.png"])
    pq.write_table(pa.table({"image": ["a.png"], "caption": [["one", "two", "three"]]}), tmp_path / "t.parquet")
    recipe = write_run(tmp_path / "run", ["a.png"], [0], tmp_path / "t.parquet")
    merged = pa.table({"row": [0], "key": pa.array(["a.png"], pa.large_string()), "captions": [["one", "other"]]})
    pq.write_table(merged, tmp_path / "run" / "balance" / "captions.parquet")
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=10)
    files = dict(members(tmp_path / "out" / "shards" / "00000.tar"))
    assert json.loads(files["a%2Epng.json"])["captions"] == ["one", "two", "three", "other"]


def test_a_folder_becomes_tars_whose_keys_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for number, name in enumerate(("b", "sub/a", "sub/c")):
        (tmp_path / "data" / f"{name}.png").write_bytes(picture(number))
        (tmp_path / "data" / f"{name}.txt").write_text(f"caption {name}\nsecond\n")
    recipe = write_run(tmp_path / "run", ["b", "sub/a", "sub/c"], [0, 2], tmp_path / "data")
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=1)
    again = open_pairs(PairsConfig(source=(str(tmp_path / "out" / "shards" / "*.tar"),)))
    assert [again.read(row) for row in range(2)] == [
        subset_pair("b", picture(0)),
        subset_pair("sub/c", picture(2)),
    ]


def subset_pair(key: str, image: bytes) -> Any:
    from clip_cid.data.pairs.pair import Pair

    return Pair(key, image, (f"caption {key}", "second"), {})


def test_an_image_that_went_away_is_named_and_the_export_goes_on_when_it_is_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, name in enumerate("abc"):
        (tmp_path / "data" / f"{name}.png").write_bytes(picture(number))
    rows = {"image": [f"data/{name}.png" for name in "abc"], "caption": list("abc")}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    recipe = write_run(tmp_path / "run", rows["image"], [0, 1, 2], tmp_path / "t.parquet")
    (tmp_path / "data" / "c.png").rename(tmp_path / "away.png")
    with pytest.raises(
        DataError, match=r"'data/c\.png' was kept, but cannot be read any more: image .* \(No such file"
    ):
        export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=2)
    (tmp_path / "away.png").rename(tmp_path / "data" / "c.png")
    assert "3 keys, and their pairs in 2 tars" in export_subset(
        RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=2
    )


def test_an_image_that_tars_do_not_know_keeps_its_extension_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.gif").write_bytes(picture(0, "GIF"))
    pq.write_table(pa.table({"image": ["a.gif"], "caption": ["a"]}), tmp_path / "t.parquet")
    recipe = write_run(tmp_path / "run", ["a.gif"], [0], tmp_path / "t.parquet")
    export_subset(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", shard_size=2)
    assert members(tmp_path / "out" / "shards" / "00000.tar")[0] == ("a%2Egif.gif", picture(0, "GIF"))
    assert "1 images are not .jpg, .png, .jpeg, .webp" in caplog.text


@pytest.mark.parametrize(
    ("name", "image", "extension"),
    [
        ("a.JPG", b"", "jpg"),
        ("a.jpeg", b"", "jpeg"),
        ("a", picture(0), "png"),
        ("a.tiff", b"II*", "tiff"),
        ("a", b"", "image"),
    ],
)
def test_an_image_is_named_by_its_extension_or_its_first_bytes(name: str, image: bytes, extension: str) -> None:
    assert image_extension(name, image) == extension


keys = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], include_characters="./\\_%:~ -é"), min_size=1, max_size=12
) | st.lists(st.sampled_from(["..", ".", "", "a", "__meta__", "a.b", "%2E", "c:"]), min_size=1).map("/".join).filter(
    bool
)


@pytest.mark.slow
@given(keys)
def test_every_key_makes_a_safe_name_that_gives_the_key_back(key: str) -> None:
    stem = member_stem(key)
    assert key_of_stem(stem) == key
    assert not any(letter in stem for letter in ".\\\0:\n")
    assert not stem.startswith("/")
    assert "" not in stem.split("/")
    assert not METADATA.match(stem)


@pytest.mark.slow
@given(st.lists(keys, min_size=1, max_size=5, unique=True))
def test_a_tar_of_any_keys_has_one_sample_for_each(tmp_path_factory: pytest.TempPathFactory, some: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "keys.tar"
    with tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for key in some:
            tar.addfile(tarfile.TarInfo(f"{member_stem(key)}.png"))
            tar.addfile(tarfile.TarInfo(f"{member_stem(key)}.txt"))
    assert [key_of_stem(stem) for stem in scan_tar(SourceFile.of("keys", path)).column("key").to_pylist()] == some
