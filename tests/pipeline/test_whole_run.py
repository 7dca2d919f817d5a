"""The whole way on the embedded sample, through the command line, with models too small to learn much."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import yaml

from clip_cid import cli
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.recipe import PRESETS
from clip_cid.run_folder import RunFolder

TEACHER = {
    "pairs": {"source": ["data/pairs/*.tar"]},
    "embed": {"teacher": "none"},
    "distill": {"student": "cid-tiny", "weights": "clip-only", "batch_size": 32, "steps": 40, "warmup_steps": 4},
    "machine": {"workers": 0, "threads": 1},
}
STUDENT = {
    "pairs": {"source": ["data/pairs/*.tar"], "keep_fields": ["dup", "object"]},
    "embed": {"teacher": "run:teacher"},
    "balance": {"threshold": 0.002, "truth_field": "dup"},
    "cluster": {"num_centers": 8, "iterations": 3, "truth_field": "object"},
    "distill": {"student": "cid-tiny", "batch_size": 16, "steps": 4, "warmup_steps": 1, "log_every": 1},
    "evaluate": {
        "sets": {"scenes": "data/sets/scenes"},
        "retrieval": {"heldout": ["data/heldout/*.tar"]},
        "compare": {"teacher": "run:teacher"},
    },
    "machine": {"workers": 0, "threads": 1},
}
pytestmark = pytest.mark.slow

STAGES = ["embed", "balance", "cluster", "distill", "evaluate", "draw", "report"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample, a trained teacher and a finished run, as a user would have it."""
    path = tmp_path_factory.mktemp("work")
    (path / "teacher.yaml").write_text(yaml.safe_dump(TEACHER))
    (path / "student.yaml").write_text(yaml.safe_dump(STUDENT))
    before = Path.cwd()
    os.chdir(path)
    try:
        assert cli.main(["sample", "data", "--pairs", "200"]) == 0
        assert cli.main(["run", "teacher", "--recipe", "teacher.yaml"]) == 0
        assert cli.main(["run", "student", "--recipe", "student.yaml"]) == 0
    finally:
        os.chdir(before)
    return path


@pytest.fixture(autouse=True)
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


def statuses(run: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["status", run]) == 0
    return capsys.readouterr().out


def test_every_stage_is_done_and_its_files_are_as_they_were_written(capsys):
    folder = RunFolder(Path("student"))
    assert all(folder.has(stage) for stage in STAGES)
    assert "stale" not in statuses("student", capsys)
    assert cli.main(["verify", "student"]) == 0


