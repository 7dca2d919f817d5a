"""Embedding pairs a second time: what is unchanged is not embedded again, and what changed is, shard by shard."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_cid import pipeline
from clip_cid.data.embeddings import from_pairs
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import StoreWriter
from clip_cid.errors import ClipCidError, ConfigError, DataError
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
SHARDS = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"], "c": ["c0", "c1", "c2", "c3"]}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("teachers")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    for seed in (0, 1):
        clip = build_student(str(folder / "tiny.json"), embed_dim=None, seed=seed)
        export_student(clip, folder / f"teacher{seed}", head_state={}, provenance={})
    return [f"local-dir:{folder / f'teacher{seed}'}" for seed in (0, 1)]


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The images that were decoded to be embedded."""
    images: list[bytes] = []
    decode = from_pairs.decode_image

    def recording(data: bytes, **options: Any) -> Image.Image:
        images.append(data)
        return decode(data, **options)

    monkeypatch.setattr(from_pairs, "decode_image", recording)
    return images


def picture(key: str) -> bytes:
    pixels = np.random.default_rng(list(key.encode())).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)  # of equal size for every key
    return buffer.getvalue()


def write_tar(
    folder: Path, letter: str, *, captions: str = "caption of", image_of: str = "", field: str = "one"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{letter}.tar", "w") as tar:
        for key in SHARDS[letter]:
            described = json.dumps({"kind": field, "other": key}).encode()
            parts = {"png": picture(image_of + key), "txt": f"{captions} {key}".encode(), "json": described}
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_tars(folder: Path) -> None:
    for letter in SHARDS:
        write_tar(folder, letter)


def recipe(source: Path, teacher: str, **sections: Any) -> Recipe:
    pairs = {"source": [str(source / "*.tar")], **sections.pop("pairs", {})}
    machine = {"device": "cpu", "workers": 0}
    return Recipe.model_validate({"pairs": pairs, "embed": {"teacher": teacher}, "machine": machine, **sections})


def embed(run: Path, settings: Recipe, **options: Any) -> EmbeddingStore:
    pipeline.run(RunFolder(run), settings, only="embed", **options)
    return EmbeddingStore.open(run / "embed")


def status(run: Path, settings: Recipe) -> str:
    return next(state.status for state in pipeline.states(RunFolder(run), settings) if state.stage.name == "embed")


def same(store: EmbeddingStore, other: EmbeddingStore) -> bool:
    rows = np.arange(store.rows)
    return list(store.keys) == list(other.keys) and np.array_equal(store.images[rows], other.images[rows])


def touch(folder: Path) -> None:
    for file in folder.rglob("*"):
        os.utime(file, ns=(1, 1))


def test_touched_moved_and_copied_pairs_are_up_to_date(tmp_path: Path, teachers: list[str], embedded: list[bytes]):
    write_tars(tmp_path / "data")
    embed(tmp_path / "run", recipe(tmp_path / "data", teachers[0]))
    embedded.clear()

    touch(tmp_path / "data")
    embed(tmp_path / "run", recipe(tmp_path / "data", teachers[0]))
    shutil.move(tmp_path / "data", tmp_path / "moved")
    embed(tmp_path / "run", recipe(tmp_path / "moved", teachers[0]))
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    embed(tmp_path / "copy", recipe(tmp_path / "link", teachers[0]))
    assert embedded == []


def test_a_teacher_that_was_copied_or_touched_is_the_same(tmp_path: Path, teachers: list[str], embedded: list[bytes]):
    write_tars(tmp_path / "data")
    shutil.copytree(teachers[0].removeprefix("local-dir:"), tmp_path / "teacher")
    embed(tmp_path / "run", recipe(tmp_path / "data", teachers[0]))
    embedded.clear()
    touch(tmp_path / "teacher")
    embed(tmp_path / "run", recipe(tmp_path / "data", f"local-dir:{tmp_path / 'teacher'}"))
    assert embedded == []

    shutil.copytree(teachers[1].removeprefix("local-dir:"), tmp_path / "teacher", dirs_exist_ok=True)
    assert status(tmp_path / "run", recipe(tmp_path / "data", f"local-dir:{tmp_path / 'teacher'}")) == "stale"


@pytest.mark.parametrize("change", [{"captions": "CAPTION OF"}, {"image_of": "x"}], ids=["captions", "images"])
def test_a_shard_edited_at_equal_size_is_embedded_again_and_alone(
    tmp_path: Path, teachers: list[str], embedded: list[bytes], change: dict[str, str]
):
    write_tars(tmp_path / "data")
    settings = recipe(tmp_path / "data", teachers[0])
    embed(tmp_path / "run", settings)
    size = (tmp_path / "data" / "b.tar").stat().st_size
    write_tar(tmp_path / "data", "b", **change)
    assert (tmp_path / "data" / "b.tar").stat().st_size == size

    embedded.clear()
    assert status(tmp_path / "run", settings) == "stale"
    store = embed(tmp_path / "run", settings)
    assert len(embedded) == 2
    assert same(store, embed(tmp_path / "fresh", settings))
    assert store.captions(3)[0].startswith(change.get("captions", "caption of"))


@pytest.mark.parametrize("letter", ["a", "b", "c"])
def test_a_new_shard_is_embedded_alone_wherever_it_comes(
    tmp_path: Path, teachers: list[str], embedded: list[bytes], letter: str
):
    for other in SHARDS.keys() - {letter}:
        write_tar(tmp_path / "data", other)
    settings = recipe(tmp_path / "data", teachers[0])
    embed(tmp_path / "run", settings)
    write_tar(tmp_path / "data", letter)

    embedded.clear()
    store = embed(tmp_path / "run", settings)
    assert len(embedded) == len(SHARDS[letter])
    assert same(store, embed(tmp_path / "fresh", settings))
    assert not (tmp_path / "run" / "aside").exists(), "everything of the earlier store is in the new one"


def kill_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    add = StoreWriter.add

    def dying(self: StoreWriter, rows: Any) -> None:
        if len(self.shards) == shards:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(StoreWriter, "add", dying)
    return monkeypatch


def embed_killed(run: Path, settings: Recipe, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        kill_after(shards, patched)
        with pytest.raises(KeyboardInterrupt):
            embed(run, settings)


@pytest.mark.resume
@pytest.mark.parametrize("added", ["a", "c"], ids=["in front", "behind"])
def test_work_in_progress_goes_on_when_a_shard_is_added(
    tmp_path: Path, teachers: list[str], embedded: list[bytes], monkeypatch: pytest.MonkeyPatch, added: str
):
    first, second = sorted(SHARDS.keys() - {added})
    for letter in (first, second):
        write_tar(tmp_path / "data", letter)
    settings = recipe(tmp_path / "data", teachers[0])
    embed_killed(tmp_path / "run", settings, 1, monkeypatch)
    write_tar(tmp_path / "data", added)

    embedded.clear()
    store = embed(tmp_path / "run", settings)
    assert len(embedded) == len(SHARDS[second]) + len(SHARDS[added])
    assert same(store, embed(tmp_path / "fresh", settings))


@pytest.mark.resume
@pytest.mark.parametrize(
    "pairs",
    [{"max_bad_share": 0.5}, {"keep_fields": ["kind"]}, {"source": ["MOVED/*.tar"]}],
    ids=lambda pairs: next(iter(pairs)),
)
def test_settings_that_change_no_embedding_keep_the_finished_shards(
    tmp_path: Path, teachers: list[str], embedded: list[bytes], monkeypatch: pytest.MonkeyPatch, pairs: dict[str, Any]
):
    write_tars(tmp_path / "data")
    embed_killed(tmp_path / "run", recipe(tmp_path / "data", teachers[0]), 2, monkeypatch)
    if "source" in pairs:
        shutil.copytree(tmp_path / "data", tmp_path / "moved", copy_function=shutil.copyfile)
        pairs = {"source": [str(tmp_path / "moved" / "*.tar")]}

    embedded.clear()
    store = embed(tmp_path / "run", recipe(tmp_path / "data", teachers[0], pairs=pairs))
    assert len(embedded) == 4
    if "keep_fields" in pairs:
        assert set(store.field("kind")) == {"one"}


@pytest.mark.resume
def test_a_broken_pair_is_mended_and_only_its_shard_is_embedded_again(
    tmp_path: Path, teachers: list[str], embedded: list[bytes]
):
    write_tars(tmp_path / "data")
    path = tmp_path / "data" / "c.tar"
    good = path.read_bytes()
    path.write_bytes(good.replace(picture("c1"), bytes(len(picture("c1")))))
    settings = recipe(tmp_path / "data", teachers[0], pairs={"max_bad_share": 0})
    with pytest.raises(DataError, match="cannot be used so far"):
        embed(tmp_path / "run", settings)

    path.write_bytes(good)
    embedded.clear()
    assert embed(tmp_path / "run", settings).rows == 9
    assert len(embedded) == 4


def test_another_field_is_read_without_the_teacher_and_nothing_behind_is_stale(
    tmp_path: Path, teachers: list[str], embedded: list[bytes]
):
    write_tars(tmp_path / "data")
    settings = recipe(tmp_path / "data", teachers[0], pairs={"keep_fields": ["kind"]})
    embed(tmp_path / "run", settings)
    before = RunFolder(tmp_path / "run").record("embed")
    assert before is not None

    embedded.clear()
    more = recipe(tmp_path / "data", teachers[0], pairs={"keep_fields": ["kind", "other"]})
    assert status(tmp_path / "run", more) == "stale"
    store = embed(tmp_path / "run", more)
    assert list(store.field("other")) == [key for keys in SHARDS.values() for key in keys]
    assert embedded == []
    after = RunFolder(tmp_path / "run").record("embed")
    assert after is not None
    assert after.results == before.results
    assert status(tmp_path / "run", settings) == "done", "a field more does no harm"


def test_a_field_edited_at_equal_size_is_read_again(tmp_path: Path, teachers: list[str], embedded: list[bytes]):
    write_tars(tmp_path / "data")
    settings = recipe(tmp_path / "data", teachers[0], pairs={"keep_fields": ["kind"]})
    embed(tmp_path / "run", settings)
    write_tar(tmp_path / "data", "b", field="two")
    embedded.clear()
    store = embed(tmp_path / "run", settings)
    assert list(store.field("kind")) == ["one"] * 3 + ["two"] * 2 + ["one"] * 4
    assert embedded == []


@pytest.mark.resume
@pytest.mark.parametrize("file", ["img_emb/img_emb_0001.npy", "metadata/metadata_0000.parquet"])
def test_a_finished_shard_that_was_damaged_is_embedded_again_and_the_others_are_kept(
    tmp_path: Path, teachers: list[str], embedded: list[bytes], monkeypatch: pytest.MonkeyPatch, file: str
):
    write_tars(tmp_path / "data")
    settings = recipe(tmp_path / "data", teachers[0])
    embed_killed(tmp_path / "run", settings, 2, monkeypatch)
    damaged = tmp_path / "run" / "embed.part" / file
    content = bytearray(damaged.read_bytes())
    content[-20] ^= 1
    damaged.write_bytes(content)

    embedded.clear()
    store = embed(tmp_path / "run", settings)
    assert len(embedded) == {"img_emb/img_emb_0001.npy": 2 + 4, "metadata/metadata_0000.parquet": 3 + 4}[file]
    assert same(store, embed(tmp_path / "fresh", settings))
    assert pipeline.verify(RunFolder(tmp_path / "run")) == []


@pytest.mark.resume
def test_another_teacher_leaves_the_earlier_embeddings_aside_and_they_come_back(
    tmp_path: Path, teachers: list[str], embedded: list[bytes]
):
    write_tars(tmp_path / "data")
    first, second = (recipe(tmp_path / "data", teacher) for teacher in teachers)
    before = embed(tmp_path / "run", first)
    images = np.array(before.images[np.arange(9)])
    embed(tmp_path / "run", second)
    embedded.clear()
    assert np.array_equal(embed(tmp_path / "run", first).images[np.arange(9)], images)
    assert embedded == []


@pytest.mark.resume
def test_a_refused_setting_touches_nothing(
    tmp_path: Path, teachers: list[str], embedded: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    write_tars(tmp_path / "data")
    settings = recipe(tmp_path / "data", teachers[0])
    embed_killed(tmp_path / "run", settings, 2, monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    refused: list[tuple[type[ClipCidError], Recipe]] = [
        (ConfigError, recipe(tmp_path / "data", "ViT-B-33")),
        (DataError, recipe(tmp_path / "nowhere", teachers[0])),
    ]
    for kind, wrong in refused:
        with pytest.raises(kind):
            embed(tmp_path / "run", wrong)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changeable = {"run.log", ".lock"}
    assert {
        path: data for path, data in after.items() if path.name not in changeable and "index" not in path.parts
    } == {path: data for path, data in before.items() if path.name not in changeable and "index" not in path.parts}
    embedded.clear()
    embed(tmp_path / "run", settings)
    assert len(embedded) == 4


@pytest.mark.parametrize("damage", [b"x", b""], ids=["appended", "emptied"])
def test_a_stage_whose_record_is_damaged_is_stale_and_made_again(
    tmp_path: Path, teachers: list[str], embedded: list[bytes], damage: bytes
):
    write_tars(tmp_path / "data")
    settings = recipe(tmp_path / "data", teachers[0])
    embed(tmp_path / "run", settings)
    record = tmp_path / "run" / "embed" / "manifest.json"
    record.write_bytes(record.read_bytes() + damage if damage else b"")
    assert status(tmp_path / "run", settings) == "stale"
    embed(tmp_path / "run", settings)
    assert status(tmp_path / "run", settings) == "done"


def test_pairs_that_are_not_here_leave_a_finished_stage_as_it_is_but_others_are_asked_for(
    tmp_path: Path, teachers: list[str]
):
    write_tars(tmp_path / "data")
    settings = recipe(tmp_path / "data", teachers[0])
    embed(tmp_path / "run", settings)
    shutil.move(tmp_path / "data", tmp_path / "away")
    assert status(tmp_path / "run", settings) == "done"
    assert status(tmp_path / "run", recipe(tmp_path / "typo", teachers[0])) == "stale"


def test_pairs_that_change_while_they_are_embedded_are_refused(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch
):
    write_tars(tmp_path / "data")
    finish: Callable[[StoreWriter], Any] = StoreWriter.finish

    def meanwhile(self: StoreWriter) -> Any:
        write_tar(tmp_path / "data", "a", captions="CAPTION OF")
        return finish(self)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "finish", meanwhile)
        with pytest.raises(ClipCidError, match="changed while embed read them"):
            embed(tmp_path / "run", recipe(tmp_path / "data", teachers[0]))
    store = embed(tmp_path / "run", recipe(tmp_path / "data", teachers[0]))
    assert store.captions(0)[0].startswith("CAPTION OF")
