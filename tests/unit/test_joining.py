"""Stores of several teachers as one: joined by key, resumable, and a store like any other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid import joining
from clip_cid.ablations import variants
from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.crops import Views
from clip_cid.errors import ConfigError, DataError
from clip_cid.joining import join_teachers, read_transforms
from clip_cid.method.joined_space import join_rows
from clip_cid.models.public_names import public_provenance
from clip_cid.recipe import DistillConfig, parse_recipe
from clip_cid.training.kept_texts import text_tower_reference

KEYS = [f"pair {number:02d}" for number in range(30)]


def captions_of(key: str) -> tuple[str, ...]:
    """One to three captions."""
    number = int(key.split()[1])
    return tuple(f"{key}, caption {place}" for place in range(1 + number % 3))


def vectors(name: str, what: str, dim: int) -> np.ndarray:
    random = np.random.default_rng(list(f"{name} {what}".encode()))
    row = random.normal(size=dim) * np.arange(1, dim + 1) + np.random.default_rng(len(name)).normal(size=dim) * dim
    return row / np.linalg.norm(row)


def write_store(
    folder: Path,
    name: str,
    dim: int,
    keys: Sequence[str] = KEYS,
    *,
    bad: Sequence[str] = (),
    captions: Any = captions_of,
    shard_rows: int = 8,
    views: Views | None = None,
    size: tuple[int, int] = (4, 3),
) -> Path:
    shards = [keys[start : start + shard_rows] for start in range(0, len(keys), shard_rows)]
    teacher = {"reference": f"local-dir:/models/{name}", "weights_sha256": name}
    writer = StoreWriter(folder, teacher=teacher, dim=dim, fields=("kind",), num_shards=len(shards), views=views)
    for number, own in enumerate(shards):
        ok = np.array([key not in bad for key in own])
        texts = [[vectors(name, caption, dim) for caption in captions(key)] for key in own]
        more = [row for good, rows in zip(ok, texts, strict=True) if good for row in rows[1:]]
        skipped = [
            {"row": number * shard_rows + place, "key": key, "shard": str(number), "reason": "test"}
            for place, key in enumerate(own)
            if key in bad
        ]
        writer.add(
            ShardRows(
                name=str(number),
                images=np.array([vectors(name, key, dim) for key in own]) * ok[:, None],
                texts=np.array([rows[0] for rows in texts]) * ok[:, None],
                more_texts=np.array(more).reshape(-1, dim),
                ok=ok,
                keys=list(own),
                captions=[captions(key) for key in own],
                sizes=[size] * len(own),
                fields={"kind": [key[-1] for key in own]},
                skipped=skipped,
                views=None if views is None else views_of(name, own, dim, views.count) * ok[:, None, None],
            )
        )
    writer.finish()
    return folder


def views_of(name: str, keys: Sequence[str], dim: int, count: int) -> np.ndarray:
    return np.array([[vectors(name, f"{key}, view {number}", dim) for number in range(count)] for key in keys])


def write_images(folder: Path, name: str, dim: int, keys: Sequence[str] = KEYS) -> Path:
    """A store without texts, taken over from elsewhere."""
    arrays = folder.with_name(folder.name + " arrays")
    arrays.mkdir()
    np.save(arrays / "image_embeddings.npy", np.array([vectors(name, key, dim) for key in keys], dtype=np.float16))
    pq.write_table(pa.table({"key": list(keys)}), arrays / "metadata.parquet")
    import_existing(arrays, folder)
    return folder


def cosines(rows: np.ndarray) -> np.ndarray:
    return rows @ rows.T


def expected(weights: Sequence[float], dims: Sequence[int], names: Sequence[str], whats: Sequence[str]) -> np.ndarray:
    """The weighted mean of the teachers' cosines."""
    of_each = [
        weight**2 * cosines(np.array([vectors(name, what, dim) for what in whats]))
        for weight, dim, name in zip(weights, dims, names, strict=True)
    ]
    return np.sum(of_each, axis=0)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_rows_in_another_order_are_joined_by_key_and_cosines_are_the_weighted_mean(tmp_path: Path):
    first = write_store(tmp_path / "a", "a", 12)
    second = write_store(tmp_path / "b", "bb", 20, KEYS[::-1], shard_rows=11)
    store = join_teachers([first, second], tmp_path / "out")
    store.check_values()
    assert list(store.keys) == KEYS
    assert store.dim == 32
    weights = [one["weight"] for one in store.info.teacher["joined"]]
    assert sum(weight**2 for weight in weights) == pytest.approx(1)
    images = store.images[np.arange(30)].astype(np.float64)
    assert np.abs(cosines(images) - expected(weights, (12, 20), ("a", "bb"), KEYS)).max() < 2e-3  # float16

    # Every caption of every row, and an image against a text.
    for row, key in enumerate(KEYS):
        assert store.captions(row) == captions_of(key)
        texts = np.array([store.text_for(np.array([row]), place)[0] for place in range(len(captions_of(key)))])
        both = np.concatenate([images[row : row + 1], texts.astype(np.float64)])
        wanted = expected(weights, (12, 20), ("a", "bb"), [key, *captions_of(key)])
        assert np.abs(cosines(both) - wanted).max() < 2e-3
    assert store.field("kind") == [key[-1] for key in KEYS]


