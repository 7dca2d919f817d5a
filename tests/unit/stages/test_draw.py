import csv
import errno
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated_run import BAD, COPIES, GROUPS, PLAIN, ROWS, fake_clip, make_recipe, make_run
from PIL import Image
from tiny_sets import folder_set, tiny_clip

from clip_cid.errors import DataError
from clip_cid.models.clip import Clip
from clip_cid.recipe import Recipe
from clip_cid.report.drawing import run_inputs, set_images
from clip_cid.run_folder import RunFolder
from clip_cid.stages import draw
from clip_cid.summaries import as_json


@pytest.fixture(autouse=True, scope="module")
def _no_real_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_inputs, "load_clip", fake_clip)
        yield


@dataclass(frozen=True)
class Drawn:
    """A run, what was drawn of it, and where."""

    folder: RunFolder
    recipe: Recipe
    out: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    base = tmp_path_factory.mktemp("full")
    recipe = make_recipe(base)
    return redrawn(make_run(base, recipe), recipe, base / "draw")


def redrawn(folder: RunFolder, recipe: Recipe, out: Path) -> Drawn:
    out.mkdir()
    return Drawn(folder, recipe, out, as_json(draw.run(folder, out, recipe)))


def only(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Draw these figures and no other, for speed."""
    patch.setattr(draw, "FIGURES", tuple(figure for figure in draw.FIGURES if figure.name in names))


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.slow
def test_a_full_run_has_every_figure_with_its_csv(full: Drawn) -> None:
    out, summary = full.out, full.summary
    assert set(summary["left_out"]) == {"scores_retrieval", "scores_knn"}
    curves = {
        "activation_maps",
        "cluster_rounds",
        "cluster_sizes",
        "distances",
        "embedding_map",
        "gain",
        "losses",
        "patch_pca",
        "removed_share",
        "scores_zero_shot",
        "scores_linear_probe",
        "radar",
        "single_linkage",
        "throughput",
        "weights",
    }
    assert {path.stem for path in out.glob("*.svg")} == curves | {"cluster_sizes_small"}
    assert {path.stem for path in out.glob("*.csv")} == curves | {"removed_sets", "removed_pairs", "clusters"}
    assert {path.stem for path in out.glob("*.png")} == {"duplicates", "clusters"}
    assert json.dumps(summary, allow_nan=False)


def test_the_rounds_of_k_means_are_those_of_the_cluster_stage(full: Drawn) -> None:
    record = full.folder.record("cluster")
    assert record is not None
    history = record.summary["history"]
    rounds = lines(full.out / "cluster_rounds.csv")
    assert [int(line["round"]) for line in rounds] == list(range(1, len(history) + 1))
    assert [float(line["objective"]) for line in rounds] == [round_["objective"] for round_ in history]
    assert full.summary["figures"]["cluster_rounds"]["last"] == history[-1]["objective"]


def test_before_balance_counts_all_good_rows_and_after_only_the_kept(full: Drawn) -> None:
    kept = np.load(full.folder.stage("balance") / "kept.npy")
    sizes = full.summary["figures"]["cluster_sizes"]
    assert sizes["before balance"]["images"] == ROWS - 1
    assert sizes["after balance"]["images"] == len(kept) == ROWS - 1 - GROUPS * (COPIES - 1)


def test_the_sets_shown_are_the_planted_duplicates(full: Drawn) -> None:
    shown: dict[str, set[int]] = {}
    for line in lines(full.out / "removed_sets.csv"):
        shown.setdefault(line["set"], set()).add(int(line["row"]))
    planted = [set(range(start, start + COPIES)) for start in range(0, GROUPS * COPIES, COPIES)]
    assert sorted(map(sorted, shown.values())) == sorted(map(sorted, planted))


@pytest.mark.slow
def test_the_same_files_give_the_same_bytes(full: Drawn, tmp_path: Path) -> None:
    again = redrawn(full.folder, full.recipe, tmp_path / "again")
    assert again.summary == full.summary
    for path in full.out.iterdir():
        assert (again.out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_plain_run_leaves_out_what_needs_a_teacher_and_says_why(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, **PLAIN)
    plain = redrawn(make_run(tmp_path, recipe), recipe, tmp_path / "out")
    of_scores = {"scores_zero_shot", "scores_linear_probe"}
    of_the_student = {"losses", "throughput", "weights", "patch_pca", "activation_maps"}
    assert set(plain.summary["figures"]) == of_the_student | of_scores
    assert plain.summary["left_out"]["duplicates"] == "this recipe does not balance"
    assert plain.summary["left_out"]["cluster_sizes"] == "this recipe does not cluster"
    assert plain.summary["left_out"]["radar"] == "there is one model only"
    assert not list(plain.out.glob("*.png"))


def test_results_of_a_stage_the_recipe_no_longer_has_are_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "cluster_sizes", "distances")
    folder = make_run(tmp_path, make_recipe(tmp_path))
    np.save(folder.path / "cluster" / "labels.npy", np.zeros(ROWS - 1, dtype=np.int32))
    now = redrawn(folder, make_recipe(tmp_path, balance={"enabled": False}), tmp_path / "out")
    assert now.summary["left_out"]["distances"] == "this recipe does not balance"
    assert now.summary["figures"]["cluster_sizes"]["all pairs"]["images"] == ROWS - 1


def test_without_pairs_the_tables_are_there_and_the_pictures_are_left_out(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "duplicates", "clusters")
    gone = redrawn(full.folder, make_recipe(tmp_path, pairs={"source": [str(tmp_path / "gone")]}), tmp_path / "out")
    assert gone.summary["left_out"]["duplicates"].startswith("the pairs cannot be read")
    assert {path.name for path in gone.out.iterdir()} == {"removed_sets.csv", "removed_pairs.csv", "clusters.csv"}


def test_kept_rows_made_elsewhere_have_no_sets_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "cluster_sizes", "distances", "duplicates", "removed_share")
    recipe = make_recipe(tmp_path)
    folder = make_run(tmp_path, recipe)
    for name in ("sets", "members", "forest"):
        (folder.stage("balance") / f"{name}.parquet").unlink()
    summary = redrawn(folder, recipe, tmp_path / "out").summary
    assert summary["left_out"] == dict.fromkeys(
        ("distances", "duplicates", "removed_share"), "no image is known to be removed for another"
    )
    assert summary["figures"]["cluster_sizes"]["before balance"]["images"] == ROWS - 1


def test_a_student_without_that_layer_has_no_weight_figure(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "weights")
    monkeypatch.setattr(run_inputs, "load_clip", lambda reference, *, device: convolutional(tmp_path))
    assert "mlp.c_proj" in redrawn(full.folder, full.recipe, tmp_path / "out").summary["left_out"]["weights"]


def convolutional(folder: Path) -> Clip:
    return tiny_clip(folder, layers=[1, 1, 1, 1], width=8, head_width=32, image_size=32, patch_size=None)


def test_a_convolutional_student_has_no_patches_to_look_at(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "patch_pca", "activation_maps")
    monkeypatch.setattr(run_inputs, "load_clip", lambda reference, *, device: convolutional(tmp_path))
    left_out = redrawn(full.folder, full.recipe, tmp_path / "out").summary["left_out"]
    assert set(left_out) == {"patch_pca", "activation_maps"}
    assert all(
        "the student's patches are not available: its image tower is a ModifiedResNet" in w for w in left_out.values()
    )


@pytest.mark.slow
def test_a_model_that_cannot_be_read_now_is_no_reason_to_draw_without_it(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(reference: str, *, device: str) -> Clip:
        if reference == "local-dir:baseline":
            raise DataError("baseline: cannot be read.", fix="Check the disk.") from OSError(errno.EIO, "I/O error")
        return fake_clip(reference)

    only(monkeypatch, "weights")
    monkeypatch.setattr(run_inputs, "load_clip", load)
    with pytest.raises(DataError, match="baseline: cannot be read"):
        redrawn(full.folder, full.recipe, tmp_path / "out")


@pytest.mark.slow
def test_a_teacher_without_patches_or_weights_is_left_out_and_named(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(reference: str, *, device: str) -> Clip:
        if reference == "run:t":
            return convolutional(tmp_path)
        if reference == "local-dir:baseline":
            raise DataError("baseline: gone.", fix="Bring it back.")
        return fake_clip(reference)

    only(monkeypatch, "patch_pca", "activation_maps", "weights")
    monkeypatch.setattr(run_inputs, "load_clip", load)
    figures = redrawn(full.folder, full.recipe, tmp_path / "out").summary["figures"]
    for name, found in figures.items():
        assert list(found["models"]) == ["student"]
        assert found["left_out"]["baseline"] == "baseline: gone."
        assert name == "weights" or "ModifiedResNet" in found["left_out"]["teacher"]
    assert set(figures) == {"patch_pca", "activation_maps", "weights"}


def test_a_set_whose_images_cannot_be_decoded_shows_nothing(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "patch_pca", "activation_maps")
    monkeypatch.setattr(set_images, "choose", lambda *_, **__: [])
    left_out = redrawn(full.folder, full.recipe, tmp_path / "out").summary["left_out"]
    assert left_out == dict.fromkeys(left_out, "no test image of the set two can be decoded")
    assert len(left_out) == 2


def test_a_log_without_a_finite_loss_has_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "losses")
    recipe = make_recipe(tmp_path)
    folder = make_run(tmp_path, recipe)
    (folder.stage("distill") / "metrics.jsonl").write_text('{"step": 10, "loss": null, "loss/clip": null}\n')
    left_out = redrawn(folder, recipe, tmp_path / "out").summary["left_out"]
    assert left_out == {"losses": "no step of the training's log has a finite loss"}


@pytest.mark.slow
def test_each_model_is_loaded_once(full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    only(monkeypatch, "patch_pca", "activation_maps", "weights")
    monkeypatch.setattr(
        run_inputs, "load_clip", lambda reference, *, device: loaded.append(reference) or fake_clip(reference)
    )
    redrawn(full.folder, full.recipe, tmp_path / "out")
    assert sorted(loaded) == sorted(
        {*full.recipe.evaluate.compare.values(), f"local-dir:{full.folder.stage('distill') / 'student'}"}
    )


def test_images_come_from_the_set_asked_for(full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "activation_maps")
    assert full.summary["figures"]["activation_maps"]["set"] == "two"  # `one` is not there
    assert full.summary["figures"]["activation_maps"]["prompts"] != []
    asked = make_recipe(tmp_path, draw={"images_of": "one"})
    assert "nothing at x" in redrawn(full.folder, asked, tmp_path / "out").summary["left_out"]["activation_maps"]


def test_a_set_without_prompts_has_no_activation_maps(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "activation_maps", "patch_pca")
    folder_set(tmp_path / "set")
    summary = redrawn(full.folder, make_recipe(tmp_path), tmp_path / "out").summary
    assert summary["left_out"] == {"activation_maps": "the set two has no prompts"}


def test_the_tree_is_of_one_planted_set_and_is_drawn_without_pictures_too(
    full: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "single_linkage")
    rows = {int(line[end]) for line in lines(full.out / "single_linkage.csv") for end in ("left_row", "right_row")}
    assert rows == set(range(COPIES))
    gone = redrawn(full.folder, make_recipe(tmp_path, pairs={"source": [str(tmp_path / "gone")]}), tmp_path / "out")
    assert not gone.summary["left_out"]
    assert "<image" in (full.out / "single_linkage.svg").read_text()
    assert "<image" not in (gone.out / "single_linkage.svg").read_text()


def test_the_map_shows_kept_images_with_their_clusters(full: Drawn) -> None:
    kept = np.load(full.folder.stage("balance") / "kept.npy")
    labels = np.load(full.folder.stage("cluster") / "labels.npy")
    table = lines(full.out / "embedding_map.csv")
    assert [(int(line["row"]), int(line["cluster"])) for line in table] == list(zip(kept, labels, strict=True))


def test_the_contact_sheet_has_a_line_for_each_set(full: Drawn) -> None:
    assert full.summary["figures"]["duplicates"] == {"strips": GROUPS + 2, "missing_pictures": 0}
    with Image.open(full.out / "duplicates.png") as sheet:
        assert sheet.height > (GROUPS + 2) * 96


def test_a_bad_row_is_in_no_figure(full: Drawn) -> None:
    rows = {int(line["row"]) for name in ("removed_sets", "clusters") for line in lines(full.out / f"{name}.csv")}
    assert BAD not in rows
