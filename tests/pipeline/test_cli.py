"""The command line as a user meets it: exit codes, two-line errors, help that is quick."""

import contextlib
import io
import os
import re
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from clip_cid import cli, pipeline
from clip_cid.recipe import ALLOW_PIPE, MachineConfig, Recipe, dump_recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages.facts import Stage

ROOT = Path(__file__).parents[2]


def clip_cid(*arguments: str | Path, cwd: Path = Path()) -> subprocess.CompletedProcess[str]:
    """The command in this process: what it writes and its exit code."""
    command = [*map(str, arguments)]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = cli.main(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


@pytest.mark.slow
def test_help_names_every_command_and_imports_neither_torch_nor_open_clip():
    program = (
        "import sys; from clip_cid.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, *(name for name in ('torch', 'open_clip', 'faiss', 'matplotlib') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    for command in [
        "run",
        "check",
        *(stage.name for stage in pipeline.STAGES),
        "status",
        "verify",
        "subset",
        "ablate",
        "export",
        "push",
        "init",
        "plan",
        "sample",
    ]:
        assert f"• {command} " in done.stdout


@pytest.mark.slow
def test_help_is_quick():
    def processor_seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # The best of three: a loaded machine must not fail this, an eager import of torch (seconds) must.
    assert min(processor_seconds("-m", "clip_cid", "run", "--help") for _ in range(3)) < 1.5


@pytest.mark.parametrize("how", ["in this process", "as a process"])
def test_a_misspelt_recipe_setting_is_exit_2_in_two_lines_and_makes_no_folder(tmp_path: Path, how: str):
    (tmp_path / "r.yaml").write_text("balance: {treshold: 0.1}")
    arguments = ["run", "out", "--recipe", "r.yaml"]
    if how == "as a process":
        command = [sys.executable, "-m", "clip_cid", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    else:
        done = clip_cid(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean threshold?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_debug_adds_the_traceback(tmp_path: Path):
    done = clip_cid("run", "out", "--recipe", "no.yaml", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--balance.treshold", "0.1"],
        ["--balance.threshold", "0"],
        ["--balance.threshold", "-1"],
        ["--balance.metric", "cos"],
        ["--distill.sample-rate", "1.5"],
    ],
)
def test_a_bad_flag_is_exit_2_and_makes_no_folder(tmp_path: Path, flags: list[str]):
    done = clip_cid("run", "out", *flags, cwd=tmp_path)
    assert done.returncode == 2
    name = flags[0].removeprefix("--")
    assert name in done.stderr or name.replace("-", "_") in done.stderr
    assert not (tmp_path / "out").exists()


def test_settings_at_odds_with_each_other_are_exit_2(tmp_path: Path):
    done = clip_cid("run", "out", "--embed.teacher", "none", cwd=tmp_path)
    assert done.returncode == 2
    assert "set distill.weights: clip-only" in done.stderr


@pytest.mark.slow
def test_a_run_without_pairs_says_so(tmp_path: Path):
    done = clip_cid("run", "out", cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert "pairs.source" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4


@pytest.mark.slow
def test_init_writes_a_recipe_that_runs_are_made_from_and_never_overwrites(tmp_path: Path):
    assert clip_cid("init", "mine.yaml", cwd=tmp_path).returncode == 0
    before = (tmp_path / "mine.yaml").read_text()
    again = clip_cid("init", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert (tmp_path / "mine.yaml").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["status", "no"], ["verify", "no"], ["subset", "no", "out"], ["export", "no", "out"], ["push", "no", "me/x"]],
    ids=" ".join,
)
def test_a_run_folder_that_does_not_exist_is_exit_1(tmp_path: Path, command: list[str]):
    done = clip_cid(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert "no: no such run folder." in done.stderr
    assert "clip-cid run" in done.stderr


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ("export", ["--onnx", "clip-cid[onnx]"]),
        ("push", ["ORG/NAME", "--license", "--private", "--dry-run", "hf auth login", "HF_TOKEN"]),
    ],
)
def test_the_help_of_a_command_says_what_it_takes(command: str, taught: list[str]):
    done = clip_cid(command, "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert all(word in text for word in taught)


def test_the_version_is_that_of_the_package():
    done = clip_cid("--version")
    assert (done.returncode, done.stdout) == (0, f"clip-cid {metadata.version('clip-cid')}\n")


def flags_in_help(command: str) -> set[str]:
    return set(re.findall(r"^ *│? *(--[a-z][\w.-]*)", clip_cid(command, "--help").stdout, flags=re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_the_help_of_a_stage_lists_the_settings_that_concern_it_and_no_others(stage: Stage):
    def settings(section: str) -> list[str]:
        values = getattr(Recipe(), section).model_dump()
        return [f"{section}.{name}" for name in values]

    shown = {flag[2:].replace("-", "_") for flag in flags_in_help(stage.name) if "." in flag}
    shown = {".".join(flag.split(".")[:2]) for flag in shown}
    assert shown == {name for section in Recipe.model_fields for name in settings(section) if stage.concerns(name)}


def test_help_by_hand():
    balance, texts = flags_in_help("balance"), flags_in_help("texts")
    assert {"--balance.threshold", "--machine.balance-processes", "--embeddings", "--kept", "--force"} <= balance
    assert not {"--clusters", "--machine.micro-batch", "--machine.tensorboard", "--distill.lr"} & balance
    assert {flag for flag in texts if flag.startswith("--distill")} == {"--distill.texts"}
    assert not {"--embeddings", "--kept", "--clusters"} & texts


def test_settings_of_machine_for_other_stages_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = {}
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.update(recipe=recipe))
    assert cli.main(["balance", str(tmp_path), "--machine.micro-batch", "4"]) == 0
    assert seen["recipe"].machine.micro_batch == 4


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("embed", "balance", "cluster")])
def test_a_stage_reads_no_setting_of_machine_that_does_not_concern_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stages: tuple[str, ...]
):
    rows = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    values = {"embed": {"existing": str(tmp_path / "rows.npy")}, "cluster": {"num_centers": 3}}
    recipe, read = parse_recipe(values, where="test"), set[str]()

    def recorded(self: MachineConfig, name: str) -> object:
        read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(MachineConfig, "__getattribute__", recorded)
    for name in stages:
        read.clear()
        pipeline.run(RunFolder(tmp_path / "run"), recipe, only=name)
        around = {"cache_dir", "ray"}  # where what a stage reads is looked for; whether a cluster is to be left
        used = {f"machine.{setting}" for setting in read & {*MachineConfig.model_fields} - around}
        assert all(map(pipeline.BY_NAME[name].concerns, used)), (name, used)