def test_each_teacher_varies_as_much_and_evenly(tmp_path: Path):
    sources = [write_store(tmp_path / name, name, dim) for name, dim in (("a", 12), ("bb", 16))]
    store = join_teachers(sources, tmp_path / "out")
    images = store.images[np.arange(30)].astype(np.float64)
    variances = images.var(axis=0)
    np.testing.assert_allclose(variances[:12], np.full(12, variances[:12].mean()), rtol=0.02)
    np.testing.assert_allclose(variances[12:], np.full(16, variances[12:].mean()), rtol=0.02)
    assert variances[:12].sum() == pytest.approx(variances[12:].sum(), rel=0.01)


def test_the_transforms_bring_other_rows_into_the_space(tmp_path: Path):
    sources = [write_store(tmp_path / name, name, dim) for name, dim in (("a", 12), ("bb", 16))]
    store = join_teachers(sources, tmp_path / "out")
    transforms = read_transforms(tmp_path / "out")
    again = join_rows(
        [EmbeddingStore.open(source).images[np.arange(30)].astype(np.float64) for source in sources],
        [transform.rotation for transform in transforms],
        [transform.weight for transform in transforms],
    )
    assert np.abs(again - store.images[np.arange(30)]).max() < 2.0**-11
    (tmp_path / "out" / "transforms.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="transforms of joined teachers cannot be read"):
        read_transforms(tmp_path / "out")


def test_rows_that_a_teacher_lacks_keep_their_place_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = write_store(tmp_path / "a", "a", 12, bad=[KEYS[3]])
    second = write_store(tmp_path / "b", "bb", 16, [*KEYS[:7], *KEYS[9:], "pair 99"], bad=[KEYS[20]])
    store = join_teachers([first, second], tmp_path / "out")
    missing = [3, 7, 8, 20]
    assert np.flatnonzero(~store.ok).tolist() == missing
    assert not store.images[np.array(missing)].any()
    store.check_values()
    assert store.num_captions.tolist() == [
        0 if row in missing else len(captions_of(key)) for row, key in enumerate(KEYS)
    ]
    assert "3 of 30 rows have no embedding there" in caplog.text
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert "no embedding of local-dir:/models/a" in lines[0]
    assert "no embedding of local-dir:/models/bb" in lines[1]


def test_a_store_of_images_alone_leaves_images_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sources = [write_store(tmp_path / "a", "a", 12), write_images(tmp_path / "b", "bb", 16)]
    for number, order in enumerate((sources, sources[::-1])):
        store = join_teachers(order, tmp_path / f"out {number}")
        assert not store.has_texts
        store.check_values()
        weights = [one["weight"] for one in store.info.teacher["joined"]]
        names, dims = (("a", "bb"), (12, 16)) if order is sources else (("bb", "a"), (16, 12))
        images = store.images[np.arange(30)].astype(np.float64)
        assert np.abs(cosines(images) - expected(weights, dims, names, KEYS)).max() < 2e-3
    assert "images only, so the joined store has no text embeddings" in caplog.text


def test_equal_views_are_joined_and_others_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    views = Views(2, 0.5)
    first = write_store(tmp_path / "a", "a", 12, views=views, bad=[KEYS[5]])
    second = write_store(tmp_path / "b", "bb", 16, KEYS[::-1], views=views)
    store = join_teachers([first, second], tmp_path / "out")
    store.check_values()
    assert store.info.views == views
    weights = [one["weight"] for one in store.info.teacher["joined"]]
    for row in (0, 7, 29):
        found = np.array([store.view_for(np.array([row]), np.array([number]))[0] for number in range(2)])
        wanted = expected(weights, (12, 16), ("a", "bb"), [f"{KEYS[row]}, view {number}" for number in range(2)])
        assert np.abs(cosines(found.astype(np.float64)) - wanted).max() < 2e-3
    assert not store.view_for(np.array([5]), np.array([1])).any()

    other = write_store(tmp_path / "c", "ccc", 16, views=Views(2, 0.9))
    assert join_teachers([first, other], tmp_path / "out 2").info.views is None
    assert "have not the same views" in caplog.text


def test_views_of_images_of_other_sizes_are_refused(tmp_path: Path):
    views = Views(2, 0.5)
    first = write_store(tmp_path / "a", "a", 12, views=views)
    other = write_store(tmp_path / "b", "bb", 16, KEYS[::-1], views=views, size=(8, 6))
    with pytest.raises(
        DataError, match=r"the views of 'pair 00' are of an image of 8 x 6 pixels, but of 4 x 3 in .* \(30"
    ):
        join_teachers([first, other], tmp_path / "out")


def test_every_later_stage_takes_it_as_any_store(tmp_path: Path):
    sources = [write_store(tmp_path / name, name, dim) for name, dim in (("a", 12), ("bb", 16))]
    store = join_teachers(sources, tmp_path / "out")
    import_existing(tmp_path / "out", tmp_path / "run")
    taken = EmbeddingStore.open(tmp_path / "run")
    assert taken.info.teacher == store.info.teacher
    public = public_provenance({"teacher": store.info.teacher})
    assert public["teacher"] == {"reference": "local-dir:a + local-dir:bb", "weights_sha256": "a + bb"}
    with pytest.raises(ConfigError, match="embeddings are of 2 joined teachers"):
        text_tower_reference(DistillConfig.model_validate({"text_tower": "teacher"}), store.info.teacher)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_a_killed_join_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int):
    sources = [write_store(tmp_path / "a", "a", 12, bad=[KEYS[2]]), write_store(tmp_path / "b", "bb", 16, KEYS[4:])]
    join_teachers(sources, tmp_path / "whole")
    write, written = joining._write_shard, list[int]()

    def until(*arguments: Any) -> Any:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(1)
        return write(*arguments)

    monkeypatch.setattr(joining, "_write_shard", until)
    with pytest.raises(KeyboardInterrupt):
        join_teachers(sources, tmp_path / "killed")
    monkeypatch.undo()
    if shards == 3:  # of which the second is damaged
        path = tmp_path / "killed" / "img_emb" / "img_emb_0001.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = list[int]()
    monkeypatch.setattr(joining, "_write_shard", lambda *all: (again.append(all[3]), write(*all))[1])
    join_teachers(sources, tmp_path / "killed")
    assert again == {0: [0, 1, 2, 3], 1: [1, 2, 3], 3: [1, 2, 3]}[shards]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    monkeypatch.setattr(joining, "_Joint", None)  # nothing is computed again
    join_teachers(sources, tmp_path / "killed")


