"""A training on embedded views: resumed exactly, refused on other views, and on whole images the same as without."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_training import power_cut

from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.crops import Views
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig, Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages import distill
from clip_cid.training import assemble
from clip_cid.training.join import distilled_pairs

COUNT, DIM, CENTERS = 20, 16, 6
STUDENT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def unit_rows(*shape: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Case:
    """Runs on square pictures, and stores of their embeddings with some views."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "pairs").mkdir()
        random = np.random.default_rng(0)
        for number in range(COUNT):
            color = random.integers(0, 200, 3) + random.integers(0, 56, (20, 20, 3))
            Image.fromarray(color.astype(np.uint8)).save(path / "pairs" / f"{number:02d}.png")
            (path / "pairs" / f"{number:02d}.txt").write_text(f"color {number}\n")
        (path / "student.json").write_text(json.dumps(STUDENT))

    def folder(self, name: str, views: Views | None) -> RunFolder:
        """A run that is balanced and clustered; of one view only, its embedding is that of the whole image."""
        path = self.path / name
        if path.exists():
            return RunFolder(path)
        pairs = open_pairs(PairsConfig(source=(str(self.path / "pairs"),)))
        teacher = {"reference": "noise"}
        writer = StoreWriter(path / "embed", teacher=teacher, dim=DIM, fields=(), num_shards=1, views=views)
        images = unit_rows(COUNT, DIM, seed=1)
        crops = (
            None
            if views is None
            else images[:, None]
            if views.count == 1
            else unit_rows(COUNT, views.count, DIM, seed=4)
        )
        writer.add(
            ShardRows(
                name="all",
                images=images,
                texts=unit_rows(COUNT, DIM, seed=2),
                more_texts=images[:0],
                ok=np.ones(COUNT, dtype=bool),
                keys=pairs.keys(0, COUNT),
                captions=[pairs.read(row).captions for row in range(COUNT)],
                sizes=[(20, 20)] * COUNT,
                fields={},
                skipped=[],
                views=crops,
            )
        )
        writer.finish()
        arrays = {
            "balance": {"kept": np.arange(COUNT)},
            "cluster": {
                "centers": unit_rows(CENTERS, DIM, seed=5),
                "labels": np.arange(COUNT, dtype=np.int32) % CENTERS,
            },
        }
        for stage in ("embed", "balance", "cluster"):
            (path / stage).mkdir(exist_ok=True)
            (path / stage / "manifest.json").write_text("{}")
            for array, values in arrays.get(stage, {}).items():
                np.save(path / stage / f"{array}.npy", values)
        return RunFolder(path)

    def recipe(self, views: Views | None, **changes: Any) -> Recipe:
        embed = {} if views is None else {"views": views.count, "view_crop_scale": views.crop_scale}
        settings = {
            "student": str(self.path / "student.json"),
            "batch_size": 6,
            "epochs": 3,
            "warmup_steps": 1,
            "log_every": 2,
            "sample_rate": 1.0,
        }
        values = {
            "pairs": {"source": [str(self.path / "pairs")]},
            "embed": {"teacher": "noise", **embed},
            "distill": settings | changes,
            "machine": {"device": "cpu", "threads": 1, "workers": 0, "tensorboard": "off"},
        }
        return parse_recipe(values, where="test")

    def run(self, name: str, views: Views | None, out: str = "distill.part", **changes: Any) -> bytes:
        """The weights of the student."""
        folder = self.folder(name, views)
        (folder.path / out).mkdir(exist_ok=True)
        distill.run(folder, folder.path / out, self.recipe(views, **changes))
        return (folder.path / out / "student" / "open_clip_model.safetensors").read_bytes()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.slow
def test_one_view_of_the_whole_image_trains_the_same_student_as_no_views(case: Case):
    changes: dict[str, Any] = {"sample_rate": 0.9, "validation": {"share": 0.3}}
    assert case.run("whole", Views(1, 1.0), **changes) == case.run("plain", None, **changes, crop_scale=1.0)
    lines = [
        (case.path / name / "distill.part" / "metrics.jsonl").read_text().splitlines() for name in ("whole", "plain")
    ]
    measured = [[json.loads(line) for line in some] for some in lines]
    for one, other in zip(*measured, strict=True):
        same = {name for name in one if name.startswith(("loss", "val/", "grad"))}
        assert {name: one[name] for name in same} == {name: other[name] for name in same}


@pytest.mark.slow
@pytest.mark.resume
def test_a_killed_training_on_views_gives_the_same_student(case: Case):
    views = Views(3, 0.3)
    whole = case.run("run", views, out="whole")
    with power_cut(5):
        case.run("run", views)
    assert case.run("run", views) == whole
    assert case.run("other", Views(2, 0.3)) != whole


@pytest.mark.slow
def test_soft_centers_are_not_computed_once_for_views(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assemble, "with_soft_centers", lambda *_: pytest.fail("they are of whole images"))
    case.run("run", Views(2, 0.5), head_lr=0.0)


@pytest.mark.slow
def test_losses_without_a_teacher_see_the_same_crops(case: Case):
    views, folder = Views(2, 0.5), case.folder("run", Views(2, 0.5))
    recipe = case.recipe(views, weights="clip-only")
    store = EmbeddingStore.open(folder.stage("embed"))
    training = distilled_pairs(folder, recipe, open_pairs(recipe.pairs), store)
    assert training.store is None
    assert training.views == views
    assert case.run("run", views, weights="clip-only", steps=2)


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        (None, Views(2, 0.4), r"asks for views 2 of 0\.4 to 1 of the area, but here are none"),
        (Views(2, 0.5), Views(2, 0.4), r"but here are 2 of 0\.5 to 1"),
        (Views(3, 0.4), Views(2, 0.4), "but here are 3 of"),
        (Views(2, 0.4, law=0), Views(2, 0.4), "but here are 2 of 0.4 to 1 of the area by law 0"),
    ],
)
def test_a_store_with_other_views_is_refused(case: Case, stored: Views | None, asked: Views, message: str):
    folder, recipe = case.folder("run", stored), case.recipe(asked)
    store = EmbeddingStore.open(folder.stage("embed"))
    with pytest.raises(DataError, match=message):
        distilled_pairs(folder, recipe, open_pairs(recipe.pairs), store)