@pytest.mark.slow
def test_an_unknown_command_is_exit_2():
    assert clip_cid("distil").returncode == 2


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*arguments: object, **settings: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", str(tmp_path)])


@pytest.mark.slow
def test_ctrl_c_is_exit_130_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    def stop(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", stop)
    assert cli.main(["run", str(tmp_path)]) == 130
    assert "Run the same command again to resume" in capsys.readouterr().err


def test_a_flag_overrides_the_recipe_and_the_recipe_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = {}
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.update(recipe=recipe, **rest))
    (tmp_path / "r.yaml").write_text("balance: {threshold: 0.05}\ncluster: {num_centers: 7, seed: 3}")
    arguments = ["run", str(tmp_path / "out"), "--recipe", str(tmp_path / "r.yaml"), "--cluster.num-centers", "9"]
    assert cli.main(arguments) == 0
    assert (seen["recipe"].balance.threshold, seen["recipe"].cluster.num_centers) == (0.05, 9)
    assert seen["recipe"].cluster.seed == 3
    assert seen["recipe"].distill.beta2 == 0.98


def test_a_stage_command_keeps_the_other_sections_of_the_stored_recipe(monkeypatch, tmp_path: Path):
    seen = {}
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.update(recipe=recipe, **rest))
    (tmp_path / "recipe.yaml").write_text("distill: {student: ViT-B-16}")
    assert cli.main(["balance", str(tmp_path), "--balance.threshold", "0.1", "--embeddings", "store"]) == 0
    assert seen["only"] == "balance"
    assert seen["recipe"].distill.student == "ViT-B-16"
    assert seen["recipe"].embed.existing == Path("store")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "blur", "images"),
    [([], False, True), (["--blur"], True, True), (["--no-images"], False, False), (["--report.blur"], True, True)],
)
def test_a_report_is_blurred_or_without_images_by_a_short_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], blur: bool, images: bool
):
    seen = {}
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.update(recipe=recipe, **rest))
    (tmp_path / "recipe.yaml").write_text("report: {title: mine}")
    assert cli.main(["report", str(tmp_path), *flags]) == 0
    assert (seen["only"], seen["recipe"].report.title) == ("report", "mine")
    assert (seen["recipe"].report.blur, seen["recipe"].report.images) == (blur, images)


def evaluated(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> Recipe:
    """The recipe that `evaluate` runs with."""
    seen = {}
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.update(recipe=recipe, **rest))
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    assert seen["only"] == "evaluate"
    return seen["recipe"]


