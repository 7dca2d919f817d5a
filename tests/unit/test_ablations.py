"""Which recipes an ablation is made of, and that nothing is computed twice, with stages that only write a file."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_cid import log, pipeline
from clip_cid.ablations import results, runs, variants
from clip_cid.errors import ConfigError, RunError
from clip_cid.figures import ablation as figure
from clip_cid.recipe import PRESETS, Recipe, parse_recipe
from clip_cid.run_folder import RunFolder, StageRecord
from clip_cid.summaries import (
    BalanceSummary,
    ClusterSummary,
    DistillSummary,
    EmbedSummary,
    EvaluateSummary,
    Parameters,
    Summary,
)

PARTS = ("clip", "cluster_cls", "cluster_kl", "instance_image", "instance_text")


def recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "embed": {"teacher": "ViT-B-32", "pretrained": "openai"},
        "cluster": {"num_centers": 1_000_000},
        "evaluate": {"sets": {"digits": "builtin:digits"}, "compare": {"other": "local-dir:other"}},
    }
    return parse_recipe({**values, **sections}, where="test")


def recipes(ablation: variants.Ablation, page: Recipe, seed: int = 0) -> dict[str, Recipe]:
    return {variant.label: variants.recipe_of(ablation, page, variant, seed) for variant in ablation.variants}


def differing(one: Recipe, other: Recipe) -> set[str]:
    """Dotted names of the settings in which two recipes differ."""
    a, b = one.model_dump(), other.model_dump()
    return {f"{section}.{name}" for section in a for name in a[section] if a[section][name] != b[section][name]}


def test_thresholds_are_those_of_table_4_at_the_papers_threshold():
    ablation = variants.plan("threshold", recipe())
    found = recipes(ablation, recipe())
    assert [page.balance.threshold for page in found.values()] == [0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    assert list(found) == ["0.03", "0.04", "0.05", "0.06", "0.07", "0.08"]
    assert ablation.reference == "0.07"


def test_thresholds_scale_with_the_recipes_own_and_share_one_search_for_pairs():
    page = recipe(balance={"threshold": 0.025})
    found = recipes(variants.plan("threshold", page), page)
    assert [page.balance.threshold for page in found.values()] == [0.0107, 0.0143, 0.0179, 0.0214, 0.025, 0.0286]
    assert {page.balance.max_threshold for page in found.values()} == {0.0286}
    wide = recipe(balance={"threshold": 0.025, "max_threshold": 0.06})
    assert {page.balance.max_threshold for page in recipes(variants.plan("threshold", wide), wide).values()} == {0.06}


def test_the_recipes_own_threshold_stays_what_it_is_however_many_digits_it_has():
    """Rounded, it would be another threshold, and a row that is not the recipe would be what all are compared with."""
    page = recipe(balance={"threshold": 0.06215})
    ablation = variants.plan("threshold", page)
    assert ablation.reference == "0.06215"
    assert recipes(ablation, page)["0.06215"].balance.threshold == 0.06215


def test_losses_are_the_rows_of_table_5_with_the_recipes_own_weights():
    own = PRESETS["clip-cid"].weights | {"cluster_kl": 0.3, "instance_text": 0.7}
    page = recipe(distill={"weights": own})
    ablation = variants.plan("losses", page)
    rows = {name: other.distill.weights for name, other in recipes(ablation, page).items()}
    assert {name: tuple(getattr(row, part) for part in PARTS) for name, row in rows.items()} == {
        "clip": (1, 0, 0, 0, 0),
        "clip + cls": (1, 1, 0, 0, 0),
        "clip + kl": (1, 0, 0.3, 0, 0),
        "clip + cluster": (1, 1, 0.3, 0, 0),
        "clip + instance": (1, 0, 0, 0.5, 0.7),
        "clip + cluster + instance": (1, 1, 0.3, 0.5, 0.7),
        "paper-r1": (1, 0.999, 0.001, 0.5, 0.5),
        "paper-r2": (1, 0.001, 0.999, 0.5, 0.5),
        "best": (1, 1, 1, 0.5, 0.5),
    }
    assert all(row.cosine_image == 0 for name, row in rows.items() if name != "best")
    assert rows["best"].model_dump() == PRESETS["best"].weights
    assert ablation.reference == "clip"
    assert rows["clip + cluster + instance"] == page.distill.weights


def test_peers_losses_are_what_their_presets_give_in_a_recipe():
    found = recipes(variants.plan("losses", recipe(), peers=True), recipe())
    assert list(found)[-4:] == ["open-clip", "clip-kd", "tiny-clip", "mobile-clip"]
    for name in list(found)[-4:]:
        by_name = recipe(distill={"weights": name}, evaluate={"sets": {"digits": "builtin:digits"}})
        assert found[name] == by_name


def test_numbers_of_clusters_scale_table_6_and_the_clustering_has_the_seed_too():
    page = recipe(cluster={"num_centers": 128})
    ablation = variants.plan("clusters", page)
    assert [page.cluster.num_centers for page in recipes(ablation, page).values()] == [13, 64, 128, 640]
    assert ablation.reference == "128"
    assert recipes(ablation, page, seed=2)["64"].cluster.seed == 2
    million = recipes(variants.plan("clusters", recipe()), recipe())
    assert list(million) == ["100,000", "500,000", "1,000,000", "5,000,000"]


def test_teachers_take_the_place_of_the_recipes_with_their_weights():
    ablation = variants.plan("teacher", recipe(), values=["run:runs/small", "ViT-B-32/openai", "ViT-L-14/tag"])
    found = {name: page.embed for name, page in recipes(ablation, recipe()).items()}
    assert found["run:runs/small"].teacher == "run:runs/small"
    assert (found["ViT-L-14/tag"].teacher, found["ViT-L-14/tag"].pretrained) == ("ViT-L-14", "tag")
    assert ablation.reference == "ViT-B-32/openai"
    assert variants.plan("teacher", recipe(), values=["run:a", "run:b"]).reference == "run:a"


@pytest.mark.parametrize(
    ("name", "values", "may_differ"),
    [
        ("threshold", [], {"balance.threshold", "balance.max_threshold"}),
        ("losses", [], {"distill.weights"}),
        ("clusters", [], {"cluster.num_centers", "cluster.seed"}),
        ("teacher", ["run:a", "run:b"], {"embed.teacher"}),
    ],
)
def test_a_variant_changes_what_it_is_about_the_seed_and_the_models_beside_the_student(name, values, may_differ):
    ablation = variants.plan(name, recipe(), values=values)
    found = set().union(*(differing(page, recipe()) for page in recipes(ablation, recipe(), seed=1).values()))
    assert found == may_differ | {"distill.seed", "evaluate.compare"}


@pytest.mark.parametrize(
    ("name", "arguments", "sections", "says"),
    [
        ("threshold", {"peers": True}, {}, "--peers"),
        ("losses", {"values": ["1"]}, {}, "the rows of losses are fixed"),
        ("threshold", {"values": ["0.1", "wide"]}, {}, "could not convert string to float: 'wide'"),
        ("clusters", {"values": ["1e3"]}, {}, "invalid literal for int"),
        ("clusters", {}, {"cluster": {"num_centers": "auto"}}, "auto is no number to scale the paper's by"),
        ("teacher", {}, {}, "0 teachers to compare"),
        ("teacher", {"values": ["run:a", "run:a"]}, {}, "1 teachers to compare"),
        ("teacher", {"values": ["run:a", "ViT-B-32"]}, {}, "an architecture without weights"),
        ("threshold", {}, {"balance": {"enabled": False}}, "does not use balance"),
        ("threshold", {}, {"balance": {"target_removed": 0.4}}, "balance.target_removed"),
        ("threshold", {}, {"balance": {"existing": "kept.npy"}}, "balance.existing: kept.npy was made elsewhere"),
        ("clusters", {}, {"cluster": {"existing": "clusters"}}, "cluster.existing"),
        ("teacher", {"values": ["run:a", "run:b"]}, {"embed": {"existing": "store"}}, "embed.existing"),
        ("losses", {}, {"distill": {"weights": {"cluster_kl": 0}}}, "distill.weights.cluster_kl: 0 in this recipe"),
        ("losses", {}, {"distill": {"weights": "clip-only"}, "embed": {"teacher": "none"}}, "does not use cluster"),
        ("losses", {}, {"evaluate": {}}, "measures no student"),
    ],
)
def test_what_cannot_be_varied_is_refused_with_the_reason(name, arguments, sections, says):
    with pytest.raises(ConfigError) as error:
        variants.plan(name, recipe(**sections), **arguments)
    assert says in error.value.problem


def test_thresholds_may_be_named_where_the_recipe_asks_for_a_share():
    page = recipe(balance={"target_removed": 0.4})
    ablation = variants.plan("threshold", page, values=["0.05", "0.07"])
    assert {other.balance.target_removed for other in recipes(ablation, page).values()} == {None}
    assert ablation.reference == "0.05"  # 0.07 is only a default here, not what the recipe runs with


TABLE: dict[str, Any] = {"mean_of": "1/1", "missing": {}, "differences": []}
SUMMARIES: dict[str, Summary] = {
    "embed": EmbedSummary(images=9, ok=9, dim=2, teacher="run:t", bytes=90, skipped={}, images_per_s=None),
    "balance": BalanceSummary(
        images=9, ok=9, kept=8, removed=1, removed_share=0.1, sets_with_duplicates=1, largest_set=2
    ),
    "cluster": ClusterSummary(
        images=8,
        centers=2,
        empty=0,
        singletons=0,
        smallest=4,
        median=4.0,
        largest=4,
        gini=0.0,
        size_quantiles={},
        within_cosine=None,
        all_pairs_cosine=None,
        margin_quantiles={},
        margin_sample=0,
    ),
    "distill": DistillSummary(
        steps=5,
        pairs=8,
        pairs_seen=40,
        epochs=5.0,
        unreadable_pairs=0,
        skipped_steps=0,
        processes=1,
        seconds=1.5,
        pairs_per_s=26.7,
        data_wait_share=0.0,
        losses={},
        collapse_alarm=False,
        precision="float32",
        peak_memory_gib=0.5,
        parameters=Parameters(image=1, text=1),
        device="cpu",
    ),
    "evaluate": EvaluateSummary(models={}, mean_of={}, missing={}, headline="student"),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that ran, in order; scores depend on the threshold and the seed."""
    names: list[str] = []

    def run(stage: str, folder: RunFolder, out: Path, page: Recipe) -> Summary:
        names.append(stage)
        (out / "result.txt").write_text(f"{stage} {page.balance.threshold}")
        if stage == "evaluate":
            mean = {"student": page.balance.threshold + page.distill.seed / 10}
            for task in ("zero_shot", "retrieval"):
                (out / f"{task}.json").write_text(json.dumps({**TABLE, "mean": mean}))
        return SUMMARIES[stage]

    def fake_stage(module: str) -> SimpleNamespace:
        stage = module.rpartition(".")[2]
        return SimpleNamespace(run=lambda folder, out, page: run(stage, folder, out, page))

    monkeypatch.setattr(pipeline, "importlib", SimpleNamespace(import_module=fake_stage))
    monkeypatch.setattr(figure, "_draw", lambda table, path: None)  # a quarter of a second after each run
    return names