def test_a_second_run_does_nothing_and_says_so(caplog):
    before = {path: path.stat().st_mtime_ns for path in Path("student").rglob("*") if path.parent.name in STAGES}
    assert cli.main(["run", "student"]) == 0
    assert caplog.text.count("up to date") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_run_is_looked_at_without_torch():
    program = "import sys; from clip_cid.cli import main; main(['run', 'student']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_commands_that_do_not_train_import_nothing_that_a_recipe_names(tmp_path: Path, monkeypatch):
    """`machine.callbacks` of somebody else's run."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap.py").write_text("raise ImportError")
    recipe = Path("student/recipe.yaml").read_bytes()
    theirs = yaml.safe_load(recipe)
    theirs["machine"]["callbacks"] = ["trap:send"]
    try:
        Path("student/recipe.yaml").write_text(yaml.safe_dump(theirs))
        for command in (["status"], ["verify"], ["evaluate"], ["draw"], ["report", "--force"], ["run"]):
            assert cli.main([command[0], "student", *command[1:]]) == 0
        assert cli.main(["subset", "student", str(tmp_path / "subset")]) == 0
        assert cli.main(["export", "student", str(tmp_path / "export")]) == 0
        assert cli.main(["push", "student", "me/x", "--dry-run"]) == 0
        assert "trap" not in sys.modules
        assert cli.main(["check", "student"]) == 2  # it tries what the training would do
    finally:
        Path("student/recipe.yaml").write_bytes(recipe)


def test_a_finished_run_is_looked_at_from_anywhere_and_without_what_it_was_made_from(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Its recipe names pairs, sets and a teacher by relative paths."""
    shutil.copytree(work / "student", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run = "moved"
    assert statuses(run, capsys).count("done") == len(STAGES)
    for command in ("verify", "evaluate", "draw", "report"):
        assert cli.main([command, run]) == 0
    capsys.readouterr()
    assert cli.main(["report", run, "--force"]) == 0
    assert "no pictures, because the pairs cannot be read" in capsys.readouterr().err
    assert cli.main(["export", run, "export"]) == 0
    assert cli.main(["push", run, "me/x", "--dry-run"]) == 0


def test_a_student_is_measured_on_another_set_without_the_pairs_it_was_trained_on(tmp_path: Path, monkeypatch):
    for folder in ("student", "teacher"):
        shutil.copytree(folder, tmp_path / folder)
    shutil.copytree("data", tmp_path / "data", ignore=shutil.ignore_patterns("pairs"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "student", "--evaluate.sets", "digits", "builtin:digits"]) == 0
    lines = Path("student/evaluate/results.jsonl").read_text().splitlines()
    assert {json.loads(line)["set"] for line in lines} == {"scenes", "heldout", "digits"}


def test_models_are_evaluated_by_the_same_command_twice_and_by_one_with_another_set(caplog):
    caplog.set_level("INFO", logger="clip_cid")
    command = ["evaluate", "scores", "--model", "run:student", "--evaluate.no-linear-probe", "--machine.workers", "0"]
    scenes = ["--evaluate.sets", "scenes", "data/sets/scenes"]
    assert cli.main([*command, *scenes]) == 0
    first = Path("scores/evaluate/manifest.json").read_bytes()
    caplog.clear()
    assert cli.main([*command, *scenes]) == 0
    assert "up to date" in caplog.text
    assert Path("scores/evaluate/manifest.json").read_bytes() == first

    assert cli.main([*command, "--evaluate.sets", "colors", "data/sets/colors"]) == 0
    measured = [json.loads(line) for line in Path("scores/evaluate/results.jsonl").read_text().splitlines()]
    assert {score["set"] for score in measured} == {"scenes", "colors"}


def test_rows_keys_sets_and_labels_belong_together():
    store = EmbeddingStore.open(Path("student/embed"))
    kept, set_of = np.load("student/balance/kept.npy"), np.load("student/balance/set_of.npy")
    labels, centers = np.load("student/cluster/labels.npy"), np.load("student/cluster/centers.npy")
    assert store.rows == len(set_of) == 200
    assert (set_of[kept] == np.arange(len(kept))).all()
    assert len(labels) == len(kept)
    images = store.images[kept].astype(np.float64)
    assert (np.argmax(images @ centers.T.astype(np.float64), axis=1) == labels).mean() > 0.99
    names: list[str] = []
    for shard in sorted(Path("data/pairs").glob("*.tar")):
        with tarfile.open(shard) as tar:
            names += [member.name.removesuffix(".txt") for member in tar if member.name.endswith(".txt")]
    assert list(store.keys[0:200]) == names


def test_the_student_loads_in_open_clip_and_embeds_in_the_teachers_width():
    model: Any = open_clip.create_model_and_transforms("local-dir:student/distill/student")[0]
    text = open_clip.get_tokenizer("local-dir:student/distill/student")(["a red circle"])
    assert model.encode_text(text).shape == (1, EmbeddingStore.open(Path("student/embed")).dim)


def test_every_part_of_the_loss_is_in_the_metrics():
    lines = [json.loads(line) for line in Path("student/distill/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        weights = PRESETS["clip-cid"].weights
        parts = {name: line[f"loss/{name}"] for name, weight in weights.items() if weight > 0}
        assert parts.keys() == {"clip", "cluster_cls", "cluster_kl", "instance_image", "instance_text"}
        assert line["loss"] == pytest.approx(sum(weights[name] * part for name, part in parts.items()), rel=1e-5)


def test_scores_of_student_and_teacher_lie_between_0_and_1_with_their_intervals():
    rows = [json.loads(line) for line in Path("student/evaluate/results.jsonl").read_text().splitlines()]
    asked = {(model, name) for model in ("student", "teacher") for name in ("scenes", "heldout")}
    assert {(row["model"], row["set"]) for row in rows} == asked
    assert all(0 <= row["low"] <= row["score"] <= row["high"] <= 1 for row in rows if row["score"] is not None)


def test_a_changed_threshold_reruns_what_depends_on_it_and_gives_the_reason(capsys, caplog):
    assert cli.main(["balance", "student", "--balance.threshold", "0.001"]) == 0
    assert "stale: balance.threshold 0.002 -> 0.001" in caplog.text
    assert "balance was run again" in " ".join(statuses("student", capsys).split())
    assert cli.main(["balance", "student", "--balance.threshold", "0.002"]) == 0
    # The key is made of settings and inputs, so going back makes the later stages current again.
    assert "stale" not in statuses("student", capsys)


def test_export_writes_a_folder_elsewhere_and_prints_the_lines_to_paste(capsys, tmp_path: Path):
    assert cli.main(["export", "student", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f'open_clip.create_model_and_transforms("local-dir:{tmp_path / "out"}")' in printed
    weights = "open_clip_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == Path("student/distill/student", weights).read_bytes()


def test_the_model_card_of_a_real_run_has_its_numbers(capsys):
    assert cli.main(["push", "student", "me/scenes", "--dry-run"]) == 0
    card = capsys.readouterr().out
    kept = len(np.load("student/balance/kept.npy"))
    score = json.loads(Path("student/evaluate/zero_shot.json").read_text())["scores"]["student"]["scenes"]
    for line in (
        "| image-text pairs | 200 |",
        f"| kept | {kept} |",
        "| clusters of the kept images | 8 |",
        "| steps | 4 |",
    ):
        assert line in card
    assert f"| scenes | top1 | 16 | 12.5 | {100 * score:.1f} &#91;" in card
    assert cli.main(["push", "teacher", "me/scenes", "--dry-run"]) == 0
    assert "on image-text pairs alone, without a teacher" in capsys.readouterr().out


def test_embeddings_kept_rows_and_clusters_made_elsewhere_are_taken_over(tmp_path: Path):
    run = str(tmp_path / "run")
    given = ["--embeddings", "student/embed", "--kept", "student/balance/kept.npy", "--clusters", "student/cluster"]
    assert cli.main(["distill", run, "--recipe", "student.yaml", *given]) == 0
    for file in ("metrics.jsonl", "student/open_clip_model.safetensors"):
        ours, theirs = (Path(where, "distill", file) for where in (run, "student"))
        if file.endswith("safetensors"):
            assert ours.read_bytes() == theirs.read_bytes()


def test_the_balanced_list_leaves_as_keys_and_as_tars(tmp_path: Path, capsys):
    assert cli.main(["subset", "student", str(tmp_path / "out"), "--shards", "--shard-size", "50"]) == 0
    store, kept = EmbeddingStore.open(Path("student/embed")), np.load("student/balance/kept.npy")
    keys = [store.keys[row] for row in kept]
    assert (tmp_path / "out" / "keys.txt").read_text().splitlines() == keys
    tars = sorted((tmp_path / "out" / "shards").glob("*.tar"))
    assert f"{len(keys):,} keys, and their pairs in {len(tars)} tars" in capsys.readouterr().out
    assert tar_members(*tars) == {
        name: data
        for name, data in tar_members(*Path("data/pairs").glob("*.tar")).items()
        if name.split(".")[0] in keys
    }


def tar_members(*paths: Path) -> dict[str, bytes]:
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            found |= {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}
    return found


def test_balance_alone_needs_no_pairs(tmp_path: Path):
    run = tmp_path / "run"
    assert cli.main(["balance", str(run), "--embeddings", "student/embed", "--balance.threshold", "0.002"]) == 0
    assert (np.load(run / "balance" / "kept.npy") == np.load("student/balance/kept.npy")).all()


@pytest.mark.parametrize(
    ("command", "flags", "says", "code"),
    [
        ("cluster", ["--cluster.num-centers", "5000"], "cluster.num_centers: 5,000 centers for", 2),
        ("balance", ["--balance.threshold", "3"], "threshold must be above 0 and below 2", 2),
        ("balance", ["--kept", "student/balance/set_of.npy"], "not sorted and different", 1),
        ("cluster", ["--clusters", "student/balance"], "cannot read centers.npy and labels.npy", 1),
        ("distill", ["--distill.batch-size", "4000"], "distill.batch_size: 4,000", 2),
        ("distill", ["--distill.student", "ViT-B-23"], "ViT-B-32", 2),
        ("embed", ["--embed.teacher", "ViT-bigG-41"], "ViT-bigG-14", 2),
        ("embed", ["--embed.teacher", "local-dir:nothing"], "nothing", 1),
        ("embed", ["--pairs.source", "data/none-{0..3}.tar"], "data/none-0.tar", 1),
        ("embed", ["--embeddings", "student/balance"], "student/balance", 1),
    ],
)
def test_bad_input_is_two_lines_a_nonzero_exit_and_leaves_earlier_results_whole(
    command: str, flags: list[str], says: str, code: int, capsys
):
    before = {path: path.read_bytes() for path in Path("student").glob("*/manifest.json")}
    recipe = Path("student/recipe.yaml").read_bytes()
    assert cli.main([command, "student", *flags]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in before} == before
    Path("student/recipe.yaml").write_bytes(recipe)
    assert cli.main(["verify", "student"]) == 0


def test_ctrl_c_and_a_second_process(tmp_path: Path, capsys):
    """A real interrupt in the middle of training: exit 130, a resumable stage, and the lock held meanwhile."""
    run = str(tmp_path / "run")
    given = ["--embeddings", "student/embed", "--kept", "student/balance/kept.npy", "--clusters", "student/cluster"]
    command = [sys.executable, "-m", "clip_cid", "distill", run, "--recipe", "student.yaml", *given]
    with subprocess.Popen([*command, "--distill.steps", "100000"], stderr=subprocess.PIPE, text=True) as training:
        metrics = Path(run, "distill.part", "metrics.jsonl")
        while training.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        during = statuses(run, capsys)
        code = cli.main(["distill", run])
        second = capsys.readouterr().err
        training.send_signal(signal.SIGINT)
        _, error = training.communicate()
    assert code == 1
    assert "running" in during
    assert f"in use by pid {training.pid} on " in during
    assert f"another process works in this run folder (pid {training.pid}" in second
    assert training.returncode == 130
    assert "Run the same command again to resume" in error
    after = statuses(run, capsys)
    assert "can resume" in after
    assert "running" not in after