def test_models_are_evaluated_in_a_folder_that_is_no_run(monkeypatch, tmp_path: Path):
    arguments = ["--model", "ViT-B-32", "local-dir:a", "ViT-B-16/openai", "--pretrained", "laion400m_e32"]
    recipe = evaluated(monkeypatch, tmp_path / "out", *arguments, "--evaluate.sets", "d", "builtin:digits")
    assert not recipe.evaluate.student
    assert list(recipe.evaluate.compare.items()) == [
        ("ViT-B-32/laion400m_e32", "ViT-B-32/laion400m_e32"),
        ("local-dir:a", "local-dir:a"),
        ("ViT-B-16/openai", "ViT-B-16/openai"),
    ]
    assert [stage.name for stage in pipeline.active_stages(recipe)] == ["evaluate"]


def test_models_join_the_student_of_a_run_and_those_it_has(monkeypatch, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("evaluate: {sets: {d: 'builtin:digits'}, compare: {baseline: 'run:b'}}")
    recipe = evaluated(monkeypatch, tmp_path, "--model", "hf-hub:org/name")
    assert recipe.evaluate.student
    assert recipe.evaluate.compare == {"baseline": "run:b", "hf-hub:org/name": "hf-hub:org/name"}


def test_a_second_model_joins_the_first_in_a_folder_without_a_student(monkeypatch, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("evaluate: {student: false, compare: {one: 'local-dir:a'}}")
    recipe = evaluated(monkeypatch, tmp_path, "--model", "local-dir:b")
    assert (recipe.evaluate.student, list(recipe.evaluate.compare)) == (False, ["one", "local-dir:b"])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--model", "ViT-B-32"], "--model: ViT-B-32 is an architecture without weights."),
        (["--model", "local-dir:a", "--pretrained", "openai"], "--pretrained: openai belongs to no --model"),
        (["--pretrained", "openai"], "--pretrained: openai belongs to no --model"),
    ],
)
def test_a_model_and_its_weights_belong_together(tmp_path: Path, capsys, flags: list[str], problem: str):
    assert cli.main(["evaluate", str(tmp_path / "out"), *flags]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_is_exit_1_in_two_lines(tmp_path: Path, capsys):
    sets = ["--evaluate.sets", "d", "builtin:digits", "--machine.device", "cpu"]
    assert cli.main(["evaluate", str(tmp_path / "out"), "--model", f"local-dir:{tmp_path}", *sets]) == 1
    problem, fix = capsys.readouterr().err.strip().splitlines()[-2:]
    assert "no open_clip_config.json here" in problem
    assert "open_clip_model.safetensors" in fix


def settings_of_run(monkeypatch: pytest.MonkeyPatch, command: str, run: Path, *flags: str) -> Recipe:
    """The recipe that a command runs with; it is stored in the run, as the pipeline does."""
    seen: list[Recipe] = []

    def store(folder: RunFolder, recipe: Recipe, **rest: object) -> None:
        seen.append(recipe)
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / pipeline.RECIPE_FILE).write_text(dump_recipe(recipe))

    monkeypatch.setattr(pipeline, "run", store)
    assert cli.main([command, str(run), *flags]) == 0
    return seen[0]


