"""Embeddings from elsewhere: every layout against the arrays it was written from."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from clip_cid import pipeline
from clip_cid.data.embeddings.importing import _scaled, import_existing
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.training.join import distilled_pairs

DIM = 6


def unit(rows: int, seed: int, dtype: Any = np.float16) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def taken(source: Path, out: Path, **options: Any) -> EmbeddingStore:
    import_existing(source, out, **options)
    return EmbeddingStore.open(out)


def arrays_in(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.npy"))


def test_one_file_of_rows_is_a_store_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "mine.npy", unit(5, 0))
    store = taken(tmp_path / "mine.npy", tmp_path / "out")
    assert np.array_equal(store.images[:], unit(5, 0))
    assert list(store.keys) == [f"mine/{row}" for row in range(5)]
    assert store.ok.all()
    assert store.captions(3) == ("",)
    assert arrays_in(tmp_path / "out") == []
    assert "no text embeddings: balance" in caplog.text
    assert "keys are file and row, such as 'mine/0'" in caplog.text


def test_a_folder_of_files_is_read_in_the_order_people_count_in(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = ["a", "part1", "part02", "part10", "part10b", "z"]
    for seed, name in enumerate(names):
        np.save(tmp_path / "in" / f"{name}.npy", unit(seed + 1, seed))
    store = taken(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(store.images[:], np.concatenate([unit(seed + 1, seed) for seed in range(6)]))
    assert list(store.keys) == [f"{name}/{row}" for seed, name in enumerate(names) for row in range(seed + 1)]


def test_metadata_beside_the_files_gives_the_keys(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for seed, name in enumerate("ab"):
        np.save(tmp_path / "in" / f"{name}.npy", unit(2, seed))
        columns = {"uid": [f"{name}-x", f"{name}-y"], "text": ["one", None], "url": ["u", "v"]}
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{name}.parquet")
    store = taken(tmp_path / "in", tmp_path / "out")
    assert list(store.keys) == ["a-x", "a-y", "b-x", "b-y"]
    assert [store.captions(row) for row in (2, 3)] == [("one",), ("",)]
    assert store.field("url") == ["u", "v", "u", "v"]
    (tmp_path / "in" / "b.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 2 files have no \.parquet of their name, such as b\.npy"):
        import_existing(tmp_path / "in", tmp_path / "again")


def test_files_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    np.save(tmp_path / "in" / "a.npy", unit(2, 0))
    (tmp_path / "in" / "readme.md").write_text("x")
    (tmp_path / "in" / ".hidden").write_text("x")
    import_existing(tmp_path / "in", tmp_path / "out")
    assert "2 other files and folders are not read, such as 'deeper'" in caplog.text


@pytest.fixture
def clip_retrieval(tmp_path: Path) -> Path:
    folder = tmp_path / "laion"
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number in range(11):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", unit(2, number))
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", unit(2, number + 50))
        keys = [f"{number}-0", f"{number}-1"]
        table = pa.table({"key": keys, "caption": ["a", "b"]})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


@pytest.mark.parametrize("without", [("text_emb",), ("metadata",), ("text_emb", "metadata")])
def test_a_clip_retrieval_folder_may_lack_texts_and_metadata(
    tmp_path: Path, clip_retrieval: Path, without: tuple[str, ...]
) -> None:
    for name in without:
        shutil.rmtree(clip_retrieval / name)
    store = taken(clip_retrieval, tmp_path / "out")
    assert np.array_equal(store.images[20:], unit(2, 10))
    assert store.has_texts is ("text_emb" not in without)
    assert store.keys[21] == ("img_emb_10/1" if "metadata" in without else "10-1")
    assert store.captions(21) == ("",) if "metadata" in without else ("b",)
    if store.has_texts:
        assert np.array_equal(store.text_for(np.array([21]), 0), unit(2, 60)[1:])
    assert arrays_in(tmp_path / "out") == []


def write_datacomp(folder: Path, *, dtype: Any = np.float16, compressed: bool = True) -> None:
    """Two shards as DataComp's metadata has them: two models, and a table of uids beside each."""
    folder.mkdir(exist_ok=True)
    for number, stem in enumerate(("0b", "0a")):
        vectors = {
            "b32_img": unit(3, number)[:, :4],
            "b32_txt": unit(3, number + 10)[:, :4],
            "l14_img": unit(3, number + 20, dtype),
            "l14_txt": unit(3, number + 30, dtype),
        }
        with zipfile.ZipFile(
            folder / f"{stem}.npz", "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        ) as archive:
            for name, array in vectors.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.save(member, array)
        columns = {"uid": [f"{stem}{row}" for row in range(3)], "url": ["u"] * 3, "text": ["x", "y", "z"]}
        pq.write_table(pa.table(columns), folder / f"{stem}.parquet")


@pytest.mark.parametrize("compressed", [True, False])
def test_datacomp_shards_are_converted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr("clip_cid.data.embeddings.layouts._BLOCK_ROWS", 2)
    write_datacomp(tmp_path / "in", compressed=compressed)
    store = taken(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(store.images[:], np.concatenate([unit(3, 21), unit(3, 20)]))
    assert np.array_equal(store.texts[:], np.concatenate([unit(3, 31), unit(3, 30)]))
    assert store.images.dtype == np.float16
    assert list(store.keys) == ["0a0", "0a1", "0a2", "0b0", "0b1", "0b2"]
    assert store.captions(4) == ("y",)
    assert store.info.teacher["arrays"] == "l14_img, l14_txt"
    assert len(arrays_in(tmp_path / "out")) == 4
    assert "taking l14_img and l14_txt of the arrays b32_img, b32_txt, l14_img, l14_txt" in caplog.text
    assert caplog.text.count("4 arrays are converted once into") == 1
    shutil.rmtree(tmp_path / "in" / "nothing", ignore_errors=True)
    (tmp_path / "in" / "0a.npz").unlink()  # converted means: not needed any more
    assert np.array_equal(EmbeddingStore.open(tmp_path / "out").images[:3], unit(3, 21))


def test_the_only_model_or_the_only_array_of_an_npz_is_taken(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", b32_img=unit(2, 0))
    store = taken(tmp_path / "b.npz", tmp_path / "out b")
    assert np.array_equal(store.images[:], unit(2, 0))
    assert not store.has_texts
    assert list(store.keys) == ["b/0", "b/1"]
    np.savez(tmp_path / "c.npz", unit(2, 1, np.float32))
    assert np.array_equal(taken(tmp_path / "c.npz", tmp_path / "out c").images[:], unit(2, 1, np.float32))
    np.savez(tmp_path / "d.npz", x=unit(2, 1), y=unit(2, 2))
    with pytest.raises(DataError, match="no array named like l14_img among x, y"):
        import_existing(tmp_path / "d.npz", tmp_path / "out d")


@pytest.mark.resume
def test_a_killed_conversion_goes_on_behind_the_last_shard(tmp_path: Path) -> None:
    write_datacomp(tmp_path / "in")
    whole = taken(tmp_path / "in", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out" / "store.json").unlink()
    (tmp_path / "out" / "text_emb" / "text_emb_0001.npy").unlink()
    first = tmp_path / "out" / "img_emb" / "img_emb_0000.npy"
    before = first.stat().st_mtime_ns
    store = taken(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(store.texts[:], whole.texts[:])
    assert first.stat().st_mtime_ns == before


def test_double_precision_becomes_single_and_mixed_widths_of_numbers_the_wider(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for seed, kind in enumerate((np.float64, ">f4", np.float32, np.float16)):
        np.save(tmp_path / "in" / f"{seed}.npy", unit(3, seed, kind))
    store = taken(tmp_path / "in", tmp_path / "out")
    kinds = (np.float64, np.float32, np.float32, np.float16)
    expected = np.concatenate([unit(3, seed, kind).astype(np.float32) for seed, kind in enumerate(kinds)])
    assert store.images.dtype == np.float32
    assert np.array_equal(store.images[:], expected)
    assert arrays_in(tmp_path / "out") == [f"img_emb/img_emb_000{number}.npy" for number in (0, 1, 3)]
    assert caplog.text.count("float16 and float32 and float64 become float32") == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_of_another_length_are_refused_unless_scaling_is_chosen(tmp_path: Path, dtype: Any) -> None:
    vectors = unit(5, 0, np.float64) * np.array([[1], [20], [0.01], [1], [3]])
    np.save(tmp_path / "x.npy", vectors.astype(dtype))
    with pytest.raises(DataError, match=r"x\.npy: row 1 has length 20, not 1 \(3 such rows") as error:
        import_existing(tmp_path / "x.npy", tmp_path / "out")
    assert "--embed.normalize" in error.value.fix
    store = taken(tmp_path / "x.npy", tmp_path / "scaled", normalize=True)
    assert store.images.dtype == (np.float16 if dtype == np.float16 else np.float32)
    assert np.allclose(store.images[:], unit(5, 0, np.float64), atol=2e-3 if dtype == np.float16 else 1e-7)
    assert np.array_equal(np.load(tmp_path / "x.npy"), vectors.astype(dtype))


@pytest.mark.parametrize(
    ("value", "what"), [(0.0, "is all zeros"), (np.nan, "is not finite"), (np.inf, "is not finite")]
)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_row_without_direction_is_refused_with_its_file_and_row(
    tmp_path: Path, value: float, what: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_cid.data.embeddings.layouts._BLOCK_ROWS", 2)
    vectors = unit(5, 0, np.float32)
    vectors[3] = value
    path = tmp_path / f"x.{kind}"
    np.save(path, vectors) if kind == "npy" else np.savez(path, l14_img=vectors)
    with pytest.raises(DataError, match=rf"x\.{kind}.*: row 3 {what}"):
        import_existing(path, tmp_path / "out", normalize=True)
    with pytest.raises(DataError, match=rf"x\.{kind}.*: row 3 has length"):
        import_existing(path, tmp_path / "again")


@given(arrays.arrays(np.float64, (3, 4), elements=st.floats(-1e300, 1e300).filter(lambda value: abs(value) > 1e-300)))
def test_scaling_gives_unit_rows_of_the_same_direction_at_any_length(vectors: np.ndarray) -> None:
    scaled = _scaled(vectors, np.ones(3, dtype=bool), "x", 0)
    assert np.allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-12)
    largest = np.abs(vectors).argmax(axis=1)[:, None]
    ratio = vectors / np.take_along_axis(vectors, largest, axis=1)
    assert np.allclose(scaled, ratio * np.take_along_axis(scaled, largest, axis=1), rtol=1e-12)


def damage(path: Path) -> None:
    """Other numbers under the old checksum."""
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("l14_img.npy").header_offset + 30 + len("l14_img.npy") + 20 + 128
    data = bytearray(path.read_bytes())
    data[at + 10] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 torn"), "cannot be read"),
        (lambda path: np.savez(path, b32_img=unit(3, 0)), "no array 'l14_img', which the first file has"),
        (lambda path: np.savez(path, l14_img=unit(3, 0)), "no array 'l14_txt', which the first file has"),
        (lambda path: np.savez(path, l14_img=unit(3, 0), l14_txt=unit(2, 0)), r"l14_txt\): 2 rows, but 3 in"),
        (lambda path: np.savez(path, l14_img=unit(2, 0), l14_txt=unit(2, 0)), r"0b\.parquet: 3 rows, but 2 in"),
        (
            lambda path: np.savez(path, l14_img=unit(3, 0)[:, :5], l14_txt=unit(3, 0)),
            "width 5, but the store has width 6",
        ),
        (lambda path: np.savez(path, l14_img=np.arange(3), l14_txt=unit(3, 0)), r"\(3,\) int64, not rows of"),
        (lambda path: np.savez(path, l14_img=np.array([[object()]] * 3), l14_txt=unit(3, 0)), "not stored .* as plain"),
        (lambda path: np.savez(path, l14_img=np.asfortranarray(unit(3, 0)), l14_txt=unit(3, 0)), "not stored"),
        (damage, "Bad CRC-32"),
    ],
)
def test_a_broken_npz_is_named(tmp_path: Path, write: Any, problem: str) -> None:
    write_datacomp(tmp_path / "in", compressed=False)
    write(tmp_path / "in" / "0b.npz")
    with pytest.raises(DataError, match=problem) as error:
        import_existing(tmp_path / "in", tmp_path / "out")
    assert "0b." in error.value.problem


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("b.npy", unit(2, 0)[:, :4], "width 4, but the store has width 6"),
        ("b.npy", unit(2, 0)[0], r"\(6,\) float16, not rows of"),
        ("b.npy", np.ones((2, 6), dtype=np.uint8), "uint8, not rows of"),
        ("b.npy", np.array([object()] * 2), "as plain numbers"),
    ],
)
def test_a_broken_npy_is_named(tmp_path: Path, name: str, array: np.ndarray, problem: str) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", unit(2, 0))
    np.save(tmp_path / "in" / name, array, allow_pickle=True)
    with pytest.raises(DataError, match=problem) as error:
        import_existing(tmp_path / "in", tmp_path / "out")
    assert str(tmp_path / "in" / name) in error.value.problem
    assert "--force" not in error.value.fix  # it is not a file of ours


@pytest.mark.parametrize(
    ("name", "problem", "fix"),
    [
        ("x.csv", "has no column for each dimension", "Without names: np.save"),
        ("nothing", "neither an embedding store", "DataComp"),
        ("both", r"both \.npy and \.npz", "DataComp"),
    ],
)
def test_what_is_not_embeddings_is_refused(tmp_path: Path, name: str, problem: str, fix: str) -> None:
    (tmp_path / "x.csv").write_bytes(b"x")
    (tmp_path / "both").mkdir()
    np.save(tmp_path / "both" / "a.npy", unit(2, 0))
    np.savez(tmp_path / "both" / "a.npz", unit(2, 0))
    with pytest.raises(DataError, match=problem) as error:
        import_existing(tmp_path / name, tmp_path / "out")
    assert fix in error.value.fix


def test_the_folder_above_the_embeddings_is_told_where_they_are(tmp_path: Path) -> None:
    write_datacomp(tmp_path / "metadata")
    with pytest.raises(DataError) as error:
        import_existing(tmp_path, tmp_path / "out")
    assert f"Did you mean {tmp_path / 'metadata'}?" in error.value.fix


def test_a_store_taken_over_can_be_moved_and_taken_over_again(tmp_path: Path) -> None:
    """Keys lie in the store, images elsewhere: both are still found."""
    np.save(tmp_path / "x.npy", unit(3, 0))
    import_existing(tmp_path / "x.npy", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    store = taken(tmp_path / "moved", tmp_path / "second")
    assert np.array_equal(store.images[:], unit(3, 0))
    assert store.keys[2] == "x/2"
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match=r"x\.npy: missing"):
        EmbeddingStore.open(tmp_path / "second")


# Without texts


def test_a_store_without_texts_says_what_needs_them(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", unit(3, 0))
    store = taken(tmp_path / "x.npy", tmp_path / "out")
    assert not store.has_texts
    assert store.num_captions.tolist() == [0, 0, 0]
    for ask in (lambda: store.texts, lambda: store.text_for(np.array([0]), 0)):
        with pytest.raises(DataError, match="image embeddings only; the instance loss needs") as error:
            ask()
        assert "distill.weights.instance_image: 0" in error.value.fix


def test_distill_refuses_the_instance_loss_before_it_reads_a_pair(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", unit(3, 0))
    store = taken(tmp_path / "x.npy", tmp_path / "run" / "embed")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "0.png").write_bytes(b"no picture")
    (tmp_path / "pairs" / "0.txt").write_text("caption")
    recipe = parse_recipe({"embed": {"existing": str(tmp_path / "x.npy")}}, where="test")
    pairs = open_pairs(PairsConfig(source=(str(tmp_path / "pairs"),)))
    with pytest.raises(DataError, match="image embeddings only"):
        distilled_pairs(RunFolder(tmp_path / "run"), recipe, pairs, store)


# The stage and its fingerprint


def run(tmp_path: Path, **embed: Any) -> tuple[RunFolder, Any]:
    recipe = parse_recipe({"embed": embed, "machine": {"workers": 0, "device": "cpu"}}, where="test")
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, recipe, only="embed")
    return folder, recipe


def embed_state(folder: RunFolder, recipe: Any) -> tuple[str, str]:
    state = next(state for state in pipeline.states(folder, recipe) if state.stage.name == "embed")
    return state.status, state.reason


@pytest.mark.parametrize("folder_of_files", [False, True])
def test_the_stage_takes_a_file_or_a_folder_and_sees_it_change(tmp_path: Path, folder_of_files: bool) -> None:
    existing = tmp_path / "in" / "x.npy"
    existing.parent.mkdir()
    np.save(existing, unit(3, 0))
    source = existing.parent if folder_of_files else existing
    folder, recipe = run(tmp_path, existing=str(source))
    assert embed_state(folder, recipe) == ("done", "")
    np.save(existing, unit(4, 0))
    assert embed_state(folder, recipe) == ("stale", f"embed.existing ({source}) changed on disk")


def test_embeddings_that_were_moved_are_taken_over_again_and_are_the_same_to_later_stages(tmp_path: Path) -> None:
    source, moved = tmp_path / "in", tmp_path / "moved"
    source.mkdir()
    np.save(source / "x.npy", unit(3, 0))
    folder, _ = run(tmp_path, existing=str(source))
    before = folder.record("embed")
    source.rename(moved)
    recipe = parse_recipe({"embed": {"existing": str(moved)}, "machine": {"workers": 0}}, where="test")
    assert embed_state(folder, recipe) == ("stale", f"{source / 'x.npy'} is missing")
    pipeline.run(folder, recipe, only="embed")
    assert EmbeddingStore.open(folder.stage("embed")).rows == 3
    after = folder.record("embed")
    assert before is not None
    assert after is not None
    assert after.results == before.results

    (moved / "README").write_text("a file beside them")
    assert embed_state(folder, recipe) == ("stale", f"embed.existing ({moved}) changed on disk")
    pipeline.run(folder, recipe, only="embed")
    again = folder.record("embed")
    assert again is not None
    assert again.results == before.results


def test_scaling_is_a_setting_of_the_stage(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", unit(3, 0, np.float32) * 5)
    folder, recipe = run(tmp_path, existing=str(tmp_path / "x.npy"), normalize=True)
    assert np.allclose(EmbeddingStore.open(folder.stage("embed")).images[:], unit(3, 0, np.float32), atol=1e-6)
    assert json.loads((folder.path / "embed" / "store.json").read_text())["dtype"] == "float32"
    other = recipe.model_copy(update={"embed": recipe.embed.model_copy(update={"normalize": False})})
    assert embed_state(folder, other) == ("stale", "embed.normalize True -> False")


# Rows that are left out


BAD = {"nan": np.nan, "inf": np.inf, "minus inf": -np.inf, "zeros": 0.0}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["npy", "npz", "float64"])
def test_rows_without_direction_are_left_out_and_counted_if_they_may_be(
    tmp_path: Path, bad: str, normalize: bool, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = unit(200, 0, np.float64 if kind == "float64" else np.float32)
    vectors[7, :] = BAD[bad]
    path = tmp_path / ("x.npz" if kind == "npz" else "x.npy")
    np.savez(path, l14_img=vectors) if kind == "npz" else np.save(path, vectors)
    with pytest.raises(DataError, match="row 7 "):
        import_existing(path, tmp_path / "refused", normalize=normalize)

    store = taken(path, tmp_path / "out", normalize=normalize, max_bad_share=0.01)
    good = np.arange(200) != 7
    assert np.array_equal(store.ok, good)
    assert np.allclose(store.images[:][good], vectors[good], atol=1e-6)
    assert not store.images[:][7].any()
    what = "is all zeros" if bad == "zeros" else "is not finite"
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"row": 7, "key": "x/7", "shard": "x", "reason": f"image embedding {what}"}
    assert f"1 of 200 rows (1 image embedding {what}) are left out" in caplog.text


def test_a_row_whose_text_has_no_direction_is_left_out_and_its_metadata_kept(
    tmp_path: Path, clip_retrieval: Path
) -> None:
    """Of 22 rows in 11 shards, one bad image and one bad text, in two shards: only these are copied."""
    for name, row in (("img_emb/img_emb_3.npy", 1), ("text_emb/text_emb_5.npy", 0)):
        vectors = np.load(clip_retrieval / name)
        vectors[row] = np.nan if row else 0
        np.save(clip_retrieval / name, vectors)
    with pytest.raises(
        DataError, match=r"1 of 22 rows .* cannot be used, more than embed\.max_bad_share 0\.01"
    ) as error:
        import_existing(clip_retrieval, tmp_path / "out", max_bad_share=0.01)
    assert "'3-1' in img_emb_3" in error.value.problem

    store = taken(clip_retrieval, tmp_path / "out", max_bad_share=0.1)
    assert np.flatnonzero(~store.ok).tolist() == [7, 10]
    assert [store.keys[row] for row in (7, 10)] == ["3-1", "5-0"]
    assert store.captions(11) == ("b",)
    assert store.num_captions.tolist() == store.ok.astype(int).tolist()
    assert not store.texts[:][[7, 10]].any()
    assert len(arrays_in(tmp_path / "out")) == 4
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert reasons == ["image embedding is not finite", "text embedding is all zeros"]


def test_a_store_without_a_single_good_row_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, DIM), dtype=np.float16))
    with pytest.raises(DataError, match="no embeddings there"):
        import_existing(tmp_path / "x.npy", tmp_path / "out", max_bad_share=1)