def ablate(
    out: Path, *, page: Recipe | None = None, seeds: int = 2, values: tuple[str, ...] = ("0.05", "0.07", "0.09")
):
    page = page or recipe()
    runs.run(variants.plan("threshold", page, values=values), page, out, seeds=seeds)


ONCE = {"embed": 1, "balance": 3, "cluster": 3, "distill": 6, "evaluate": 6}


@pytest.mark.slow
def test_every_stage_is_computed_once_for_all_runs_that_share_it_and_never_again(tmp_path: Path, ran: list[str]):
    ablate(tmp_path)
    assert Counter(ran) == ONCE
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 6
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    ablate(tmp_path)
    assert Counter(ran) == ONCE
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for folder in folders:
        assert pipeline.verify(RunFolder(folder)) == []


@pytest.mark.slow
def test_losses_share_balance_and_clusters_and_clip_alone_has_none(tmp_path: Path, ran: list[str]):
    runs.run(variants.plan("losses", recipe()), recipe(), tmp_path, seeds=2)
    assert Counter(ran) == {"embed": 1, "balance": 1, "cluster": 1, "distill": 18, "evaluate": 18}
    assert not (tmp_path / "runs" / "clip-seed1" / "cluster").exists()


@pytest.mark.slow
def test_the_preview_counts_what_then_runs_and_writes_nothing(tmp_path: Path, ran: list[str], capsys):
    ablation = variants.plan("threshold", recipe(), values=["0.05", "0.07", "0.09"])
    runs.preview(ablation, recipe(), tmp_path / "out", seeds=2)
    printed = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert {cells[0]: int(cells[2]) for cells in printed if cells and cells[0] in ONCE} == ONCE
    assert not (tmp_path / "out").exists()
    ablate(tmp_path / "out", seeds=1)
    capsys.readouterr()
    runs.preview(ablation, recipe(), tmp_path / "out", seeds=2)
    printed = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    left = {cells[0]: int(cells[3]) for cells in printed if cells and cells[0] in ONCE}
    assert left == {"embed": 0, "balance": 0, "cluster": 0, "distill": 3, "evaluate": 3}


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize("stop_after", [1, 4, 6, 13, 18])
def test_stopped_before_any_stage_the_same_command_goes_on(tmp_path: Path, ran: list[str], monkeypatch, stop_after):
    run_stage = pipeline._run_stage

    def stop_once(*arguments: Any, **others: Any) -> None:
        if len(ran) == stop_after and "stopped" not in ran:
            ran.append("stopped")
            raise KeyboardInterrupt
        run_stage(*arguments, **others)

    monkeypatch.setattr(pipeline, "_run_stage", stop_once)
    with pytest.raises(KeyboardInterrupt):
        ablate(tmp_path)
    ablate(tmp_path)
    assert Counter(stage for stage in ran if stage != "stopped") == ONCE


