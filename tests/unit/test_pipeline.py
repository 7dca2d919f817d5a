"""The pipeline's decisions, with stages that only write a file: what runs, in which order, and the reason given."""

import dataclasses
import errno
import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_cid import pipeline
from clip_cid.deciding_settings import deciding
from clip_cid.errors import ConfigError, RunError
from clip_cid.made_from import different_settings
from clip_cid.older_records import inputs_then
from clip_cid.recipe import Recipe, parse_recipe, read_run_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages.facts import Stage
from clip_cid.summaries import (
    BalanceSummary,
    ClusterSummary,
    DistillSummary,
    DrawSummary,
    EmbedSummary,
    EvaluateSummary,
    Parameters,
    ReportSummary,
    Summary,
    TextsSummary,
)

SUMMARIES: dict[str, Summary] = {
    "embed": EmbedSummary(images=4, ok=4, dim=2, teacher="t", bytes=8, skipped={}, images_per_s=1.0),
    "balance": BalanceSummary(
        images=4, ok=4, kept=3, removed=1, removed_share=0.25, sets_with_duplicates=1, largest_set=2
    ),
    "cluster": ClusterSummary(
        images=3,
        centers=2,
        empty=0,
        singletons=1,
        smallest=1,
        median=1.5,
        largest=2,
        gini=0.2,
        size_quantiles={"0": 1},
        within_cosine=None,
        all_pairs_cosine=0.1,
        margin_quantiles={},
        margin_sample=0,
    ),
    "texts": TextsSummary(texts=2, dim=2, teacher="t", empty=0, repeated=0, truncated=0),
    "distill": DistillSummary(
        steps=1,
        pairs=3,
        pairs_seen=3,
        epochs=1.0,
        unreadable_pairs=0,
        skipped_steps=0,
        processes=1,
        seconds=1.0,
        pairs_per_s=3.0,
        data_wait_share=0.0,
        losses={"loss": 2.0, "loss/clip": 2.0},
        collapse_alarm=False,
        precision="float32",
        peak_memory_gib=1.0,
        parameters=Parameters(image=1, text=1),
        device="cpu",
    ),
    "evaluate": EvaluateSummary(
        models={"student": {"zero_shot_mean": 0.5, "retrieval": None}},
        mean_of={"zero_shot": "1/2", "retrieval": "1/1"},
        missing={},
        headline="student: zero-shot 50.0 %",
    ),
    "draw": DrawSummary(figures={}, left_out={}),
    "report": ReportSummary(page="report.html", bytes=1, picture_bytes=0, no_pictures=None),
}
WRITES: dict[str, str] = {}
"""What a stage leaves, where it is not its name."""
ALL = [stage.name for stage in pipeline.STAGES if stage.name != "texts"]
"""The stages of a recipe without texts of their own."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that ran, in order."""
    names: list[str] = []

    def fake_stage(module: str) -> SimpleNamespace:
        name = module.rpartition(".")[2]

        def run(folder: RunFolder, out: Path, recipe: Recipe) -> Summary:
            names.append(name)
            (out / "result.txt").write_text(WRITES.get(name, name))
            return SUMMARIES[name]

        return SimpleNamespace(run=run)

    monkeypatch.setattr(pipeline, "importlib", SimpleNamespace(import_module=fake_stage))
    return names


def recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {"embed": {"teacher": "ViT-B-32"}, "evaluate": {"sets": {"digits": "builtin:digits"}}}
    return parse_recipe({**values, **sections}, where="test")


def reasons(folder: RunFolder, settings: Recipe) -> dict[str, str]:
    return {state.stage.name: state.reason for state in pipeline.states(folder, settings) if state.status == "stale"}


