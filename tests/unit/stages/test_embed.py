import errno
import io
import json
import os
import signal
import tarfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from clip_cid.data.embeddings import from_pairs, writer
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import StoreWriter
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import DataError, RunError
from clip_cid.models import teacher as teacher_module
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.recipe import PairsConfig, Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages import embed
from clip_cid.summaries import as_json

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CAPTIONS = {
    "a0": ["one"],
    "a1": ["two", "second of two", "third of two"],
    "a2": ["three", "second of three"],
    "a3": ["four"],
    "b0": ["five"],
    "b1": ["six"],
    "c0": ["seven", "second of seven"],
    "c1": ["eight"],
    "c2": ["nine", "second of nine"],
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two teachers of one architecture and different weights."""
    folder = tmp_path_factory.mktemp("teachers")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    for seed in (0, 1):
        clip = build_student(str(folder / "tiny.json"), embed_dim=None, seed=seed)
        export_student(clip, folder / f"teacher{seed}", head_state={}, provenance={})
    return [f"local-dir:{folder / f'teacher{seed}'}" for seed in (0, 1)]


def picture(key: str) -> Image.Image:
    pixels = np.random.default_rng(list(key.encode())).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((49, 35))


def write_tars(folder: Path, *, broken: dict[str, bytes] | None = None) -> str:
    """Three shards of 4, 2 and 3 pairs with png images; `broken` replaces the image of some."""
    folder.mkdir(parents=True, exist_ok=True)
    for letter in "abc":
        with tarfile.open(folder / f"{letter}.tar", "w") as tar:
            for key in (key for key in CAPTIONS if key[0] == letter):
                buffer = io.BytesIO()
                picture(key).save(buffer, "PNG")
                image = (broken or {}).get(key, buffer.getvalue())
                described = json.dumps({"captions": CAPTIONS[key], "dup": f"group {key[1]}"}).encode()
                for extension, content in (("png", image), ("txt", CAPTIONS[key][0].encode()), ("json", described)):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{a,b,c}.tar")


def recipe(source: str | None, teacher: str, *, batch: int = 3, workers: int = 0, **changed: Any) -> Recipe:
    pairs = {"source": [source], "keep_fields": ["dup"], **changed.pop("pairs", {})} if source else {}
    machine = {"device": "cpu", "workers": workers, "embed_batch": batch}
    return Recipe.model_validate(
        {"pairs": pairs, "embed": {"teacher": teacher, **changed.pop("embed", {})}, "machine": machine}
    )


def run(folder: Path, settings: Recipe) -> dict[str, Any]:
    out = folder / "embed.part"
    out.mkdir(parents=True, exist_ok=True)
    return as_json(embed.run(RunFolder(folder), out, settings))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_images_inside_parquet_files_are_embedded_as_those_of_tars(tmp_path: Path, teachers: list[str]) -> None:
    pairs = open_pairs(PairsConfig(source=(write_tars(tmp_path),)))
    read = [pairs.read(row) for row in range(len(pairs))]
    for letter in "abc":
        some = [pair for pair in read if pair.key[0] == letter]
        columns = {
            "image": [{"bytes": pair.image, "path": pair.key} for pair in some],
            "caption": [pair.captions for pair in some],
        }
        pq.write_table(pa.table(columns), tmp_path / f"{letter}.parquet", row_group_size=2)

    sources = {"tars": str(tmp_path / "*.tar"), "parquet": str(tmp_path / "*.parquet")}
    for name, source in sources.items():
        run(tmp_path / name, recipe(source, teachers[0], workers=1, pairs={"keep_fields": []}))
    stores = [EmbeddingStore.open(tmp_path / name / "embed.part") for name in sources]
    assert [list(store.keys) for store in stores] == [list(CAPTIONS)] * 2
    every = np.arange(len(pairs))
    assert np.array_equal(stores[0].images[every], stores[1].images[every])
    assert np.array_equal(stores[0].texts[every], stores[1].texts[every])


@pytest.mark.slow
def test_the_store_holds_what_open_clip_gives_for_the_same_pairs(tmp_path: Path, teachers: list[str]) -> None:
    summary = run(tmp_path / "run", recipe(write_tars(tmp_path), teachers[0], workers=1))
    store = EmbeddingStore.open(tmp_path / "run" / "embed.part")
    store.check_values()
    keys = list(CAPTIONS)
    assert list(store.keys) == keys
    model: Any = open_clip.create_model_from_pretrained(teachers[0], return_transform=False)
    loaded: Any = open_clip.create_model_from_pretrained(teachers[0])
    tokenizer = open_clip.get_tokenizer(teachers[0])
    with torch.inference_mode():
        images = model.encode_image(torch.stack([loaded[1](picture(key)) for key in keys]), normalize=True)
        for row, key in enumerate(keys):
            texts = model.encode_text(tokenizer(CAPTIONS[key]), normalize=True).numpy()
            for number in range(len(texts)):
                found = store.text_for(np.array([row]), number)[0]
                assert np.abs(found.astype(np.float32) - texts[number]).max() < 2**-11  # half a float16 step below 1
    assert np.abs(store.images[:].astype(np.float32) - images.numpy()).max() < 2**-11
    assert store.captions(1) == tuple(CAPTIONS["a1"])
    assert store.field("dup")[5] == "group 1"
    assert summary.pop("images_per_s") > 0
    size = sum(len(content) for name, content in files(store.path).items() if "/" in name)
    assert summary == {"images": 9, "ok": 9, "dim": 12, "teacher": teachers[0], "bytes": size, "skipped": {}}


def test_a_convolutional_teacher_whose_image_size_is_one_number_embeds_too(tmp_path: Path) -> None:
    tower = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 8, "patch_size": None}
    (tmp_path / "conv.json").write_text(json.dumps({**TINY, "vision_cfg": tower}))
    clip = build_student(str(tmp_path / "conv.json"), embed_dim=None)
    assert clip.preprocess_cfg["size"] == clip.image_side == 32
    export_student(clip, tmp_path / "conv", head_state={}, provenance={})
    settings = recipe(write_tars(tmp_path / "pairs"), f"local-dir:{tmp_path / 'conv'}")
    assert run(tmp_path / "run", settings)["ok"] == len(CAPTIONS)


@pytest.mark.slow
def test_neither_batch_nor_workers_change_the_store(tmp_path: Path, teachers: list[str]) -> None:
    source = write_tars(tmp_path)
    stores: list[EmbeddingStore] = []
    for batch, workers in ((100, 0), (2, 2), (1, 0)):
        run(tmp_path / str(batch), recipe(source, teachers[0], batch=batch, workers=workers))
        stores.append(EmbeddingStore.open(tmp_path / str(batch) / "embed.part"))
    for other in stores[1:]:
        assert np.abs(stores[0].images[:].astype(np.float32) - other.images[:]).max() <= 2**-11
        rows, captions = np.array([1, 1, 8]), np.array([1, 2, 1])
        gap = stores[0].text_for(rows, captions).astype(np.float32) - other.text_for(rows, captions)
        assert np.abs(gap).max() <= 2**-11


def test_bad_rows_are_listed_and_shift_nothing(tmp_path: Path, teachers: list[str]) -> None:
    whole = run_store(tmp_path / "whole", recipe(write_tars(tmp_path / "good"), teachers[0]))
    broken = {"a1": b"not an image", "c0": b""}
    source = write_tars(tmp_path / "bad", broken=broken)
    store = run_store(tmp_path / "run", recipe(source, teachers[0], pairs={"max_bad_share": 0.5}))
    assert np.flatnonzero(~store.ok).tolist() == [1, 6]
    assert list(store.keys) == list(whole.keys)
    good = np.flatnonzero(store.ok)
    assert np.abs(store.images[good].astype(np.float32) - whole.images[good]).max() <= 2**-11
    assert not store.images[np.array([1, 6])].any()
    gap = store.text_for(np.array([2, 8]), 1).astype(np.float32) - whole.text_for(np.array([2, 8]), 1)
    assert np.abs(gap).max() <= 2**-11
    lines = [json.loads(line) for line in (store.path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["key"], line["shard"]) for line in lines] == [
        (1, "a1", lines[0]["shard"]),
        (6, "c0", lines[1]["shard"]),
    ]
    assert lines[0]["shard"].endswith("a.tar")
    assert "no known format" in lines[0]["reason"]


def run_store(folder: Path, settings: Recipe) -> EmbeddingStore:
    run(folder, settings)
    return EmbeddingStore.open(folder / "embed.part")


def test_reasons_are_counted_without_what_belongs_to_one_sample(tmp_path: Path, teachers: list[str]) -> None:
    source = write_tars(tmp_path, broken={"a1": b"not an image", "c0": b"nor this one", "c1": b""})
    summary = run(tmp_path / "run", recipe(source, teachers[0], pairs={"max_bad_share": 0.5}))
    assert summary["skipped"] == {"image is of no known format": 2, "image is empty": 1}
    assert (summary["images"], summary["ok"]) == (9, 6)


def test_how_odd_samples_were_read_is_counted(
    tmp_path: Path, teachers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    buffer = io.BytesIO()
    picture("x").save(buffer, "png")
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for key, described in {"a": b"", "b": b"[1]", "c": b"{}", "d": b"{", "e": b'{"caption": "one\\ntwo"}'}.items():
            for extension, data in (("png", buffer.getvalue()), ("txt", b"one\ntwo"), ("json", described)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert run(tmp_path / "run", recipe(str(tmp_path / "odd.tar"), teachers[0]))["ok"] == 5
    assert "2 pairs: the .txt is used alone: json cannot be read" in caplog.text
    assert "1 pairs: the .txt is used alone: json holds a list, not an object" in caplog.text
    assert "1 pairs: each line of the .txt is a caption" in caplog.text


def test_keys_that_repeat_are_told_with_the_settings_that_help(tmp_path: Path, teachers: list[str]) -> None:
    tars = write_tars(tmp_path / "pairs").replace("{a,b,c}", "{a,b,c,d}")
    (tmp_path / "pairs" / "d.tar").write_bytes((tmp_path / "pairs" / "a.tar").read_bytes())
    with pytest.raises(DataError, match=r"4 of 13 pairs cannot be used so far.*duplicate key") as error:
        run(tmp_path / "run", recipe(tars, teachers[0]))
    assert "pairs.key_prefix: shard" in error.value.fix
    assert "pairs.repeated_rows: merge" in error.value.fix
    assert run(tmp_path / "more", recipe(tars, teachers[0], pairs={"key_prefix": "shard"}))["ok"] == 13


def test_a_narrow_image_does_not_grow_into_a_bomb(tmp_path: Path, teachers: list[str]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20_000, 1)).save(buffer, "PNG")
    source = write_tars(tmp_path, broken={"a1": buffer.getvalue()})
    summary = run(tmp_path / "run", recipe(source, teachers[0], pairs={"max_bad_share": 0.5, "max_pixels": 1_000_000}))
    assert summary["skipped"] == {"image is too narrow": 1}


@pytest.mark.parametrize(("share", "stops_in"), [(0.1, "a"), (0.2, "b")])
def test_too_many_bad_pairs_stop_as_soon_as_that_is_certain(
    tmp_path: Path, teachers: list[str], share: float, stops_in: str
) -> None:
    """Of 9 pairs, 0.9 or 1.8 may be bad; the second bad one comes in the second shard."""
    source = write_tars(tmp_path, broken={"a1": b"x", "b0": b"y"})
    with pytest.raises(
        DataError, match=rf"of 9 pairs cannot be used so far, more than pairs.max_bad_share {share}"
    ) as error:
        run(tmp_path / "run", recipe(source, teachers[0], pairs={"max_bad_share": share}))
    out = tmp_path / "run" / "embed.part"
    assert str(out / "skipped.jsonl") in error.value.fix
    listed = [json.loads(line)["key"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert listed == ["a1", "b0"][: 1 + (stops_in == "b")]
    assert (
        len(list((out / "img_emb").glob("*"))) == (stops_in == "b") if (out / "img_emb").exists() else stops_in == "a"
    )


def test_a_share_of_bad_pairs_within_the_limit_does_not_stop(tmp_path: Path, teachers: list[str]) -> None:
    source = write_tars(tmp_path, broken={"a1": b"x"})
    assert run(tmp_path / "run", recipe(source, teachers[0], pairs={"max_bad_share": 1 / 9}))["ok"] == 8


def test_no_usable_pair_at_all_is_an_error_at_any_limit(tmp_path: Path, teachers: list[str]) -> None:
    source = write_tars(tmp_path, broken=dict.fromkeys(CAPTIONS, b"x"))
    with pytest.raises(DataError, match="None of the 9 pairs can be used"):
        run(tmp_path / "run", recipe(source, teachers[0], pairs={"max_bad_share": 1}))


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize("shards", [0, 1, 2])
def test_a_killed_run_goes_on_and_leaves_the_same_bytes(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    source = write_tars(tmp_path, broken={"a1": b"x"})
    settings = recipe(source, teachers[0], pairs={"max_bad_share": 0.5})
    run(tmp_path / "whole", settings)
    add = StoreWriter.add

    def killed(self: StoreWriter, rows: Any) -> None:
        if len(self.shards) == shards:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(StoreWriter, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", settings)
    read: list[str] = []
    monkeypatch.setattr(StoreWriter, "add", lambda self, rows: (read.append(rows.name), add(self, rows))[1])
    summary = run(tmp_path / "run", settings)
    assert [Path(name).name for name in read] == ["a.tar", "b.tar", "c.tar"][shards:]
    assert files(tmp_path / "run" / "embed.part") == files(tmp_path / "whole" / "embed.part")
    assert summary["skipped"] == {"image is of no known format": 1}


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_teacher(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tars(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", recipe(source, teachers[0]))
    with pytest.raises(DataError, match=r"another teacher or other fields \(weights_sha256 differ"):
        run(tmp_path / "run", recipe(source, teachers[1]))


def test_a_full_disk_says_what_is_needed_and_keeps_finished_shards(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(write_tars(tmp_path), teachers[0])

    write = writer.write_array

    def full(path: Path, array: Any) -> None:
        if "0001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, array)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_array", full)
        with pytest.raises(RunError, match="the disk is full after 1 of 3 shards") as error:
            run(tmp_path / "run", settings)
    assert "finished shards are kept" in error.value.fix
    assert run(tmp_path / "run", settings)["ok"] == 9


def test_a_disk_without_room_is_refused_before_the_work(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("clip_cid.stages.embed.shutil.disk_usage", lambda _: usage(1000, 900, 9 * 12 * 4 - 1))
    with pytest.raises(RunError, match="are needed for the embeddings"):
        run(tmp_path / "run", recipe(write_tars(tmp_path), teachers[0]))


def test_a_source_that_changes_under_the_workers_is_named(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tars(tmp_path)
    load = teacher_module.load_teacher

    def vanish(*args: Any, **options: Any) -> Any:
        (tmp_path / "b.tar").write_bytes(b"")
        return load(*args, **options)

    monkeypatch.setattr(teacher_module, "load_teacher", vanish)
    with pytest.raises(DataError, match=r"b\.tar: changed or went away"):
        run(tmp_path / "run", recipe(source, teachers[0], workers=1))


def test_a_bug_in_a_worker_is_not_swallowed(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("in a worker")

    monkeypatch.setattr(from_pairs, "decode_image", bug)
    with pytest.raises(ZeroDivisionError, match="in a worker"):
        run(tmp_path / "run", recipe(write_tars(tmp_path), teachers[0], workers=1))


@pytest.mark.slow
def test_a_killed_worker_is_an_error_with_a_remedy(
    tmp_path: Path, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_pairs, "decode_image", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match="decodes images was killed") as error:
        run(tmp_path / "run", recipe(write_tars(tmp_path), teachers[0], workers=1))
    assert "machine.workers" in error.value.fix


def test_an_existing_store_is_taken_over_without_pairs(tmp_path: Path, teachers: list[str]) -> None:
    run(tmp_path / "first", recipe(write_tars(tmp_path), teachers[0]))
    existing = {"existing": tmp_path / "first" / "embed.part"}
    summary = run(tmp_path / "second", recipe(None, "none", embed=existing))
    assert (summary["images"], summary["ok"], summary["teacher"]) == (9, 9, teachers[0])
    store = EmbeddingStore.open(tmp_path / "second" / "embed.part")
    assert store.field("dup")[0] == "group 0"


def test_an_existing_store_must_fit_the_pairs(tmp_path: Path, teachers: list[str]) -> None:
    source = write_tars(tmp_path / "tars")
    run(tmp_path / "first", recipe(str(tmp_path / "tars" / "a.tar"), teachers[0]))
    existing = {"existing": tmp_path / "first" / "embed.part"}
    assert run(tmp_path / "same", recipe(str(tmp_path / "tars" / "a.tar"), "none", embed=existing))["ok"] == 4
    with pytest.raises(DataError, match="5 of 9 pairs have no embedding here, such as 'b0'"):
        run(tmp_path / "other", recipe(source, "none", embed=existing))


def test_a_field_that_hides_a_column_is_refused_before_the_work(tmp_path: Path, teachers: list[str]) -> None:
    with pytest.raises(ValidationError, match="ok would hide a column"):
        recipe(write_tars(tmp_path), teachers[0], pairs={"keep_fields": ["ok"]})


# Images without a caption


def without_captions(folder: Path, *keys: str) -> str:
    """The usual shards, where some images have no text."""
    source = write_tars(folder)
    for letter in "abc":
        with tarfile.open(folder / f"{letter}.tar") as tar:
            members = [(member, (tar.extractfile(member) or io.BytesIO()).read()) for member in tar]
        with tarfile.open(folder / f"{letter}.tar", "w") as tar:
            for member, content in members:
                key, _, extension = member.name.partition(".")
                if key not in keys or extension == "png":
                    tar.addfile(member, io.BytesIO(content))
    return source


@pytest.mark.slow
def test_an_image_without_a_caption_is_embedded_alone_and_the_others_as_ever(
    tmp_path: Path, teachers: list[str]
) -> None:
    whole = recipe(write_tars(tmp_path / "whole"), teachers[0])
    alone = ("a1", "b0", "b1")
    source = without_captions(tmp_path / "sparse", *alone)
    sparse = recipe(source, teachers[0], pairs={"captions": "optional"})
    assert "without_caption" not in run(tmp_path / "one", whole)
    assert run(tmp_path / "two", sparse)["without_caption"] == 3
    one, two = (EmbeddingStore.open(tmp_path / name / "embed.part") for name in ("one", "two"))
    two.check_values()

    # Rows of one batch are computed together, so their last bits may differ from those of other batches.
    captioned = np.array([key not in alone for key in CAPTIONS])
    assert two.ok.all()
    assert np.array_equal(two.images[:], one.images[:])
    assert np.array_equal(two.num_captions, one.num_captions * captioned)
    assert np.allclose(two.texts[:], one.texts[:] * captioned[:, None], atol=1e-3)
    rows = np.flatnonzero(two.num_captions > 1)
    assert np.allclose(two.text_for(rows, 1), one.text_for(rows, 1), atol=1e-3)

    # Required, they are broken.
    with pytest.raises(DataError, match=r"3 of 9 pairs cannot be used so far.*no caption"):
        run(tmp_path / "three", recipe(source, teachers[0]))
