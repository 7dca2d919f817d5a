"""`embed.views`: crops of each image are embedded beside it, once, whatever came before."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_waits import HostWaits
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from clip_cid import devices, pipeline
from clip_cid.data.embeddings import from_pairs
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import StoreWriter
from clip_cid.data.pairs.crops import Views, crop_box
from clip_cid.errors import ClipCidError, DataError
from clip_cid.made_from import different_settings
from clip_cid.models.export import export_student
from clip_cid.models.loading import load_clip
from clip_cid.models.student import build_student
from clip_cid.models.teacher import Teacher
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
SHARDS = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"], "c": ["c0", "c1", "c2", "c3"]}
KEYS = [key for keys in SHARDS.values() for key in keys]
HALF = 2**-11  # of float16, below 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    clip = build_student(str(folder / "tiny.json"), embed_dim=None, seed=0)
    export_student(clip, folder / "teacher", head_state={}, provenance={})
    return f"local-dir:{folder / 'teacher'}"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Images and texts that the teacher has read."""
    counts = {"images": 0, "texts": 0}
    for kind in counts:
        real: Callable[..., Any] = getattr(Teacher, f"begin_{kind}")

        def counting(self: Teacher, rows: Any, *, kind: str = kind, real: Callable[..., Any] = real) -> Any:
            counts[kind] += len(rows)
            return real(self, rows)

        monkeypatch.setattr(Teacher, f"begin_{kind}", counting)
    return counts


def picture(key: str) -> Image.Image:
    pixels = np.random.default_rng(list(key.encode())).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((63, 49))


