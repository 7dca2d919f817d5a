"""Clusters of texts: made by the stage, read by the training, and those of the images are as without them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import power_cut

from clip_cid.data.embeddings.caption_rows import CaptionRows
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.cluster.clustering import assign, spherical_kmeans
from clip_cid.recipe import PairsConfig, Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages import cluster, distill
from clip_cid.summaries import as_json
from clip_cid.training.assemble import prepare
from clip_cid.training.ranks.distributed import ALONE

COUNT, DIM = 24, 16
KEPT = np.array([0, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21, 23])
FILES = ("centers.npy", "labels.npy", "text_centers.npy", "text_labels.npy")
WEIGHTS = {"text_cluster_cls": 1.0, "text_cluster_kl": 1.0, "cross_cluster_image": 1.0, "cross_cluster_text": 1.0}
STUDENT = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def captions_of(number: int) -> int:
    return 1 + number % 3


def unit_rows(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Case:
    """A run that is embedded (one to three captions an image) and balanced."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, RunFolder(path / "run")
        (path / "pairs").mkdir()
        for number in range(COUNT):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / "pairs" / f"{number:02d}.png")
            lines = [f"text {number} {which}\n" for which in range(captions_of(number))]
            (path / "pairs" / f"{number:02d}.txt").write_text("".join(lines))
        (path / "student.json").write_text(json.dumps(STUDENT))
        self.write_store()
        (self.folder.path / "balance").mkdir()
        np.save(self.folder.path / "balance" / "kept.npy", KEPT)
        for stage in ("embed", "balance"):
            (self.folder.path / stage / "manifest.json").write_text("{}")

    def write_store(self) -> None:
        found = open_pairs(PairsConfig(source=(str(self.path / "pairs"),)))
        writer = StoreWriter(
            self.folder.path / "embed", teacher={"reference": "noise"}, dim=DIM, fields=(), num_shards=1
        )
        further = sum(captions_of(number) - 1 for number in range(COUNT))
        writer.add(
            ShardRows(
                name="all",
                images=unit_rows(COUNT, seed=1),
                texts=unit_rows(COUNT, seed=2),
                more_texts=unit_rows(further, seed=3),
                ok=np.ones(COUNT, dtype=bool),
                keys=[found.key(row) for row in range(COUNT)],
                captions=[found.read(row).captions for row in range(COUNT)],
                sizes=[(16, 16)] * COUNT,
                fields={},
                skipped=[],
            )
        )
        writer.finish()

    @property
    def store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.folder.path / "embed")

    def recipe(self, *, clusters: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        settings = {"student": str(self.path / "student.json"), "batch_size": 6, "epochs": 2, "warmup_steps": 1}
        values = {
            "pairs": {"source": [str(self.path / "pairs")]},
            "embed": {"teacher": "noise"},
            "cluster": {"num_centers": 4, "num_text_centers": 5, "texts": True, "iterations": 3} | (clusters or {}),
            "distill": settings | changes,
            "machine": {"device": "cpu", "threads": 1, "workers": 0, "tensorboard": "off"},
        }
        return parse_recipe(values, where="test")

    def cluster(self, out: str = "cluster", **clusters: Any) -> dict[str, Any]:
        path = self.folder.path / out
        path.mkdir(exist_ok=True)
        summary = as_json(cluster.run(self.folder, path, self.recipe(clusters=clusters)))
        (path / "manifest.json").write_text("{}")
        return summary

    def train(self, out: str, **changes: Any) -> dict[str, Any]:
        path = self.folder.path / out
        path.mkdir(exist_ok=True)
        summary = distill.run(self.folder, path, self.recipe(**changes))
        assert summary is not None
        return as_json(summary)

    def bytes_of(self, out: str) -> dict[str, bytes]:
        return {name: (self.folder.path / out / name).read_bytes() for name in FILES}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def all_captions(store: EmbeddingStore) -> np.ndarray:
    """The embeddings of all captions of the kept rows, one call for each."""
    one = (store.text_for(np.array([row]), which) for row in KEPT for which in range(captions_of(int(row))))
    return np.concatenate(list(one))


def test_captions_stand_row_by_row_in_their_order(case: Case):
    captions, every = CaptionRows(case.store, KEPT), all_captions(case.store)
    assert captions.shape == every.shape
    np.testing.assert_array_equal(captions[:], every)
    np.testing.assert_array_equal(captions[3:20:4], every[3:20:4])
    chosen = np.array([7, 0, 7, len(every) - 1])
    np.testing.assert_array_equal(captions[chosen], every[chosen])
    assert captions.starts.tolist() == np.cumsum([0, *(captions_of(int(row)) for row in KEPT)]).tolist()
    with pytest.raises(IndexError, match="rows"):
        captions[np.array([-1])]


def test_the_stage_clusters_all_captions_of_the_kept_images_and_leaves_those_of_the_images_as_they_are(case: Case):
    summary, without = case.cluster(), case.cluster("without", texts=False)
    files, plain = case.bytes_of("cluster"), {path.name for path in (case.folder.path / "without").iterdir()}
    assert not {"text_centers.npy", "text_labels.npy"} & plain
    for name in ("centers.npy", "labels.npy"):
        assert files[name] == (case.folder.path / "without" / name).read_bytes()
    assert {name: value for name, value in summary.items() if name != "texts"} == without

    expected = spherical_kmeans(all_captions(case.store), num_centers=5, iterations=3)
    np.testing.assert_array_equal(np.load(case.folder.path / "cluster" / "text_centers.npy"), expected.centers)
    np.testing.assert_array_equal(np.load(case.folder.path / "cluster" / "text_labels.npy"), expected.labels)
    assert (summary["texts"]["texts"], summary["texts"]["centers"]) == (len(expected.labels), 5)
    assert summary["texts"]["objective"] == expected.objective


@pytest.mark.resume
@pytest.mark.parametrize("rounds", [1, 5, 6])
def test_a_killed_stage_goes_on_with_images_and_texts(case: Case, monkeypatch: pytest.MonkeyPatch, rounds: int):
    """Killed in the rounds of the images, before the first of the texts and within these."""
    case.cluster("whole")
    write, written = cluster._StateFile.write, []

    def killing(self: Any, state: Any) -> None:
        written.append(self.path.name)
        if len(written) == rounds:
            raise KeyboardInterrupt
        write(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(cluster._StateFile, "write", killing)
        with pytest.raises(KeyboardInterrupt):
            case.cluster("cut")
        assert ("text_training.npz" in written) == (rounds > 4)  # the state before the first round, and three
        written.clear()
    monkeypatch.setattr(cluster._StateFile, "write", lambda self, state: written.append(self.path.name))
    case.cluster("cut")
    assert len(written) == 8 - (rounds - 1)
    assert case.bytes_of("cut") == case.bytes_of("whole")


def test_an_attempt_of_before_texts_were_asked_for_goes_on(case: Case, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="clip_cid")
    case.cluster("cut", texts=False)
    case.cluster("cut")
    assert "cluster   resumes after round 3 of 3" in caplog.text
    assert "texts: resumes" not in caplog.text


def test_more_centers_than_captions_are_refused(case: Case):
    captions = len(all_captions(case.store))
    with pytest.raises(ConfigError, match=rf"num_text_centers: {captions + 1} centers for {captions} captions"):
        case.cluster(num_text_centers=captions + 1)
    case.cluster(num_text_centers=None)
    assert len(np.load(case.folder.path / "cluster" / "text_centers.npy")) == 4  # as many as of images


def test_clusters_from_elsewhere_must_have_texts_if_the_recipe_asks_for_them(case: Case):
    case.cluster("whole")
    elsewhere = case.folder.path / "whole"
    case.cluster("taken", existing=str(elsewhere))
    assert case.bytes_of("taken") == case.bytes_of("whole")
    labels = np.load(elsewhere / "text_labels.npy")
    np.save(elsewhere / "text_labels.npy", labels[:-1])
    with pytest.raises(DataError, match=f"{len(labels) - 1} labels for {len(labels)} captions of kept images"):
        case.cluster("short", existing=str(elsewhere))
    (elsewhere / "text_centers.npy").unlink()
    with pytest.raises(DataError, match=r"cannot read text_centers\.npy and text_labels\.npy") as error:
        case.cluster("none", existing=str(elsewhere))
    assert "cluster.texts: true" in error.value.fix
    case.cluster("images", existing=str(elsewhere), texts=False)


def test_losses_of_texts_clusters_need_clusters_of_texts(case: Case):
    with pytest.raises(ConfigError, match=r"text_cluster_cls, cross_cluster_image read clusters of texts"):
        case.recipe(clusters={"texts": False}, weights={"text_cluster_cls": 1.0, "cross_cluster_image": 1.0})
    case.recipe(clusters={"texts": False}, weights={"cross_cluster_text": 1.0})


@pytest.mark.slow
def test_a_caption_has_the_label_of_its_own_embedding(case: Case, tmp_path: Path):
    """Whatever is left out of the pairs, held out or chosen among several captions."""
    case.cluster()
    for stem in ("06", "11"):
        for kind in ("png", "txt"):
            (case.path / "pairs" / f"{stem}.{kind}").unlink()
    recipe = case.recipe(weights=WEIGHTS, validation={"share": 0.3}, epochs=6)
    trainer = prepare(case.folder, tmp_path, recipe, ALONE).trainer
    centers = np.load(case.folder.path / "cluster" / "text_centers.npy")
    assert trainer.validation is not None
    assert trainer.validation.batches is not None
    for batches in (trainer.batches.between(0, 8), trainer.validation.batches.in_order()):
        for batch in batches:
            assert batch.teacher_text is not None
            assert batch.text_labels is not None
            nearest, _ = assign(batch.teacher_text.numpy(), centers)
            np.testing.assert_array_equal(batch.text_labels.numpy(), nearest)


@pytest.mark.slow
@pytest.mark.resume
def test_a_training_with_clusters_of_texts_is_resumed_exactly(case: Case):
    case.cluster()
    changes = {"weights": WEIGHTS, "head_perplexity": 2.0, "sample_rate": 0.75, "head_lr": 1e-4, "log_every": 1}
    whole = case.train("whole", **changes)
    assert {f"loss/{name}" for name in WEIGHTS} <= whole.keys()
    with power_cut(3):
        case.train("cut", **changes)
    saved = torch.load(next((case.folder.path / "cut" / "checkpoints").glob("*.pt")), weights_only=True)
    assert not [name for name in saved["parts"]["model"] if "text_head" in name]
    case.train("cut", **changes)
    weights = ((case.folder.path / out / "student" / "open_clip_model.safetensors") for out in ("whole", "cut"))
    assert len({path.read_bytes() for path in weights}) == 1


@pytest.mark.slow
def test_each_pass_over_centers_has_the_sigma_of_its_own_perplexity(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="clip_cid")
    case.cluster()
    training = prepare(case.folder, tmp_path, case.recipe(weights=WEIGHTS, head_perplexity=2.0), ALONE)
    assert training.sharpness.scales.keys() == {"text_cluster_kl", "cross_cluster_image", "cross_cluster_text"}
    assert len({training.sharpness.scale, *training.sharpness.scales.values()}) == 4
    assert "2 of 5 text centers likely for an image" in caplog.text
    assert "2 of 4 centers likely for a text" in caplog.text