def test_good_rows_are_taken_in_place_whatever_may_be_left_out(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", unit(3, 0))
    import_existing(tmp_path / "x.npy", tmp_path / "plain")
    import_existing(tmp_path / "x.npy", tmp_path / "lenient", max_bad_share=0.5)
    for name in ("store.json", "skipped.jsonl"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "lenient" / name).read_bytes()
    assert arrays_in(tmp_path / "lenient") == []


# Columns of other types


def with_column(folder: Path, name: str, values: Any) -> Path:
    folder.mkdir()
    np.save(folder / "x.npy", unit(2, 0))
    pq.write_table(pa.table({"key": ["a", "b"], "caption": ["c", "d"]} | {name: values}), folder / "x.parquet")
    return folder


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (pa.array([7, 10]), ["7", "10"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([b"a", b"b"]), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
    ],
)
def test_keys_of_plain_types_are_texts(tmp_path: Path, values: pa.Array, keys: list[str]) -> None:
    assert list(taken(with_column(tmp_path / "in", "key", values), tmp_path / "out").keys) == keys


@pytest.mark.parametrize(
    "values",
    [
        pa.array([["a"], ["b"]]),
        pa.array([["a"], ["b"]], pa.large_list(pa.string())),
        pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)),
        pa.array([{"id": "a"}, {"id": "b"}]),
        pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64())),
        pa.array([b"\xff", b"\xfe"]),
    ],
)
def test_keys_of_other_types_are_refused_with_file_column_and_type(tmp_path: Path, values: pa.Array) -> None:
    source = with_column(tmp_path / "in", "key", values)
    with pytest.raises(DataError, match=r"x\.parquet: column 'key' holds .*, not one text or whole number a row"):
        import_existing(source, tmp_path / "out")


