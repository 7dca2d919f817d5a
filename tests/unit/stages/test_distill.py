import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_training import power_cut

from clip_cid.data.balance.captions_file import write_captions
from clip_cid.data.embeddings.rows_of_pairs import rows_in_store
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import ClipCidError, ConfigError, DataError
from clip_cid.method.distill.cluster_distillation import nearest_labels
from clip_cid.recipe import DistillConfig, PairsConfig, Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages import distill
from clip_cid.summaries import as_json
from clip_cid.training import assemble, soft_targets
from clip_cid.training.join import distilled_pairs
from clip_cid.training.loop import Trainer
from clip_cid.training.soft_targets import teacher_scale, uses_soft_centers

COUNT, DIM, CENTERS = 20, 16, 4
STUDENT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def unit_rows(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_pairs(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        color = random.integers(0, 200, 3) + random.integers(0, 56, (20, 24, 3))
        Image.fromarray(color.astype(np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"color {number}\nanother {number}\n")


def write_store(folder: Path, pairs: Path) -> None:
    """Embeddings in the pairs' order turned round, as a store made elsewhere may have it; the last but one row is bad."""
    found = open_pairs(PairsConfig(source=(str(pairs),)))
    backwards = range(COUNT)[::-1]
    ok = np.arange(COUNT) != COUNT - 2
    keep = ok[:, None]
    writer = StoreWriter(folder, teacher={"reference": "noise"}, dim=DIM, fields=(), num_shards=1)
    rows = ShardRows(
        name="all",
        images=unit_rows(COUNT, seed=1) * keep,
        texts=unit_rows(COUNT, seed=2) * keep,
        more_texts=unit_rows(COUNT - 1, seed=3),
        ok=ok,
        keys=[found.key(row) for row in backwards],
        captions=[found.read(row).captions for row in backwards],
        sizes=[(24, 20)] * COUNT,
        fields={},
        skipped=[{"row": COUNT - 2, "key": found.key(1), "shard": "all", "reason": "test"}],
    )
    writer.add(rows)
    writer.finish()


class Case:
    """A run folder with everything distill reads, and the recipe."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, RunFolder(path / "run")
        write_pairs(path / "pairs")
        (path / "student.json").write_text(json.dumps(STUDENT))
        write_store(self.folder.path / "embed", path / "pairs")
        self.write("balance", kept=np.array([0, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 19]))
        self.write("cluster", centers=unit_rows(CENTERS, seed=5), labels=(np.arange(16) % CENTERS).astype(np.int32))
        (self.folder.path / "embed" / "manifest.json").write_text("{}")

    def write(self, stage: str, **arrays: np.ndarray) -> None:
        folder = self.folder.path / stage
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text("{}")
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)

    def recipe(
        self,
        *,
        teacher: str = "noise",
        max_bad_share: float = 0.1,
        machine: dict[str, Any] | None = None,
        balance: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Recipe:
        settings = {
            "student": str(self.path / "student.json"),
            "batch_size": 6,
            "epochs": 3,
            "warmup_steps": 1,
            "log_every": 2,
            "sample_rate": 1.0,
        }
        values = {
            "pairs": {"source": [str(self.path / "pairs")], "max_bad_share": max_bad_share},
            "embed": {"teacher": teacher},
            "balance": balance or {},
            "distill": settings | changes,
            "machine": {"device": "cpu", "threads": 1, "workers": 0, "tensorboard": "off", **(machine or {})},
        }
        return parse_recipe(values, where="test")

    def run(self, out: str = "distill.part", **changes: Any) -> dict[str, Any]:
        path = self.folder.path / out
        path.mkdir(exist_ok=True)
        summary = distill.run(self.folder, path, self.recipe(**changes))
        assert summary is not None, "one process is the main one"
        return as_json(summary)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.slow
def test_the_stage_leaves_a_student_that_open_clip_loads_and_the_numbers_people_ask_for(case: Case):
    summary = case.run()
    out = case.folder.path / "distill.part"
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "skipped.jsonl", "student", "summary.json"]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out / 'student'}")
    image = sum(value.numel() for name, value in model.named_parameters() if name.startswith("visual."))
    assert summary["parameters"]["image"] == image
    assert sum(summary["parameters"].values()) == sum(value.numel() for value in model.parameters())
    assert (summary["steps"], summary["pairs"], summary["pairs_seen"]) == (8, 16, 48)  # 3 * 16 / 6
    assert {
        "seconds",
        "pairs_per_s",
        "data_wait_share",
        "loss",
        "loss/clip",
        "loss/instance_image",
        "loss/instance_text",
    } <= summary.keys()
    json.dumps(summary, allow_nan=False)
    config = json.loads((out / "student" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["embed_dim"] == DIM  # native: as wide as the teacher
    made = config["clip_cid"]
    assert (made["steps"], made["pairs_seen"], made["teacher"]) == (8, 48, {"reference": "noise"})
    assert made["recipe"]["distill"]["batch_size"] == 6
    assert load_file(out / "student" / "cid_head.safetensors").keys() == {"instance_logit_scale"}


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize("then", [{}, {"log_every": 3, "skip_limit": 2}, {"validation": {"share": 0.0, "every": 7}}])
def test_a_killed_stage_gives_the_student_of_an_uninterrupted_one(case: Case, then: dict[str, Any]):
    """Also when settings have changed meanwhile that change no weight."""
    case.run("whole")
    with power_cut(5):
        case.run()
    case.run(**then)
    weights = [
        (case.folder.path / out / "student" / "open_clip_model.safetensors").read_bytes()
        for out in ("whole", "distill.part")
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.resume
def test_captions_of_removed_images_are_learned_from_and_a_kill_changes_nothing(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store = EmbeddingStore.open(case.folder.stage("embed"))
    write_captions(
        case.folder.path / "balance",
        kept=np.array([2, 8]),
        rows=np.array([1, 2, 4, 8, 9]),
        owner=np.array([0, 0, 0, 1, 1]),
        keys=store.keys.packed,
        captions=store.mapped_captions(tmp_path),
    )
    asked: dict[str, Any] = {"balance": {"merge_captions": True}, "merged_captions": True}
    plain, whole = case.run("plain", balance={"merge_captions": True}), case.run("whole", **asked)
    assert "2 of 16 pairs also read 6 captions of their removed near-duplicates" in caplog.text
    with power_cut(5):
        case.run(**asked)
    case.run(**asked)
    of_whole, of_resumed, of_plain = (
        (case.folder.path / out / "student" / "open_clip_model.safetensors").read_bytes()
        for out in ("whole", "distill.part", "plain")
    )
    assert of_whole == of_resumed != of_plain
    assert whole["pairs"] == plain["pairs"]


@pytest.mark.slow
@pytest.mark.resume
def test_killed_after_the_export_nothing_is_trained_again(case: Case, monkeypatch: pytest.MonkeyPatch):
    first = case.run()
    trained_again: list[Trainer] = []
    monkeypatch.setattr(Trainer, "run", trained_again.append)
    assert case.run() == first
    assert not trained_again


def test_kept_rows_labels_and_embeddings_are_joined_by_key(case: Case):
    recipe = case.recipe()
    pairs = open_pairs(recipe.pairs)
    store = EmbeddingStore.open(case.folder.stage("embed"))
    training = distilled_pairs(case.folder, recipe, pairs, store)
    kept = np.load(case.folder.path / "balance" / "kept.npy").tolist()
    assert training.store_rows is not None
    assert training.labels is not None
    assert training.num_captions is not None
    assert sorted(training.store_rows.tolist()) == kept
    for row, store_row, label in zip(training.rows, training.store_rows, training.labels, strict=True):
        assert pairs.key(int(row)) == store.keys[int(store_row)]
        assert label == kept.index(store_row) % CENTERS
    assert training.num_captions.tolist() == [2] * 16


def store_of(path: Path, keys: list[str]) -> EmbeddingStore:
    """A store of one shard, whose rows are all good."""
    writer = StoreWriter(path, teacher={}, dim=DIM, fields=(), num_shards=1)
    vectors, none = unit_rows(COUNT, seed=1), np.zeros((0, DIM), dtype=np.float32)
    ok, captions = np.ones(COUNT, dtype=bool), [("a caption",)] * COUNT
    writer.add(ShardRows("all", vectors, vectors, none, ok, keys, captions, [(24, 20)] * COUNT, {}, []))
    writer.finish()
    return EmbeddingStore.open(path)


def test_a_store_of_these_very_pairs_and_one_in_another_order_are_told_apart(case: Case, tmp_path: Path):
    pairs = open_pairs(case.recipe().pairs)
    turned = EmbeddingStore.open(case.folder.stage("embed"))
    assert rows_in_store(pairs, turned).tolist() == list(range(COUNT))[::-1]
    same = store_of(tmp_path / "same", pairs.keys(0, COUNT))
    assert rows_in_store(pairs, same).tolist() == list(range(COUNT))
    assert "keys" not in vars(same), "all keys at once take gigabytes"


def test_a_key_that_the_store_of_these_very_pairs_repeats_is_told(case: Case, tmp_path: Path):
    """Also where only the pairs know that one of its rows is a repetition."""
    pairs = open_pairs(case.recipe().pairs)
    pairs.known_bad[3] = "duplicate key, first used by row 2"
    keys = dict(enumerate(pairs.keys(0, COUNT))) | {3: pairs.key(2)}
    pairs.packed_keys = lambda start, stop: pa.array([keys[row] for row in range(start, stop)], pa.large_string())
    store = store_of(tmp_path / "same", list(keys.values()))
    with pytest.raises(DataError, match="1 rows repeat the key of another"):
        rows_in_store(pairs, store)


def test_without_balance_every_embedded_pair_is_trained_on(case: Case):
    case.write("cluster", labels=np.zeros(COUNT - 1, dtype=np.int32))
    recipe = case.recipe().model_copy(update={"balance": case.recipe().balance.model_copy(update={"enabled": False})})
    pairs = open_pairs(recipe.pairs)
    store = EmbeddingStore.open(case.folder.stage("embed"))
    training = distilled_pairs(case.folder, recipe, pairs, store)
    assert training.rows.tolist() == [row for row in range(COUNT) if row != 1]


@pytest.mark.slow
def test_a_baseline_trains_on_the_kept_pairs_and_reads_nothing_of_the_teacher(case: Case):
    path = case.folder.path / "embed" / "img_emb" / "img_emb_0000.npy"
    np.save(path, np.zeros_like(np.load(path)))  # a zero vector would stop the run
    summary = case.run(weights="clip-only")
    assert summary["pairs"] == 16
    assert [name for name in summary if name.startswith("loss")] == ["loss", "loss/clip"]
    assert not (case.folder.path / "distill.part" / "student" / "cid_head.safetensors").exists()


@pytest.mark.slow
def test_plain_clip_needs_no_stage_before_it_and_lists_the_pairs_it_leaves_out(tmp_path: Path):
    case = Case(tmp_path)
    (tmp_path / "pairs" / "03.txt").unlink()
    case.folder = RunFolder(tmp_path / "plain")
    case.folder.path.mkdir()
    summary = case.run(teacher="none", weights="clip-only")
    assert (summary["pairs"], summary["unreadable_pairs"]) == (COUNT - 1, 1)
    (line,) = (tmp_path / "plain" / "distill.part" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 3
    config = json.loads((tmp_path / "plain" / "distill.part" / "student" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["embed_dim"] == 24  # its own width, with no teacher to meet
    with pytest.raises(DataError, match="1 of 20 pairs cannot be read"):
        case.run("strict.part", teacher="none", weights="clip-only", max_bad_share=0.01)


@pytest.mark.slow
def test_a_linear_map_lets_the_student_keep_its_width(case: Case):
    case.run(alignment="linear")
    student = case.folder.path / "distill.part" / "student"
    config = json.loads((student / "open_clip_config.json").read_text())
    assert config["model_cfg"]["embed_dim"] == 24
    beside = load_file(student / "cid_head.safetensors")
    assert beside["image_map.weight"].shape == beside["text_map.weight"].shape == (DIM, 24)


@pytest.mark.slow
def test_a_trained_student_of_another_width_cannot_be_native(case: Case):
    case.run(alignment="linear")
    weights = case.folder.path / "distill.part" / "student"
    with pytest.raises(ConfigError, match="embed_dim 16 but 24") as error:
        case.run("warm.part", pretrained=str(weights))
    assert "alignment: linear" in error.value.fix
    assert case.run("warm.part", pretrained=str(weights), alignment="linear")["steps"] == 8


def test_a_batch_larger_than_the_data_is_named_in_numbers(case: Case):
    with pytest.raises(ConfigError, match="batch_size: 17, but there are 16 pairs") as error:
        case.run(batch_size=17)
    assert "at most 16" in error.value.fix


def test_steps_are_counted_over_all_epochs_together():
    assert assemble.count_steps(DistillConfig(batch_size=6, epochs=3), 16) == 8
    assert assemble.count_steps(DistillConfig(batch_size=6, epochs=3), 6) == 3
    assert assemble.count_steps(DistillConfig(batch_size=6, epochs=3, steps=100), 16) == 100


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["paper-r1", "clip-only"])
def test_epochs_steps_and_measurements_are_counted_by_the_pairs_that_clusters_give(
    case: Case, weights: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="clip_cid")
    labels = np.array([0] * 10 + [1] * 4 + [2] * 2, dtype=np.int32)
    case.write("cluster", labels=labels, centers=unit_rows(CENTERS, seed=5))
    validation = {"sets": {"digits": "builtin:digits"}, "metric": "zero_shot"}
    summary = case.run(weights=weights, per_cluster=3, epochs=6, batch_size=4, log_every=1, validation=validation)
    assert (summary["pairs"], summary["epoch_pairs"], summary["steps"]) == (16, 3 + 3 + 2, 6 * 8 // 4)
    assert summary["epochs"] == 6
    lines = [
        json.loads(line) for line in (case.folder.path / "distill.part" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in lines if "loss" in line] == [step / 2 for step in range(1, 13)]
    assert [line["step"] for line in lines if "val/zero_shot" in line] == [2, 4, 6, 8, 10, 12]
    assert "an epoch is 8 of 16 pairs, at most 3 of a cluster; the largest cluster has 10" in caplog.text


@pytest.mark.slow
def test_a_cap_above_all_clusters_gives_the_student_of_none(case: Case):
    case.run("plain")
    summary = case.run(per_cluster=4)
    assert summary["epoch_pairs"] == summary["pairs"] == 16
    weights = [
        (case.folder.path / out / "student" / "open_clip_model.safetensors").read_bytes()
        for out in ("plain", "distill.part")
    ]
    assert weights[0] == weights[1]


def test_a_batch_larger_than_an_epoch_of_few_pairs_a_cluster_is_named_in_numbers(case: Case):
    with pytest.raises(
        ConfigError, match=r"batch_size: 6, but there are 4 pairs in an epoch .*per_cluster: 1\)"
    ) as error:
        case.run(per_cluster=1)
    assert "raise distill.per_cluster" in error.value.fix


def test_clusters_that_only_the_order_reads_need_a_teacher_and_their_stage(case: Case):
    recipe = case.recipe(weights="clip-only", per_cluster=2)
    assert recipe.uses("cluster")
    assert not case.recipe(weights="clip-only").uses("cluster")
    with pytest.raises(ConfigError, match=r"distill\.per_cluster needs clusters"):
        case.recipe(teacher="none", weights="clip-only", per_cluster=2)


def break_labels(case: Case) -> None:
    case.write("cluster", labels=np.zeros(15, dtype=np.int32))


def break_label_range(case: Case) -> None:
    case.write("cluster", labels=np.full(16, CENTERS, dtype=np.int32))


def break_labels_below(case: Case) -> None:
    case.write("cluster", labels=np.arange(-12, 4, dtype=np.int32))


def break_centers(case: Case) -> None:
    case.write("cluster", centers=np.eye(4, 8, dtype=np.float32))


def break_center_value(case: Case) -> None:
    centers = unit_rows(CENTERS, seed=5)
    centers[2, 3] = np.nan
    case.write("cluster", centers=centers)


def break_kept(case: Case) -> None:
    case.write("balance", kept=np.array([1, 2, COUNT]))


def keep_a_bad_row(case: Case) -> None:
    case.write("balance", kept=np.array([1, 2, COUNT - 2]))


def change_captions(case: Case) -> None:
    for path in (case.path / "pairs").glob("*.txt"):
        path.write_text("something else\n")


def rename_pairs(case: Case) -> None:
    for path in (case.path / "pairs").glob("*"):
        path.rename(path.with_name(f"new-{path.name}"))


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (break_labels, "15 labels, but 16 images were kept"),
        (break_label_range, "4 centers, but labels up to 4"),
        (break_labels_below, "4 centers, but labels up to 3"),
        (break_centers, r"shape \(4, 8\), but embeddings of width 16"),
        (break_center_value, "not all centers are unit vectors"),
        (break_kept, "not rows of a store of 20"),
        (keep_a_bad_row, "not ascending rows that have embeddings"),
        (change_captions, "has the caption 'something else', but its embedding is of 'color"),
        (rename_pairs, "20 of 20 pairs have no embedding here"),
    ],
)
def test_inputs_that_do_not_belong_together_stop_before_the_first_step(
    case: Case, breaks: Callable[[Case], None], says: str
):
    breaks(case)
    with pytest.raises(ClipCidError, match=says) as error:
        case.run()
    assert isinstance(error.value, DataError)
    assert not list((case.folder.path / "distill.part").iterdir())


def test_pairs_that_are_gone_are_counted(case: Case, caplog: pytest.LogCaptureFixture):
    recipe = case.recipe()
    (case.path / "pairs" / "00.png").unlink()
    (case.path / "pairs" / "00.txt").unlink()
    store = EmbeddingStore.open(case.folder.stage("embed"))
    training = distilled_pairs(case.folder, recipe, open_pairs(recipe.pairs), store)
    assert len(training) == 15
    assert "1 of 16 kept images are not among the pairs" in caplog.text


def test_distinct_labels_of_a_batch_by_hand():
    # two pairs of four, of clusters with 1/2, 1/4, 1/4 of the images: 3/4 + 7/16 + 7/16
    assert assemble.distinct_labels(np.array([0, 0, 1, 2]), 2) == pytest.approx(1.625)


def test_distinct_labels_where_clusters_give_few_by_hand():
    # one pair of each of three clusters, two of which are drawn: 3 (1 - (2/3)^2)
    assert assemble.distinct_labels(np.array([0, 0, 1, 2]), 2, per_cluster=1) == pytest.approx(5 / 3)


@pytest.mark.slow
@pytest.mark.parametrize(("sample_rate", "told"), [(0.5, True), (1.0, False)])
def test_it_is_told_when_a_batch_fills_the_sample_of_centers(
    case: Case, caplog: pytest.LogCaptureFixture, sample_rate: float, told: bool
):
    caplog.set_level("INFO", logger="clip_cid")
    case.run(sample_rate=sample_rate, steps=2)
    assert ("its own centers are the only negatives" in caplog.text) == told


@pytest.mark.slow
def test_with_all_centers_frozen_the_teacher_is_read_once_and_training_is_the_same(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    soft = case.run("soft")
    monkeypatch.setattr(assemble, "uses_soft_centers", lambda _: False)
    plain = case.run("plain")
    for name in ("loss", "loss/cluster_cls", "loss/cluster_kl", "loss/instance_image", "loss/instance_text"):
        assert soft[name] == pytest.approx(plain[name], rel=1e-4), name
    assert not (case.folder.path / "soft" / "soft_centers").exists()


@pytest.mark.parametrize(
    ("changes", "soft"),
    [({}, True), ({"head_lr": 1e-6}, False), ({"sample_rate": 0.5}, False), ({"weights": {"cluster_kl": 0}}, False)],
)
def test_soft_centers_need_a_frozen_head_all_centers_and_a_divergence(changes: dict[str, Any], soft: bool):
    assert uses_soft_centers(DistillConfig.model_validate({"sample_rate": 1.0} | changes)) == soft


@pytest.mark.slow
@pytest.mark.resume
def test_several_labels_are_found_once_and_a_killed_stage_takes_them_up(
    case: Case, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Also of the pairs that are held out, and where no other loss reads the teacher's images."""
    caplog.set_level("INFO", logger="clip_cid")
    changes: dict[str, Any] = {
        "labels": 3,
        "ignore_near": 0.2,
        "weights": {"cluster_kl": 0, "instance_text": 0},
        "validation": {"share": 0.3, "every": 12},
    }
    whole = case.run("whole", **changes)
    assert "ignore_near 0.2 leaves out" in caplog.text
    assert not (case.folder.path / "whole" / "labels").exists()

    labelled: list[int] = []

    def counted(*arguments: Any) -> Any:
        labelled.append(len(arguments[0]))
        return nearest_labels(*arguments)

    def interrupted(self: Trainer, batch: Any) -> Any:
        assert batch.labels.shape == (6, 3)
        raise OSError("power cut")

    monkeypatch.setattr(soft_targets, "nearest_labels", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(OSError, match="power cut"):
            case.run(**changes)
    assert sum(labelled) == 16

    again = case.run(**changes)
    assert sum(labelled) == 16
    assert again["loss"] == whole["loss"]
    paths = (case.folder.path / out / "student" / "open_clip_model.safetensors" for out in ("whole", "distill.part"))
    assert len({path.read_bytes() for path in paths}) == 1
    assert case.run("one", **changes | {"labels": 1})["loss"] != whole["loss"]


def test_more_labels_than_centers_are_refused(case: Case):
    with pytest.raises(
        ConfigError, match=r"distill\.labels: 5 labels for an image, but there are only 4 centers"
    ) as error:
        case.run(labels=5)
    assert "at most 4" in error.value.fix
    with pytest.raises(ConfigError, match=r"distill\.labels: 5 labels for an image, but cluster\.num_centers is 4"):
        parse_recipe({"cluster": {"num_centers": 4}, "distill": {"labels": 5}}, where="test")
    parse_recipe({"cluster": {"num_centers": 4}, "distill": {"labels": 5, "weights": "clip-only"}}, where="test")


def test_a_cosine_that_leaves_no_negatives_is_told(case: Case, caplog: pytest.LogCaptureFixture):
    recipe = case.recipe()
    training = distilled_pairs(
        case.folder, recipe, open_pairs(recipe.pairs), EmbeddingStore.open(case.folder.stage("embed"))
    )
    centers = np.concatenate([unit_rows(1, seed=5)] * CENTERS)
    soft_targets.measure_near_centers(make_config(ignore_near=0.75), training, centers)
    assert "most centers are no negatives" in caplog.text
    caplog.clear()
    soft_targets.measure_near_centers(make_config(ignore_near=1), training, centers)
    assert not caplog.text


@pytest.mark.slow
def test_sigma_can_be_calibrated_and_is_told(case: Case):
    plain, sharp = case.run("plain"), case.run("sharp", head_perplexity=1.5)
    assert plain["head_scale"] == 16
    assert 1 < plain["teacher_perplexity"] < CENTERS
    assert sharp["teacher_perplexity"] == pytest.approx(1.5, rel=1e-2)
    assert sharp["head_scale"] != 16
    with pytest.raises(
        ConfigError, match=r"head_perplexity: perplexity must be above 1 and below the 4 centers, got 9"
    ):
        case.run("wrong", head_perplexity=9)


@pytest.mark.slow
def test_sigma_is_calibrated_even_where_nothing_else_needs_the_teacher(case: Case):
    weights = {"clip": 1, "cluster_cls": 1, "cluster_kl": 0, "instance_image": 0, "instance_text": 0}
    assert case.run(weights=weights, head_perplexity=2.0)["teacher_perplexity"] == pytest.approx(2, rel=1e-2)


def test_a_device_without_float64_is_refused_where_clusters_are_compared(case: Case):
    mps, cpu = torch.device("mps"), torch.device("cpu")
    with pytest.raises(ConfigError, match="mps has no float64") as error:
        assemble.refuse_without_float64(mps, case.recipe())
    assert "Set machine.device: cpu" in str(error.value)
    assemble.refuse_without_float64(cpu, case.recipe())
    without = {"cluster_cls": 0, "cluster_kl": 0, "bank_image": 0, "bank_text": 0}
    assemble.refuse_without_float64(mps, case.recipe(weights=without))


def test_the_teachers_own_scale_goes_before_the_usual_one_and_a_set_one_before_both(caplog: pytest.LogCaptureFixture):
    affinity = make_config(weights="open-clip")
    assert teacher_scale(affinity, {"logit_scale": 17.5}) == 17.5
    assert teacher_scale(make_config(weights="open-clip", teacher_scale=30), {"logit_scale": 17.5}) == 30
    assert not caplog.records
    assert teacher_scale(affinity, {"reference": "elsewhere"}) == 100
    assert "using 100" in caplog.text


def make_config(**settings: Any) -> DistillConfig:
    return DistillConfig.model_validate(settings)