@pytest.mark.slow
@pytest.mark.resume
def test_killed_while_it_takes_over_a_stage_it_takes_it_over_again(tmp_path: Path, ran: list[str], monkeypatch):
    copytree = shutil.copytree

    def die(source: Path, target: Path, **rest: Any) -> None:
        copytree(source, target, **rest)
        (target / "result.txt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", die)
        with pytest.raises(KeyboardInterrupt):
            ablate(tmp_path)
    ablate(tmp_path)
    assert Counter(ran) == ONCE
    assert all(pipeline.verify(RunFolder(folder)) == [] for folder in (tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_a_changed_recipe_runs_again_what_depends_on_it_and_shares_that_too(tmp_path: Path, ran: list[str]):
    ablate(tmp_path)
    ran.clear()
    ablate(tmp_path, page=recipe(cluster={"num_centers": 7}))
    assert Counter(ran) == {"cluster": 3, "distill": 6, "evaluate": 6}


@pytest.mark.slow
def test_more_seeds_and_values_only_add_runs(tmp_path: Path, ran: list[str]):
    ablate(tmp_path, seeds=1)
    ran.clear()
    ablate(tmp_path, seeds=2, values=("0.05", "0.06", "0.07", "0.09"))
    assert Counter(ran) == {"balance": 1, "cluster": 1, "distill": 5, "evaluate": 5}


@pytest.mark.slow
def test_results_hold_every_run_and_the_table_its_mean(tmp_path: Path, ran: list[str], capsys):
    ablate(tmp_path)
    results = json.loads((tmp_path / "ablation.json").read_text())
    assert {(run["variant"], run["seed"]): run["scores"]["zero-shot, mean of 1/1"] for run in results["runs"]} == {
        (label, seed): float(label) + seed / 10 for label in ("0.05", "0.07", "0.09") for seed in (0, 1)
    }
    assert results["reference"] == "0.07"
    minus = "\N{MINUS SIGN}2.0 ± 0.0"
    row = f"| 0.05 | 2 | 8 | 10.0 ± 63.5 | {minus} | 10.0 ± 63.5 | {minus} |"
    assert row in (tmp_path / "ablation.md").read_text()
    assert "10.0 ± 63.5" in capsys.readouterr().out


@pytest.mark.slow
def test_no_local_path_of_a_teacher_is_in_what_an_ablation_publishes(tmp_path: Path, ran: list[str]):
    """Two teachers of one name stay two lines and two folders."""
    local = tmp_path / "top-secret"
    values = [f"run:{local}/a/teacher", f"run:{local}/b/teacher"]
    page = recipe(pairs={"source": ["https://host.example/x.tar?sig=SIGNED"]})
    runs.run(variants.plan("teacher", page, values=values), page, tmp_path / "out", seeds=1)
    for path in tmp_path.glob("out/ablation.*"):
        text = path.read_text()
        assert not [secret for secret in ("top-secret", "host.example", "SIGNED") if secret in text], path
    results = json.loads((tmp_path / "out/ablation.json").read_text())
    assert [run["variant"] for run in results["runs"]] == ["run:teacher", "run:teacher (2)"]
    assert results["changes"]["run:teacher (2)"] == {"embed.teacher": "run:teacher"}
    folders = {run["folder"] for run in results["runs"]}
    assert {path.name for path in tmp_path.glob("out/runs/*")} == folders
    assert len(folders) == 2


@pytest.mark.slow
def test_the_table_of_a_stopped_ablation_has_the_finished_runs(tmp_path: Path, ran: list[str], monkeypatch):
    make, made = runs._make, []

    def stop_at_the_fifth(*arguments: Any) -> None:
        made.append(arguments)
        if len(made) == 5:
            raise KeyboardInterrupt
        make(*arguments)

    monkeypatch.setattr(runs, "_make", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        ablate(tmp_path)
    lines = (tmp_path / "ablation.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["0.05", "2"], ["0.07", "1"], ["0.09", "1"]]


@pytest.mark.slow
def test_an_error_names_the_run_it_stopped(tmp_path: Path, ran: list[str], monkeypatch):
    def fail(*arguments: Any, **others: Any) -> None:
        raise RunError("no loss is finite.", fix="Lower distill.lr.")

    ablate(tmp_path, seeds=1)
    monkeypatch.setattr(pipeline, "_run_stage", fail)
    with pytest.raises(RunError) as error:
        ablate(tmp_path, seeds=2)
    assert error.value.problem == "0.05, seed 1: no loss is finite."


def test_teachers_at_one_threshold_are_warned_of(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    numbers = {"epochs": 1, "batch_size": 8, "warmup_steps": 0}
    equal_shares = recipe(balance={"target_removed": 0.4}, distill=numbers)
    variants.plan("teacher", equal_shares, values=["run:a", "run:b"])
    assert said == []
    variants.plan("teacher", recipe(distill=numbers), values=["run:a", "run:b"])
    assert len(said) == 1
    assert "balance.target_removed" in said[0]

    variants.plan("losses", recipe())
    assert len(said) == 1
    variants.plan("threshold", recipe())
    assert "distill.epochs, distill.batch_size, distill.warmup_steps: auto, which fits what each variant" in said[1]


def test_a_folder_of_another_ablation_is_refused(tmp_path: Path, ran: list[str]):
    ablate(tmp_path, seeds=1)
    with pytest.raises(ConfigError, match="holds the ablation 'threshold'"):
        runs.run(variants.plan("losses", recipe()), recipe(), tmp_path, seeds=1)


def test_scores_over_different_sets_are_never_put_into_one_table(tmp_path: Path, ran: list[str], monkeypatch):
    scores = results._scores
    found = iter([{"zero-shot, mean of 1/2": 0.5}])
    monkeypatch.setattr(results, "_scores", lambda folder: next(found, None) or scores(folder))
    ablate(tmp_path / "one", seeds=1, values=("0.05",))
    found = iter([{"zero-shot, mean of 1/2": 0.5}] * 2)
    with pytest.raises(RunError, match="measured on different sets"):
        ablate(tmp_path, seeds=1)


def test_runs_that_measured_nothing_have_no_table(tmp_path: Path, ran: list[str], monkeypatch):
    monkeypatch.setattr(results, "_scores", lambda folder: {})
    with pytest.raises(RunError, match="measured the student on nothing"):
        ablate(tmp_path, seeds=1)


def test_no_seed_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--seeds: 0"):
        ablate(tmp_path, seeds=0)


@pytest.mark.slow
def test_changed_pairs_are_embedded_again_once(tmp_path: Path, ran: list[str]):
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\na.jpg,a cat\n")
    page = recipe(pairs={"source": [str(table)]})
    ablate(tmp_path / "out", page=page)
    ran.clear()
    table.write_text("image,caption\na.jpg,a cat\nb.jpg,a dog\n")
    ablate(tmp_path / "out", page=page)
    assert Counter(ran) == ONCE


def test_each_group_of_sets_that_may_be_averaged_is_a_metric(tmp_path: Path):
    folder = RunFolder(tmp_path)
    out = folder.begin("evaluate", {"key": "key"}, resumable=False).part
    groups = [
        {"title": "mean of 2/14 (CLIP's sets)", "of": "2/14", "sets": [], "mean": {"student": 0.5, "teacher": 0.7}},
        {"title": "mean of 1/1 (other sets)", "of": "1/1", "sets": [], "mean": {"student": 0.25}},
        {"title": "mean of 0/5 (shifted ImageNets)", "of": "0/5", "sets": [], "mean": {}},
    ]
    zero_shot = {**TABLE, "mean": {"student": 0.5}, "mean_of": "2/14", "groups": groups}
    (out / "zero_shot.json").write_text(json.dumps(zero_shot))
    (out / "retrieval.json").write_text(json.dumps({**TABLE, "mean": {"student": 0.125}}))
    folder.publish(StageRecord("evaluate", "key", 1, {}, {}, {}, {}, "cpu", "2026-01-01T00:00:00+00:00", 1.0))
    assert results._scores(folder) == {
        "zero-shot, mean of 2/14 (CLIP's sets)": 0.5,
        "zero-shot, mean of 1/1 (other sets)": 0.25,
        "mean recall, mean of 1/1": 0.125,
    }