def test_all_stages_run_in_order_and_a_second_run_does_nothing(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    assert ran == ALL
    pipeline.run(folder, recipe())
    assert ran == ALL


def test_a_changed_setting_makes_its_stage_and_those_behind_it_stale_with_the_reason(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    changed = recipe(balance={"threshold": 0.06})
    found = reasons(folder, changed)
    assert found["balance"] == "balance.threshold 0.07 -> 0.06"
    assert found["cluster"] == "balance runs again"
    assert list(found) == ["balance", "cluster", "distill", "evaluate", "draw", "report"]
    ran.clear()
    pipeline.run(folder, changed)
    assert ran == list(found)


def test_the_same_number_written_differently_is_not_a_change(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe(balance={"threshold": 0.07}))
    assert reasons(folder, recipe(balance={"threshold": "7e-2"})) == {}


def test_auto_is_recorded_as_the_number_that_the_kept_pairs_give_and_said_with_its_reason(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    folder, said = RunFolder(tmp_path), list[str]()
    monkeypatch.setattr(pipeline.log, "info", said.append)
    monkeypatch.setitem(SUMMARIES, "balance", dataclasses.replace(SUMMARIES["balance"], kept=660))
    pipeline.run(folder, recipe())
    of_clusters, of_training = folder.record("cluster"), folder.record("distill")
    assert of_clusters is not None
    assert of_training is not None
    assert of_clusters.settings["cluster"]["num_centers"] == 22
    assert of_training.settings["distill"]["warmup_steps"] == 66
    assert "cluster   cluster.num_centers: auto is 22 (30 of 660 kept images a cluster)" in said
    assert read_run_recipe(tmp_path / "recipe.yaml") == recipe()

    # The same number written down is the same; another one is named beside what auto was.
    assert reasons(folder, recipe(cluster={"num_centers": 22}, distill={"warmup_steps": 66})) == {}
    assert reasons(folder, recipe(distill={"warmup_steps": 5}))["distill"] == "distill.warmup_steps 66 -> 5"


def test_auto_is_another_number_once_other_pairs_are_kept(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    folder = RunFolder(tmp_path)
    monkeypatch.setitem(SUMMARIES, "balance", dataclasses.replace(SUMMARIES["balance"], kept=660))
    pipeline.run(folder, recipe())
    monkeypatch.setitem(SUMMARIES, "balance", dataclasses.replace(SUMMARIES["balance"], kept=1_200))
    monkeypatch.setitem(WRITES, "balance", "more")
    pipeline.run(folder, recipe(balance={"threshold": 0.05}))
    record = folder.record("cluster")
    assert record is not None
    assert record.settings["cluster"]["num_centers"] == 40
    assert reasons(folder, recipe(balance={"threshold": 0.05})) == {}


def test_machine_settings_make_nothing_stale(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    other = {"workers": 7, "threads": 3, "embed_batch": 5, "distance_block": 11, "checkpoint_minutes": 1}
    assert reasons(folder, recipe(machine=other)) == {}


def test_a_stage_run_again_elsewhere_is_the_reason_for_the_next(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    pipeline.run(folder, recipe(cluster={"num_centers": 5}), only="cluster")
    found = reasons(folder, recipe(cluster={"num_centers": 5}))
    assert found["distill"] == "cluster was run again"
    assert "embed" not in found


def test_a_result_changed_on_disk_is_named(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    (tmp_path / "cluster" / "result.txt").write_text("other contents")
    assert reasons(folder, recipe())["cluster"] == "result.txt has 14 bytes, not 7"


def test_plain_clip_training_has_no_embed_balance_or_cluster(tmp_path: Path, ran: list[str]):
    plain = recipe(embed={"teacher": "none"}, distill={"weights": "clip-only"})
    pipeline.run(RunFolder(tmp_path), plain)
    assert ran == ["distill", "evaluate", "draw", "report"]


def test_without_balance_or_cluster_weights_those_stages_are_off(tmp_path: Path, ran: list[str]):
    settings = recipe(balance={"enabled": False}, distill={"weights": {"cluster_cls": 0, "cluster_kl": 0}})
    pipeline.run(RunFolder(tmp_path), settings)
    assert ran == ["embed", "distill", "evaluate", "draw", "report"]


def test_one_stage_alone_needs_those_before_it(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match=f"clip-cid embed {tmp_path}"):
        pipeline.run(folder, recipe(), only="balance")
    pipeline.run(folder, recipe(), only="embed")
    pipeline.run(folder, recipe(), only="balance")
    assert ran == ["embed", "balance"]


def test_a_run_ends_with_the_stage_named_and_goes_on_later(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe(), until="balance")
    assert ran == ["embed", "balance"]
    assert (tmp_path / "balance.html").is_file()
    pipeline.run(folder, recipe(), until="embed")
    pipeline.run(folder, recipe())
    assert ran == ALL

    with pytest.raises(ConfigError, match="--until texts: this recipe does not use the stage") as error:
        pipeline.run(folder, recipe(), until="texts")
    assert "embed, balance, cluster, distill" in str(error.value)


def test_a_page_shows_what_has_run_and_is_stale_once_more_has(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match="no stage has finished here, so there is nothing to report"):
        pipeline.run(folder, recipe(), only="report")
    pipeline.run(folder, recipe(), until="balance")
    pipeline.run(folder, recipe(), only="report")
    assert ran == ["embed", "balance", "draw", "report"]
    pipeline.run(folder, recipe(), only="report")
    assert ran == ["embed", "balance", "draw", "report"], "nothing that is there has changed"

    pipeline.run(folder, recipe(), only="cluster")
    assert reasons(folder, recipe())["draw"] == "distill has not run yet", "as a run of all stages would do"
    pipeline.run(folder, recipe(), only="draw")
    assert ran[4:] == ["cluster", "draw"]
    pipeline.run(folder, recipe())
    assert ran[6:] == ["distill", "evaluate", "draw", "report"]


def test_a_page_is_not_made_of_results_of_other_settings(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe(), until="cluster")
    other = recipe(balance={"threshold": 0.05})
    pipeline.run(folder, other, only="balance")
    with pytest.raises(RunError, match=r"draw needs cluster, which is stale \(balance was run again\)"):
        pipeline.run(folder, other, only="draw")


def test_one_stage_alone_takes_over_given_data_first(tmp_path: Path, ran: list[str]):
    given = tmp_path / "store"
    given.mkdir()
    settings = recipe(embed={"existing": str(given)})
    pipeline.run(RunFolder(tmp_path / "run"), settings, only="balance")
    assert ran == ["embed", "balance"]


def test_given_data_that_changes_makes_its_stage_stale(tmp_path: Path, ran: list[str]):
    kept = tmp_path / "kept.npy"
    kept.write_bytes(b"first")
    folder, settings = RunFolder(tmp_path / "run"), recipe(balance={"existing": str(kept)})
    pipeline.run(folder, settings)
    kept.write_bytes(b"second")
    assert reasons(folder, settings)["balance"] == f"balance.existing ({kept}) changed on disk"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_an_input_that_cannot_be_read_now_is_not_said_to_have_changed(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, code: int
):
    kept = tmp_path / "kept.npy"
    kept.write_bytes(b"kept")
    settings, folder = recipe(balance={"existing": str(kept)}), RunFolder(tmp_path / "run")
    pipeline.run(folder, settings)
    os.utime(kept, ns=(1, 1))

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code), str(kept))

    monkeypatch.setattr("clip_cid.file_digests.FileDigests.of_all", fail)
    with pytest.raises(OSError, match=f"{os.strerror(code)}: '{kept}'"):
        pipeline.states(RunFolder(tmp_path / "run"), settings)


def test_a_teacher_trained_anew_makes_the_embeddings_stale(tmp_path: Path, ran: list[str]):
    weights = tmp_path / "teacher" / "distill" / "student" / "open_clip_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    folder, settings = RunFolder(tmp_path / "run"), recipe(embed={"teacher": f"run:{tmp_path / 'teacher'}"})
    pipeline.run(folder, settings)
    weights.write_bytes(b"other")
    assert reasons(folder, settings)["embed"] == f"embed.teacher (run:{tmp_path / 'teacher'}) changed on disk"


def test_an_evaluation_set_that_changes_makes_its_scores_stale(tmp_path: Path, ran: list[str]):
    folder, shard = RunFolder(tmp_path / "run"), tmp_path / "set" / "test" / "0.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"one")
    settings = recipe(evaluate={"sets": {"mine": str(tmp_path / "set")}})
    pipeline.run(folder, settings)
    shard.write_bytes(b"other")
    assert reasons(folder, settings)["evaluate"] == f"evaluate.sets.mine ({tmp_path / 'set'}) changed on disk"


def test_the_same_checkpoint_as_another_architecture_is_another_model(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("x.pt").write_bytes(b"one")
    folder, sets = RunFolder(tmp_path / "run"), {"digits": "builtin:digits"}
    pipeline.run(folder, recipe(evaluate={"sets": sets, "compare": {"theirs": "cid-tiny/x.pt"}}))
    found = reasons(folder, recipe(evaluate={"sets": sets, "compare": {"theirs": "cid-conv/x.pt"}}))
    assert found["evaluate"] == "evaluate.compare.theirs cid-tiny/x.pt -> cid-conv/x.pt"


def test_files_of_another_place_are_named_with_both_places(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("one.npy").write_bytes(b"first")
    Path("other.npy").write_bytes(b"second")
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, recipe(balance={"existing": "one.npy"}))
    found = reasons(folder, recipe(balance={"existing": "other.npy"}))
    assert found["balance"] == "balance.existing one.npy -> other.npy"


def test_weights_to_start_from_that_are_gone_are_asked_for_by_no_finished_student(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A folder named without a slash, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "open_clip_model.safetensors").write_bytes(b"one")
    folder, settings = RunFolder(tmp_path / "run"), recipe(distill={"pretrained": "m"})
    pipeline.run(folder, settings)
    (tmp_path / "m" / "open_clip_model.safetensors").write_bytes(b"two")
    assert reasons(folder, settings)["distill"] == "distill.pretrained (m) changed on disk"
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    assert reasons(folder, settings) == {}


def test_a_run_of_an_older_version_needs_its_pairs_and_sets_no_more_than_one_of_today(tmp_path: Path, ran: list[str]):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "a.txt"):
            tar.addfile(info := tarfile.TarInfo(name), io.BytesIO(b"x" * info.size))
    shard = tmp_path / "set" / "test" / "0.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"one")
    folder = RunFolder(tmp_path / "run")
    settings = recipe(pairs={"source": [str(tmp_path / "*.tar")]}, evaluate={"sets": {"mine": str(tmp_path / "set")}})
    pipeline.run(folder, settings)
    for name in ALL:
        _as_an_older_version_wrote_it(folder.path / name / "manifest.json", name, settings)
    assert reasons(folder, settings) == {}

    (tmp_path / "0.tar").rename(tmp_path / "gone")
    (tmp_path / "set").rename(tmp_path / "no-set")
    assert reasons(folder, settings) == {}
    other = recipe(pairs={"source": [str(tmp_path / "no" / "*.tar")]}, evaluate=settings.evaluate.model_dump())
    assert reasons(folder, other)["embed"] == "pairs changed on disk"


def _as_an_older_version_wrote_it(manifest: Path, stage: str, settings: Recipe) -> None:
    values = json.loads(manifest.read_text())
    earlier = {name: digest for name, digest in values["inputs"].items() if name in ALL}
    values |= {"by_contents": False, "inputs": earlier | inputs_then(stage, settings)}
    values["settings"].get("pairs", {}).pop("key_prefix", None)
    values["settings"].get("embed", {}).pop("max_bad_share", None)
    manifest.write_text(json.dumps(values))


def test_what_is_set_aside_is_said_once_the_new_settings_are_accepted(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folder = RunFolder(tmp_path)

    def killed(folder: RunFolder, out: Path, recipe: Recipe) -> Summary:
        folder.accept()
        (out / "shard").write_text("one")
        raise KeyboardInterrupt

    def refuses(folder: RunFolder, out: Path, recipe: Recipe) -> Summary:
        raise ConfigError("no such precision", fix="Give another.")

    def stage_is(run: Any) -> None:
        module = SimpleNamespace(import_module=lambda name: SimpleNamespace(run=run))
        monkeypatch.setattr(pipeline, "importlib", module)

    stage_is(killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(folder, recipe(), only="embed")
    stage_is(refuses)
    with pytest.raises(ConfigError):
        pipeline.run(folder, recipe(embed={"precision": "bf16"}), only="embed")
    assert "aside" not in caplog.text
    assert (tmp_path / "embed.part" / "shard").read_text() == "one"
    assert not (tmp_path / "aside").exists()

    stage_is(killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(folder, recipe(embed={"precision": "bf16"}), only="embed")
    assert f"is kept in {tmp_path / 'aside' / 'embed-1'}" in caplog.text


def test_a_stage_behind_a_link_to_nothing_is_not_made_again_unless_forced(tmp_path: Path, ran: list[str]):
    """The disk may only be not mounted now."""
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, recipe())
    (folder.path / "embed").rename(tmp_path / "disk")
    (folder.path / "embed").symlink_to(tmp_path / "disk")
    assert reasons(folder, recipe()) == {}

    (tmp_path / "disk").rename(tmp_path / "away")
    ran.clear()
    lost = f"{folder.path / 'embed'} is a link to {tmp_path / 'disk'}, where nothing is"
    assert reasons(folder, recipe())["embed"] == lost
    with pytest.raises(RunError, match="where nothing is"):
        pipeline.run(folder, recipe())
    assert ran == []
    (tmp_path / "away").rename(tmp_path / "disk")
    assert reasons(folder, recipe()) == {}

    (tmp_path / "disk").rename(tmp_path / "away")
    pipeline.run(folder, recipe(), only="embed", force=True)
    assert ran == ["embed"]
    assert not (folder.path / "embed").is_symlink()


@pytest.mark.parametrize(("stage", "left"), [("cluster", "made-from.json"), ("draw", "half.svg"), ("draw", ".x.tmp-9")])
def test_what_a_killed_force_leaves_is_gone_after_the_next_command(
    tmp_path: Path, ran: list[str], stage: str, left: str
):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    (tmp_path / f"{stage}.part").mkdir()
    (tmp_path / f"{stage}.part" / left).write_text("{}")
    pipeline.run(folder, recipe(), only=stage)
    assert [path.name for path in tmp_path.glob("*.part")] == []
    assert reasons(folder, recipe()) == {}


OVERRULED = {
    "balance": ({"existing": "kept.npy"}, {"threshold": 0.3, "keep": "best_caption"}),
    "cluster": ({"existing": "clusters"}, {"num_centers": 7}),
    "distill": ({"steps": 5}, {"epochs": 3.0}),
}


@pytest.mark.parametrize("section", OVERRULED)
def test_a_setting_without_effect_makes_no_stage_stale(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, section: str
):
    monkeypatch.chdir(tmp_path)
    Path("kept.npy").write_bytes(b"kept")
    Path("clusters").mkdir()
    Path("clusters/centers.npy").write_bytes(b"centers")
    ruling, overruled = OVERRULED[section]
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, recipe(**{section: ruling}))
    assert reasons(folder, recipe(**{section: ruling | overruled})) == {}
    assert section in reasons(folder, recipe(**{section: overruled}))


def test_what_a_balance_grew_from_decides_nothing(tmp_path: Path, ran: list[str]):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "kept.npy").write_bytes(b"one")
    folder, settings = RunFolder(tmp_path / "run"), recipe(balance={"grow_from": str(earlier)})
    pipeline.run(folder, settings)
    (earlier / "kept.npy").write_bytes(b"another")
    assert reasons(folder, settings) == {}
    assert reasons(folder, recipe()) == {}


def test_an_unused_stage_asked_for_is_a_config_error(tmp_path: Path, ran: list[str]):
    with pytest.raises(ConfigError, match="does not use the stage"):
        pipeline.run(RunFolder(tmp_path), recipe(balance={"enabled": False}), only="balance")


def test_force_runs_what_is_up_to_date(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    ran.clear()
    pipeline.run(folder, recipe(), only="cluster", force=True)
    assert ran == ["cluster"]


def test_a_stage_forced_to_other_results_makes_those_behind_it_stale(tmp_path: Path, ran: list[str], monkeypatch):
    """Equal settings are not equal bytes: training on a GPU is not repeatable, and its scores are of one student."""
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    monkeypatch.setitem(WRITES, "distill", "another student")
    pipeline.run(folder, recipe(), only="distill", force=True)
    found = reasons(folder, recipe())
    assert found["evaluate"] == "distill was run again"
    assert list(found) == ["evaluate", "draw", "report"]


def test_a_stage_forced_to_the_same_results_leaves_those_behind_it_current(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    pipeline.run(folder, recipe(), only="cluster", force=True)
    assert reasons(folder, recipe()) == {}


def test_a_failing_stage_leaves_the_earlier_results_whole(tmp_path: Path, ran: list[str], monkeypatch):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())

    def fail(folder: RunFolder, out: Path, recipe: Recipe) -> Summary:
        (out / "half.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "importlib", SimpleNamespace(import_module=lambda module: SimpleNamespace(run=fail)))
    with pytest.raises(RunError, match=r"disk is full; balance could not write"):
        pipeline.run(folder, recipe(balance={"threshold": 0.01}))
    assert (folder.stage("balance") / "result.txt").read_text() == "balance"
    assert not (folder.stage("balance") / "half.txt").exists()


def test_the_recipe_stored_with_the_run_runs_it_again(tmp_path: Path, ran: list[str]):
    from clip_cid.recipe import read_recipe

    pipeline.run(RunFolder(tmp_path), recipe(cluster={"num_centers": 9}))
    assert read_recipe(tmp_path / "recipe.yaml") == recipe(cluster={"num_centers": 9})


def test_verify_reads_every_file(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    assert pipeline.verify(folder) == []
    (tmp_path / "draw" / "result.txt").unlink()
    assert pipeline.verify(folder) == ["draw: result.txt is missing"]


def test_what_ran_and_why_is_in_the_log_file(tmp_path: Path, ran: list[str]):
    folder = RunFolder(tmp_path)
    pipeline.run(folder, recipe())
    pipeline.run(folder, recipe(balance={"threshold": 0.06}))
    text = (tmp_path / "run.log").read_text()
    assert "stale: balance.threshold 0.07 -> 0.06" in text
    assert "4 images -> 3 kept (25.0 % removed)" in text


def test_a_whole_run_ends_with_the_models_mean_scores_and_of_how_many_sets(tmp_path: Path, ran: list[str], capsys):
    pipeline.run(RunFolder(tmp_path), recipe())
    printed = capsys.readouterr().out
    assert "zero shot (mean of 1/2)" in printed
    assert "student │ 50.0 %                  │ -" in printed


def lent(tmp_path: Path, lender: Recipe, borrower: Recipe) -> RunFolder:
    """A new run that may take over from a finished one."""
    done, folder = RunFolder(tmp_path / "done"), RunFolder(tmp_path / "new")
    pipeline.run(done, lender)
    pipeline.take_over(folder, borrower, [RunFolder(tmp_path / "nothing"), done])
    return folder


def done_stages(folder: RunFolder, settings: Recipe) -> list[str]:
    return [state.stage.name for state in pipeline.states(folder, settings) if state.status == "done"]


def test_the_same_recipe_elsewhere_takes_over_every_stage(tmp_path: Path, ran: list[str]):
    folder = lent(tmp_path, recipe(), recipe(machine={"threads": 3}))
    ran.clear()
    pipeline.run(folder, recipe())
    assert ran == []
    assert pipeline.verify(folder) == []


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        ({"embed": {"teacher": "ViT-L-14"}}, []),
        ({"cluster": {"num_centers": 5}}, ["embed", "balance"]),
        ({"distill": {"seed": 1}}, ["embed", "balance", "cluster"]),
        ({"distill": {"weights": "clip-only"}}, ["embed", "balance"]),
        ({"evaluate": {"sets": {}}}, ["embed", "balance", "cluster", "distill"]),
    ],
    ids=str,
)
def test_what_a_change_touches_is_not_taken_over(tmp_path: Path, ran: list[str], sections: Any, same: list[str]):
    changed = recipe(**sections)
    folder = lent(tmp_path, recipe(), changed)
    assert done_stages(folder, changed) == same
    assert [name for name in ALL if folder.has(name)] == same


def test_a_balance_for_another_threshold_is_there_to_build_upon_but_not_current(tmp_path: Path, ran: list[str]):
    changed = recipe(balance={"threshold": 0.05})
    folder = lent(tmp_path, recipe(), changed)
    assert reasons(folder, changed) == {"balance": "balance.threshold 0.07 -> 0.05"}
    assert folder.earlier("balance") is not None
    assert not folder.has("cluster")


def test_a_result_changed_on_disk_is_not_taken_over(tmp_path: Path, ran: list[str]):
    done, folder = RunFolder(tmp_path / "done"), RunFolder(tmp_path / "new")
    pipeline.run(done, recipe())
    (done.path / "balance" / "result.txt").write_text("edited")
    pipeline.take_over(folder, recipe(), [done])
    assert done_stages(folder, recipe()) == ["embed"]
    assert not folder.has("balance")


@pytest.mark.slow
def test_equal_footprints_are_equal_keys(tmp_path: Path, ran: list[str]):
    """Without a look at any file: footprints agree exactly where the keys of finished runs do."""
    pages = [
        recipe(),
        recipe(machine={"threads": 3}),
        recipe(balance={"threshold": 0.05}),
        recipe(distill={"seed": 1}),
        recipe(distill={"weights": "clip-only"}),
        recipe(cluster={"seed": 1}),
    ]
    folders = [RunFolder(tmp_path / str(number)) for number in range(len(pages))]
    for folder, page in zip(folders, pages, strict=True):
        pipeline.run(folder, page)
    for stage in pipeline.STAGES:
        users = [(f, p) for f, p in zip(folders, pages, strict=True) if p.uses(stage.name)]
        keys = [record.key for f, _ in users if (record := f.record(stage.name)) is not None]
        prints = [pipeline.footprint(stage, p) for _, p in users]
        assert [keys.index(key) for key in keys] == [prints.index(mark) for mark in prints]


@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_every_stage_has_settings_that_decide_with_all_ways_beyond_the_paper(stage: Stage):
    """Also what is no section: views are a text beside them."""
    beyond = recipe(
        embed={"views": 2},
        cluster={"texts": True},
        distill={"texts": ["lines.txt"], "weights": {"cosine_text": 1.0, "text_cluster_kl": 1.0}, "labels": 2},
    )
    assert pipeline.footprint(stage, beyond) != pipeline.footprint(stage, recipe())


def test_a_stage_reads_no_section_it_is_not_keyed_by():
    """A setting that a stage reads but that is not in its key would change results without making them stale."""
    import re

    for stage in pipeline.STAGES:
        source = (Path(pipeline.__file__).parent / "stages" / f"{stage.name}.py").read_text()
        used = set(re.findall(r"\brecipe\.(\w+)", source)) - {"machine"}
        known = {name for other in pipeline.STAGES for name in other.sections}
        behind = {name for need in stage.needs for name in (*_sections_behind(need), need)}
        assert used & known <= {*stage.sections, *behind}, stage.name


def _sections_behind(name: str) -> set[str]:
    stage = next(stage for stage in pipeline.STAGES if stage.name == name)
    return {*stage.sections, *(section for need in stage.needs for section in _sections_behind(need))}


def test_a_setting_that_was_removed_since_is_named_as_such():
    before = {"cluster": {"algorithm": "faiss", "num_centers": 7}}
    assert different_settings(before, {"cluster": {"num_centers": 8}}) == [
        "cluster.algorithm is no longer a setting",
        "cluster.num_centers 7 -> 8",
    ]


# Texts without images


def with_texts(path: Path, **embed: Any) -> Recipe:
    return recipe(
        embed={"teacher": "ViT-B-32", **embed}, distill={"texts": [str(path)], "weights": {"cosine_text": 1.0}}
    )


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    return tmp_path / "words.txt"


def test_texts_are_embedded_once_and_an_edited_file_makes_only_them_and_the_training_stale(
    tmp_path: Path, ran: list[str], words: Path
):
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, with_texts(words))
    assert ran == ["embed", "balance", "cluster", "texts", "distill", "evaluate", "draw", "report"]

    # Touched or moved, the file is the same.
    words.touch()
    moved = words.rename(tmp_path / "moved.txt")
    assert reasons(folder, with_texts(moved)) == {}

    # An edit of equal size is seen by its content.
    moved.write_text("one\nsix\n")
    found = reasons(folder, with_texts(moved))
    assert list(found) == ["texts", "distill", "evaluate", "draw", "report"]
    assert found["texts"].startswith("distill.texts [")


def test_other_images_and_settings_leave_the_embeddings_of_texts_as_they_are(
    tmp_path: Path, ran: list[str], words: Path
):
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, with_texts(words))
    pipeline.run(folder, with_texts(words), only="embed", force=True)
    assert "texts" not in reasons(folder, with_texts(words, max_bad_share=0.5))
    other = reasons(folder, with_texts(words, precision="bf16"))
    assert {"embed", "texts", "distill"} <= other.keys()


def test_a_run_that_gets_texts_embeds_these_alone(tmp_path: Path, ran: list[str], words: Path):
    folder = RunFolder(tmp_path / "run")
    before = recipe(distill={"weights": {"cosine_text": 1.0}})
    pipeline.run(folder, before)
    assert {state.stage.name: state.status for state in pipeline.states(folder, before)}["texts"] == "off"
    ran.clear()
    pipeline.run(folder, with_texts(words))
    assert ran == ["texts", "distill", "evaluate", "draw", "report"]


def test_texts_that_no_loss_reads_are_not_embedded_and_change_nothing(tmp_path: Path, ran: list[str], words: Path):
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, recipe(distill={"weights": "clip-cid"}))
    texts = {"texts": [str(words)], "texts_per_step": 7}
    assert reasons(folder, recipe(distill={"weights": "clip-cid", **texts})) == {}


def test_the_number_of_lines_in_a_step_makes_the_training_stale_and_no_texts(
    tmp_path: Path, ran: list[str], words: Path
):
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, with_texts(words))
    settings = with_texts(words)
    more = settings.model_copy(update={"distill": settings.distill.model_copy(update={"texts_per_step": 7})})
    assert list(reasons(folder, more)) == ["distill", "evaluate", "draw", "report"]
    assert "texts_per_step None -> 7" in reasons(folder, more)["distill"]


def test_settings_that_came_later_are_in_no_key_while_they_are_off():
    """Else the checkpoints and unfinished shards of a version without them would be those of other settings."""
    decide = deciding(recipe().model_dump(mode="json"))
    assert set(decide["embed"]) == {"teacher", "pretrained", "precision", "normalize"}
    assert set(decide["cluster"]) == {"num_centers", "iterations", "max_points_per_center", "truth_field", "seed"}
    assert set(decide["distill"]["weights"]) == {
        "clip", "siglip", "cluster_cls", "cluster_kl", "instance_image", "instance_text", "affinity", "feature", "icl",
    }  # fmt: skip
    assert not {"captions"} & decide["pairs"].keys()
    assert not {"labels", "per_cluster", "shuffle_window", "text_tower", "bank_size"} & decide["distill"].keys()


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_setting_that_came_later_is_named_when_it_changes(tmp_path: Path, ran: list[str], before: int, after: int):
    folder = RunFolder(tmp_path / "run")
    pipeline.run(folder, recipe(distill={"labels": before}))
    assert reasons(folder, recipe(distill={"labels": after}))["distill"] == f"distill.labels {before} -> {after}"


def test_the_settings_of_a_run_without_texts_are_compared_as_before_there_were_any():
    """Records and unfinished work of older versions do not have them."""
    assert not {"texts", "texts_per_step"} & deciding(recipe().model_dump(mode="json"))["distill"].keys()