NAMED = {
    "evaluate.sets": ("builtin:digits", "data/a", "data/b"),
    "evaluate.compare": ("run:a", "run:b", "run:c"),
    "evaluate.retrieval": (("a.tar",), ("b.tar", "c.tar"), ("d.tar",)),
    "distill.validation.sets": ("builtin:digits", "data/a", "data/b"),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", NAMED)
def test_entries_with_names_are_added_replaced_and_removed_by_flags(monkeypatch, tmp_path: Path, setting: str):
    run, values = tmp_path / "run", NAMED[setting]
    fixed = ["--distill.validation.metric", "zero_shot"] if "validation" in setting else []

    def entries(*flags: str) -> dict[str, object]:
        value: object = settings_of_run(monkeypatch, "run", run, *flags)
        for part in setting.split("."):
            value = getattr(value, part)
        assert isinstance(value, dict)
        return value

    def flag(name: str, value: str | tuple[str, ...]) -> list[str]:
        return [f"--{setting}", name, *([value] if isinstance(value, str) else value)]

    one, two, three = values
    assert entries(*flag("one", one), *fixed) == {"one": one}
    assert entries(*flag("one", one), *fixed) == {"one": one}  # the same command again
    assert entries(*flag("two", two)) == {"one": one, "two": two}
    assert entries(*flag("one", three)) == {"one": three, "two": two}
    assert entries("--machine.workers", "3") == {"one": three, "two": two}
    if "validation" not in setting:  # its metric needs one
        assert entries(f"--{setting}") == {}


@pytest.mark.slow
def test_numbers_with_names_are_added_and_replaced_by_flags(monkeypatch, tmp_path: Path):
    flags = ["--distill.augmentation", "gray_scale_prob", "0.1", "--distill.schedule", "clip", "0", "1", "0.5", "0"]
    for _ in range(2):
        distill = settings_of_run(monkeypatch, "distill", tmp_path, *flags).distill
        assert (distill.augmentation, distill.schedule) == ({"gray_scale_prob": 0.1}, {"clip": ((0, 1), (0.5, 0))})
    flags = ["--distill.augmentation", "color_jitter", "0.2", "color_jitter_prob", "0.8", "gray_scale_prob", "0.3"]
    distill = settings_of_run(monkeypatch, "distill", tmp_path, *flags, "--distill.schedule").distill
    assert distill.augmentation == {"color_jitter": 0.2, "color_jitter_prob": 0.8, "gray_scale_prob": 0.3}
    assert distill.schedule == {}


@pytest.mark.slow
def test_a_list_is_replaced_as_a_whole(monkeypatch, tmp_path: Path):
    assert settings_of_run(monkeypatch, "run", tmp_path, "--pairs.source", "a", "b").pairs.source == ("a", "b")
    assert settings_of_run(monkeypatch, "run", tmp_path, "--pairs.source", "c").pairs.source == ("c",)
    assert settings_of_run(monkeypatch, "run", tmp_path).pairs.source == ("c",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--evaluate.sets", "a", "x", "--evaluate.sets", "b", "y"],
        ["--pairs.source=a", "--pairs.source", "b"],
        ["--pairs.keep_fields", "a", "--pairs.keep-fields", "b"],
        ["--model", "run:a", "--model", "run:b"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_with_several_values_is_not_given_twice_though_the_parser_would_take_the_last(
    tmp_path: Path, capsys, flags: list[str]
):
    assert cli.main(["evaluate", str(tmp_path / "out"), *flags]) == 2
    assert "is given 2 times, and only the last would count" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def commands_of_the_documents() -> list[list[str]]:
    """Those of the command line that take settings, as they stand in the documents."""
    stages = {"run", "check", *(stage.name for stage in pipeline.STAGES)}
    commands: list[list[str]] = []
    for document in [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]:
        whole_lines = document.read_text().replace("\\\n", " ")  # as a shell continues a line
        for line in re.findall(r"^\s*(?:\S*/clip-cid|clip-cid|torchrun .*-m clip_cid) (.+)", whole_lines, re.M):
            words = shlex.split(line, comments=True)
            if words and words[0] in stages and len(words) > 1:
                commands.append(words)
    return commands


def test_the_documents_show_commands():
    assert {words[0] for words in commands_of_the_documents()} >= {"run", "check", "balance", "distill", "evaluate"}


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_of_the_documents(), ids=" ".join)
def test_a_command_of_the_documents_is_accepted_twice_with_the_same_settings(
    monkeypatch, tmp_path: Path, command: list[str]
):
    monkeypatch.chdir(tmp_path)
    recipe = [command[place + 1] for place, word in enumerate(command) if word == "--recipe"]
    for name in recipe:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shipped = ROOT / name
        Path(name).write_text(shipped.read_text() if shipped.is_file() else "pairs: {source: [a.tar]}")
    monkeypatch.setattr("clip_cid.check.check", lambda folder, recipe: pipeline.run(folder, recipe))
    monkeypatch.setattr("clip_cid.check.printout.say", lambda report: None)
    monkeypatch.setattr(
        pipeline,
        "show_training",
        lambda folder, recipe, watch=False: watch and pipeline.run(folder, recipe) is None,
    )
    monkeypatch.setattr("clip_cid.report.sweep.sweep", lambda folder: (("threshold",), (("0.1",),)))
    first = settings_of_run(monkeypatch, command[0], Path(command[1]), *command[2:])
    assert settings_of_run(monkeypatch, command[0], Path(command[1]), *command[2:]) == first


@pytest.mark.slow
def test_only_the_run_folder_is_looked_into_for_a_recipe(monkeypatch, tmp_path: Path):
    """Not the folders that other flags name."""
    data = tmp_path / "data"
    data.mkdir()
    run, flags = tmp_path / "run", ["--embeddings", str(data), "--pairs.source", str(data)]
    for text in ("balance: {threshold: 0.3}", "somebody: else's", "{{{"):
        (data / "recipe.yaml").write_text(text)
        assert settings_of_run(monkeypatch, "balance", run, *flags[:2]).balance.threshold == 0.07
        assert settings_of_run(monkeypatch, "embed", run, *flags).balance.threshold == 0.07


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_run_folder_is_looked_into_wherever_it_stands(monkeypatch, tmp_path: Path, order: int):
    (tmp_path / "recipe.yaml").write_text("cluster: {seed: 5}")
    seen = {}
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.update(recipe=recipe))
    words = ["--balance.threshold=0.3", "--force"]
    words.insert(order, str(tmp_path))
    assert cli.main(["balance", *words]) == 0
    assert (seen["recipe"].cluster.seed, seen["recipe"].balance.threshold) == (5, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["balance", "check", "status", "verify"])
@pytest.mark.parametrize("run", ["x" * 5000, "file/run", "loop"])
def test_a_run_folder_that_cannot_be_is_two_lines(tmp_path: Path, command: str, run: str):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    done = clip_cid(command, run, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert run[:50] in done.stderr or "pairs.source" in done.stderr


def test_a_broken_recipe_of_a_run_does_not_matter_where_another_is_given(monkeypatch, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("{{{")
    (tmp_path / "mine.yaml").write_text("cluster: {seed: 5}")
    recipe = settings_of_run(monkeypatch, "run", tmp_path, "--recipe", str(tmp_path / "mine.yaml"))
    assert recipe.cluster.seed == 5


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "0"])
def test_pipes_are_allowed_for_one_command_only(monkeypatch, tmp_path: Path, before: str | None):
    monkeypatch.delenv(ALLOW_PIPE, raising=False)
    if before is not None:
        monkeypatch.setenv(ALLOW_PIPE, before)
    seen: list[str | None] = []
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.append(os.environ.get(ALLOW_PIPE)))
    for flags in ([], ["--allow-pipe"], []):
        assert cli.main(["run", str(tmp_path), *flags]) == 0
    assert seen == [before, "1", before]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "run", "distill"])