def test_a_kept_field_of_lists_is_refused_when_it_is_read(tmp_path: Path) -> None:
    store = taken(with_column(tmp_path / "in", "tags", pa.array([["x"], ["y"]])), tmp_path / "out")
    for read in (store.field, store.classes):
        with pytest.raises(DataError, match="column 'tags' holds list"):
            read("tags")


@pytest.mark.parametrize(
    ("values", "captions"),
    [
        (pa.array([["c", "d"], []]), [("c", "d"), ()]),
        (pa.array([["c", None], ["d"]], pa.large_list(pa.large_string())), [("c", ""), ("d",)]),
        (pa.array([5, None]), [("5",), ("",)]),
    ],
)
def test_captions_may_be_lists(tmp_path: Path, values: pa.Array, captions: list[tuple[str, ...]]) -> None:
    store = taken(with_column(tmp_path / "in", "caption", values), tmp_path / "out")
    assert [store.captions(row) for row in range(2)] == captions


def test_captions_of_other_types_are_refused(tmp_path: Path) -> None:
    store = taken(with_column(tmp_path / "in", "caption", pa.array([{"en": "c"}, {"en": "d"}])), tmp_path / "out")
    with pytest.raises(DataError, match="column 'caption' holds struct"):
        store.captions(0)


def test_every_shard_has_the_columns_of_the_first(tmp_path: Path, clip_retrieval: Path) -> None:
    pq.write_table(
        pa.table({"uid": ["a", "b"], "caption": ["c", "d"]}), clip_retrieval / "metadata" / "metadata_4.parquet"
    )
    with pytest.raises(DataError, match=r"metadata_4\.parquet: no column 'key'; there are uid, caption"):
        import_existing(clip_retrieval, tmp_path / "out")
    twice = pa.Table.from_arrays([pa.array(["a", "b"])] * 3, names=["key", "key", "caption"])
    pq.write_table(twice, clip_retrieval / "metadata" / "metadata_4.parquet")
    with pytest.raises(DataError, match=r"metadata_4\.parquet: 2 columns 'key'"):
        import_existing(clip_retrieval, tmp_path / "out")