def write_tars(folder: Path, *, broken: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for letter, keys in SHARDS.items():
        with tarfile.open(folder / f"{letter}.tar", "w") as tar:
            for key in keys:
                buffer = io.BytesIO()
                picture(key).save(buffer, "PNG")
                image = b"no image" if key in broken else buffer.getvalue()
                for extension, content in (("png", image), ("txt", f"caption of {key}".encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def recipe(source: Path, teacher: str, *, views: int, workers: int = 0, batch: int = 256, **changed: Any) -> Recipe:
    return parse_recipe(
        {
            "pairs": {"source": [str(source / "*.tar")], **changed.pop("pairs", {})},
            "embed": {"teacher": teacher, "views": views, **changed},
            "machine": {"device": "cpu", "workers": workers, "embed_batch": batch},
        },
        where="test",
    )


def embed(run: Path, settings: Recipe, **options: Any) -> EmbeddingStore:
    pipeline.run(RunFolder(run), settings, only="embed", **options)
    store = EmbeddingStore.open(run / "embed")
    store.check_values()
    return store


def views_in(store: EmbeddingStore) -> np.ndarray:
    """(rows, views, dim)."""
    assert store.info.views is not None
    every = [store.view_for(np.arange(store.rows), np.full(store.rows, view)) for view in range(store.info.views.count)]
    return np.stack(every, axis=1).astype(np.float32)


def test_a_view_is_what_the_teacher_gives_for_that_crop(tmp_path: Path, teacher: str):
    store = embed(tmp_path / "run", recipe(write_tars(tmp_path / "data"), teacher, views=3, view_crop_scale=0.2))
    assert store.info.views == Views(3, 0.2)
    assert np.load(store.path / "view_emb" / "view_emb_0002.npy").shape == (4, 3, 12)

    clip = load_clip(teacher, device="cpu")
    model: Any = clip.model
    mean, std = (np.array(clip.preprocess_cfg[name], dtype=np.float32) for name in ("mean", "std"))
    for row, key in enumerate(KEYS):
        for view in range(3):
            left, upper, right, lower = crop_box(key, view, (63, 49), crop_scale=0.2)
            size = (lower - upper, right - left)
            whole: Any = picture(key)
            pixels = F.resized_crop(whole, upper, left, *size, [32, 32], InterpolationMode.BICUBIC)
            scaled = ((np.asarray(pixels, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1)
            with torch.inference_mode():
                expected = model.encode_image(torch.from_numpy(scaled)[None], normalize=True)[0].numpy()
            found = store.view_for(np.array([row]), np.array([view]))[0].astype(np.float32)
            assert np.abs(found - expected).max() < HALF


def test_whole_images_and_captions_are_embedded_as_without_views(tmp_path: Path, teacher: str):
    source = write_tars(tmp_path / "data")
    plain = embed(tmp_path / "plain", recipe(source, teacher, views=0))
    with_views = embed(tmp_path / "views", recipe(source, teacher, views=2))
    for one, other in ((plain.images, with_views.images), (plain.texts, with_views.texts)):
        assert np.abs(one[:].astype(np.float32) - other[:].astype(np.float32)).max() <= HALF
    assert plain.info.views is None
    assert "views" not in json.loads((plain.path / "store.json").read_text())
    assert not (plain.path / "view_emb").exists()
    with pytest.raises(DataError, match=r"no views of its images[^§]*Set embed\.views"):
        plain.view_for(np.array([0]), np.array([0]))


def test_neither_batch_nor_workers_change_the_views(tmp_path: Path, teacher: str):
    source = write_tars(tmp_path / "data")
    stores = [
        embed(tmp_path / f"{batch}", recipe(source, teacher, views=3, batch=batch, workers=workers))
        for batch, workers in ((256, 0), (5, 2), (1, 0))
    ]
    for other in stores[1:]:
        assert np.abs(views_in(stores[0]) - views_in(other)).max() <= HALF


def test_a_batch_holds_no_more_images_than_it_may(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    real = Teacher.begin_images
    monkeypatch.setattr(
        Teacher, "begin_images", lambda self, images: (sizes.append(len(images)), real(self, images))[1]
    )
    embed(tmp_path / "six", recipe(write_tars(tmp_path / "data"), teacher, views=2, batch=7))
    assert max(sizes) == 6
    sizes.clear()
    embed(tmp_path / "one", recipe(tmp_path / "data", teacher, views=4, batch=2))
    assert max(sizes) == 2


@pytest.mark.parametrize(
    ("before", "now", "images"), [(0, 3, 3), (2, 5, 3), (5, 2, 0), (3, 0, 0)], ids=lambda count: str(count)
)
def test_only_what_is_missing_is_embedded(
    tmp_path: Path, teacher: str, forwards: dict[str, int], before: int, now: int, images: int
):
    source = write_tars(tmp_path / "data")
    embed(tmp_path / "run", recipe(source, teacher, views=before))
    forwards.update(images=0, texts=0)
    store = embed(tmp_path / "run", recipe(source, teacher, views=now))
    assert forwards == {"images": images * len(KEYS), "texts": 0}

    fresh = embed(tmp_path / "fresh", recipe(source, teacher, views=now))
    assert np.abs(store.images[:].astype(np.float32) - fresh.images[:]).max() <= HALF
    if now:
        assert np.abs(views_in(store) - views_in(fresh)).max() <= HALF
    names = [sorted(str(path.relative_to(one.path)) for path in one.path.rglob("*")) for one in (store, fresh)]
    assert names[0] == names[1]
    assert (tmp_path / "run" / "aside").exists() == (now < before), "views that are given up are kept aside"

    # The settings of before bring them back.
    forwards.update(images=0, texts=0)
    embed(tmp_path / "run", recipe(source, teacher, views=before))
    assert forwards["images"] == forwards["texts"] == 0


def test_other_crops_are_embedded_anew_and_the_images_are_not(tmp_path: Path, teacher: str, forwards: dict[str, int]):
    source = write_tars(tmp_path / "data")
    before = views_in(embed(tmp_path / "run", recipe(source, teacher, views=2)))
    forwards.update(images=0, texts=0)
    now = views_in(embed(tmp_path / "run", recipe(source, teacher, views=2, view_crop_scale=0.9)))
    assert forwards == {"images": 2 * len(KEYS), "texts": 0}
    assert np.abs(before - now).max() > 10 * HALF


def test_a_scale_without_views_decides_nothing(tmp_path: Path, teacher: str, forwards: dict[str, int]):
    source = write_tars(tmp_path / "data")
    embed(tmp_path / "run", recipe(source, teacher, views=0))
    settings = recipe(source, teacher, views=0, view_crop_scale=0.9)
    state = next(
        state for state in pipeline.states(RunFolder(tmp_path / "run"), settings) if state.stage.name == "embed"
    )
    assert state.status == "done"


@pytest.mark.resume
@pytest.mark.parametrize("before", [None, 0])
def test_a_killed_embedding_of_views_is_resumed(
    tmp_path: Path, teacher: str, forwards: dict[str, int], monkeypatch: pytest.MonkeyPatch, before: int | None
):
    source = write_tars(tmp_path / "data")
    if before is not None:
        embed(tmp_path / "run", recipe(source, teacher, views=before))
    settings = recipe(source, teacher, views=2)
    with monkeypatch.context() as patched:
        real = StoreWriter._add

        def dying(self: StoreWriter, *shard: Any) -> None:
            if len(self.shards) == 2:
                raise KeyboardInterrupt
            real(self, *shard)

        patched.setattr(StoreWriter, "_add", dying)
        with pytest.raises(KeyboardInterrupt):
            embed(tmp_path / "run", settings)

    forwards.update(images=0, texts=0)
    store = embed(tmp_path / "run", settings)
    assert forwards["images"] == 4 * (3 if before is None else 2)
    fresh = embed(tmp_path / "fresh", settings)
    assert np.array_equal(views_in(store), views_in(fresh)) or before is not None
    assert np.abs(views_in(store) - views_in(fresh)).max() <= HALF


def test_a_bad_pair_has_no_views_and_shifts_nothing(tmp_path: Path, teacher: str):
    whole = views_in(embed(tmp_path / "whole", recipe(write_tars(tmp_path / "good"), teacher, views=2)))
    source = write_tars(tmp_path / "bad", broken=("b0", "c1"))
    allowed: dict[str, Any] = {"pairs": {"max_bad_share": 0.5}}
    runs = [tmp_path / "at once", tmp_path / "later"]
    embed(runs[1], recipe(source, teacher, views=0, **allowed))
    for run in runs:
        views = views_in(embed(run, recipe(source, teacher, views=2, **allowed)))
        assert np.flatnonzero(~views.any(axis=(1, 2))).tolist() == [3, 6]
        rest = np.setdiff1d(np.arange(9), [3, 6])
        assert np.abs(views[rest] - whole[rest]).max() <= HALF


def test_an_image_that_cannot_be_used_any_more_stops_views_beside_it(tmp_path: Path, teacher: str):
    source = write_tars(tmp_path / "data")
    embed(tmp_path / "run", recipe(source, teacher, views=0))
    lower: dict[str, Any] = {"pairs": {"max_pixels": 3000, "max_bad_share": 1}}
    with pytest.raises(
        DataError, match=r"a\.tar: the views .* row 0 cannot be used any more: image claims more pixels"
    ):
        embed(tmp_path / "run", recipe(source, teacher, views=1, **lower))


def test_a_damaged_file_of_views_is_found_and_its_shard_embedded_again(
    tmp_path: Path, teacher: str, forwards: dict[str, int]
):
    source = write_tars(tmp_path / "data")
    settings = recipe(source, teacher, views=2)
    store = embed(tmp_path / "run", settings)
    path = store.path / "view_emb" / "view_emb_0001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert pipeline.verify(RunFolder(tmp_path / "run"))

    forwards.update(images=0, texts=0)
    more = embed(tmp_path / "run", recipe(source, teacher, views=3))
    assert forwards == {"images": 1 * 7 + 4 * 2, "texts": 2}
    assert np.abs(views_in(more)[:, :2] - views_in(embed(tmp_path / "fresh", settings))).max() <= HALF

    (more.path / "view_emb" / "view_emb_0000.npy").unlink()
    with pytest.raises(DataError, match=r"view_emb_0000\.npy: missing"):
        EmbeddingStore.open(more.path)


def test_views_that_are_not_of_unit_length_are_refused(tmp_path: Path, teacher: str):
    store = embed(tmp_path / "run", recipe(write_tars(tmp_path / "data"), teacher, views=2))
    path = store.path / "view_emb" / "view_emb_0000.npy"
    array = np.load(path)
    array[1, 1] *= 2
    np.save(path, array)
    with pytest.raises(DataError, match=r"view_emb_0000\.npy \(2 views a row\): row 3 has length 2"):
        EmbeddingStore.open(store.path).check_values()


def test_other_stages_stay_as_they_were_but_the_training(tmp_path: Path, teacher: str):
    source = write_tars(tmp_path / "data")
    run = RunFolder(tmp_path / "run")
    embed(run.path, recipe(source, teacher, views=0))
    pipeline.run(run, recipe(source, teacher, views=0), only="balance")
    before = run.record("embed")
    settings = recipe(source, teacher, views=2)
    embed(run.path, settings)
    after = run.record("embed")
    assert before is not None
    assert after is not None
    assert after.results == before.results
    states = {state.stage.name: state.status for state in pipeline.states(run, settings)}
    assert states["balance"] == "done"


def test_the_training_is_stale_when_the_views_change():
    distill = next(stage for stage in pipeline.STAGES if stage.name == "distill")
    plain = distill.settings(Recipe())
    assert plain.keys() == {"pairs", "distill"}, "without views the record is as it always was"
    wanted = [distill.settings(Recipe.model_validate({"embed": {"views": count}})) for count in (2, 5)]
    assert different_settings(plain, wanted[0]) == ["embed.views 0 -> 2 (embed.view_crop_scale 0.4)"]
    assert different_settings(wanted[0], plain) == ["embed.views 2 (embed.view_crop_scale 0.4) -> 0"]
    assert len(different_settings(*wanted)) == 1
    assert different_settings(wanted[0], wanted[0]) == []


def test_a_store_with_views_is_taken_over_with_them_or_without(tmp_path: Path, teacher: str):
    source = write_tars(tmp_path / "data")
    store = embed(tmp_path / "run", recipe(source, teacher, views=2))

    def taken(name: str, **settings: Any) -> EmbeddingStore:
        return embed(tmp_path / name, recipe(source, teacher, existing=store.path, **settings))

    assert np.array_equal(views_in(taken("with", views=2)), views_in(store))
    assert taken("without", views=0).info.views is None
    with pytest.raises(DataError, match=r"its views are 2 of 0\.4 to 1 of the area, but the recipe asks for 3 of 0\.4"):
        taken("more", views=3)
    with pytest.raises(DataError, match=r"the recipe asks for 2 of 0\.5"):
        taken("others", views=2, view_crop_scale=0.5)


def test_embeddings_from_elsewhere_have_no_views(tmp_path: Path, teacher: str):
    store = embed(tmp_path / "run", recipe(write_tars(tmp_path / "data"), teacher, views=0))
    np.save(tmp_path / "vectors.npy", store.images[:])
    for existing in (tmp_path / "vectors.npy", store.path):
        settings = recipe(tmp_path / "data", teacher, views=2, existing=existing)
        with pytest.raises(DataError, match=r"embed\.views: 2, but these embeddings are of whole images only"):
            embed(tmp_path / "other", settings)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"embed": {"teacher": "none", "views": 2}, "distill": {"weights": "clip-only"}}, "nothing embeds them"),
        (
            {"embed": {"views": 2}, "distill": {"crop_scale": 0.5}},
            r"crop_scale: 0\.5 has no effect with embed\.views: 2",
        ),
        ({"embed": {"views": -1}}, "greater than or equal to 0"),
        ({"embed": {"views": 1, "view_crop_scale": 0}}, "greater than 0"),
    ],
)
def test_settings_that_contradict_views_are_refused(sections: dict[str, Any], message: str):
    with pytest.raises(ClipCidError, match=message):
        parse_recipe(sections, where="test")


# What the host waits for


@pytest.mark.parametrize("views", [0, 2])
def test_on_a_device_a_batch_is_waited_for_when_the_next_one_is_begun(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, views: int
):
    """Nothing else is waited for, shards or not, and the store is the same."""
    settings = recipe(write_tars(tmp_path / "data"), teacher, views=views, batch=4 * (1 + views))
    plain = embed(tmp_path / "plain", settings)

    happened: list[str] = []
    for kind in ("images", "texts"):
        real: Callable[..., Any] = getattr(Teacher, f"begin_{kind}")

        def begin(self: Teacher, rows: Any, *, kind: str = kind, real: Callable[..., Any] = real) -> Any:
            with HostWaits("nothing"):
                embedding = real(self, rows)
            happened.append(f"begin {kind}")
            return lambda: (happened.append(f"wait for {kind}"), embedding())[1]

        monkeypatch.setattr(Teacher, f"begin_{kind}", begin)
    monkeypatch.setattr(
        from_pairs, "one_ahead", lambda batches, do, _: devices.one_ahead(batches, do, torch.device("meta"))
    )
    ahead = embed(tmp_path / "ahead", settings)

    begun, waited = ([f"{what} images", f"{what} texts"] for what in ("begin", "wait for"))
    assert happened == begun + 2 * (begun + waited) + waited  # shards of 3, 2 and 4 rows
    arrays = sorted(path.relative_to(plain.path) for path in plain.path.rglob("*.npy"))
    assert len(arrays) >= 3 * (2 + bool(views))
    assert all((plain.path / name).read_bytes() == (ahead.path / name).read_bytes() for name in arrays)