def test_a_shell_command_of_a_recipe_is_not_run_by_any_command(tmp_path: Path, monkeypatch, command: str):
    monkeypatch.delenv(ALLOW_PIPE, raising=False)
    (tmp_path / "theirs.yaml").write_text(
        f"pairs: {{source: ['pipe:touch {tmp_path}/ran']}}\nembed: {{teacher: none}}\n"
        "distill: {weights: clip-only, student: cid-tiny}\nmachine: {cache_dir: cache, workers: 0}\n"
    )
    done = clip_cid(command, "out", "--recipe", "theirs.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "add --allow-pipe to the command, or set CLIP_CID_ALLOW_PIPE=1" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "page", [["--help"], ["run", "--help"], ["subset", "--help"], ["push", "--help"]], ids=" ".join
)
def test_help_has_no_double_blank_line(page: list[str]):
    assert "\n\n\n" not in clip_cid(*page).stdout


def test_help_says_how_flags_meet_the_recipe():
    text = " ".join(clip_cid("--help").stdout.split())
    assert "entries are added, those of the same name are replaced, and the flag alone removes all" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--balance.threshold", "x" * 1_000_000],
        ["--balance.metric", "x" * 8_000],
        ["--" + "x" * 8_000],
        ["--distill.epochs", "9" * 5_000],
        ["--distill.lr", "nan"],
        ["--pairs.keep-fields", "dup", "dup"],
        ["--report.title", os.fsdecode(b"\xff")],
        ["--recipe", "x" * 5_000],
    ],
    ids=lambda flags: flags[0][:20],
)
def test_a_value_that_is_none_is_refused_in_few_words(tmp_path: Path, flags: list[str]):
    done = clip_cid("run", "out", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stdout + done.stderr) < 20_000
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_many_aliases_prints_one_short_line(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{row}: &a{row} [{', '.join([f'*a{row - 1}'] * 9)}]" for row in range(1, 9)]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    done = clip_cid("run", "out", "--recipe", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr) < 500


def test_a_sample_that_is_too_small_is_exit_2_and_makes_no_folder(tmp_path: Path):
    done = clip_cid("sample", "out", "--pairs", "19", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "clip-cid: --pairs: must be at least 20, got 19.\nGive 20 or more.\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_reader_that_has_read_enough_is_no_error():
    command = f"{sys.executable} -m clip_cid run --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_status_names_what_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "aside" / "distill-2").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(Recipe()))
    done = clip_cid("status", tmp_path)
    assert done.returncode == 0
    assert f"{tmp_path / 'aside' / 'distill-2'}. Delete what you do not need." in " ".join(done.stdout.split())