def test_what_does_not_fit_is_refused(tmp_path: Path):
    first = write_store(tmp_path / "a", "a", 12)
    fewer = write_store(tmp_path / "fewer", "bb", 16, captions=lambda key: captions_of(key)[:2])
    other = write_store(
        tmp_path / "other", "bb", 16, captions=lambda key: tuple(f"{text}!" for text in captions_of(key))
    )
    apart = write_store(tmp_path / "apart", "bb", 16, [f"x{key}" for key in KEYS])
    with pytest.raises(DataError, match=r"'pair 02' has embeddings of 2 captions, but of 3 .* \(10 such rows\)"):
        join_teachers([first, fewer], tmp_path / "out 1")
    with pytest.raises(DataError, match="the stores embedded different captions"):
        join_teachers([first, other], tmp_path / "out 2")
    with pytest.raises(DataError, match="no row has an embedding of each teacher"):
        join_teachers([first, apart], tmp_path / "out 3")
    with pytest.raises(DataError, match="neither an embedding store nor a run"):
        join_teachers([first, tmp_path], tmp_path / "out 4")
    with pytest.raises(ConfigError, match="no stores to join"):
        join_teachers([], tmp_path / "out 5")

    second = write_store(tmp_path / "b", "bb", 16)
    for place in (tmp_path / "a", tmp_path):
        with pytest.raises(DataError, match="holds something else than a join of these stores"):
            join_teachers([first, second], place)
    join_teachers([first, second], tmp_path / "out")
    with pytest.raises(DataError, match="holds something else than a join of these stores"):
        join_teachers([second, first], tmp_path / "out")


def test_one_narrow_teacher_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    first, second = write_store(tmp_path / "a", "a", 12), write_store(tmp_path / "b", "bb", 16)
    monkeypatch.setattr(joining, "equal_weights", lambda variances: np.sqrt([0.05, 0.95]))
    join_teachers([first, second], tmp_path / "out")
    assert "one teacher has 95.0 % of every cosine" in caplog.text


def test_the_table_of_teachers_takes_a_store(tmp_path: Path):
    sources = [write_store(tmp_path / name, name, dim) for name, dim in (("a", 12), ("bb", 16))]
    join_teachers(sources, tmp_path / "out")
    recipe = parse_recipe({"evaluate": {"sets": {"digits": "builtin:digits"}}}, where="test")
    plan = variants.plan("teacher", recipe, values=["ViT-B-32/openai", str(tmp_path / "out")])
    settings = [variants.recipe_of(plan, recipe, variant, 0).embed for variant in plan.variants]
    assert [one.existing for one in settings] == [None, tmp_path / "out"]
