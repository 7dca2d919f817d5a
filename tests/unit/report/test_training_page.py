"""The page of a training that has not finished: beside the process that trains, without its lock, into no stage."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabricated_run import TRAINED, publish

from clip_cid import cli, pipeline
from clip_cid.recipe import Recipe, dump_recipe, parse_recipe
from clip_cid.report.training_page import write_training_page
from clip_cid.run_folder import RunFolder
from clip_cid.training.so_far import PAGE

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEPS = 40


def log_line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "pairs_seen": 8 * step,
        "epoch": 8 * step / 20,
        "loss": 4 / step,
        "loss/clip": 4 / step,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "mean_image_norm": 0.5,
        "own_center": 0.25,
        "data_wait_share": 0.02,
        "pairs_per_s": 4.0,
        "skipped_steps": 0,
    } | more


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    values = {
        "pairs": {"source": [str(tmp_path / "secret-place" / "pairs")]},
        "embed": {"teacher": "none"},
        "distill": {"student": "cid-tiny", "weights": "clip-only", "batch_size": 8, "steps": STEPS},
    }
    return parse_recipe(values, where="test")


@pytest.fixture
def folder(tmp_path: Path, recipe: Recipe) -> RunFolder:
    """Three steps of a training are in the log."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "recipe.yaml").write_text(dump_recipe(recipe))
    begin(folder, recipe)
    append(folder, *map(log_line, (1, 2, 3)))
    return folder


def begin(folder: RunFolder, recipe: Recipe) -> None:
    stage = pipeline.BY_NAME["distill"]
    made_from = pipeline.Origins(folder, recipe, pipeline.active_stages(recipe)).of(stage)
    folder.begin("distill", made_from.as_json(), resumable=True)


def append(folder: RunFolder, *lines: dict[str, Any]) -> None:
    with open(folder.part("distill") / "metrics.jsonl", "a") as log:
        log.writelines(json.dumps(one) + "\n" for one in lines)


def page(folder: RunFolder) -> str:
    return (folder.path / PAGE).read_text().replace("\N{NO-BREAK SPACE}", " ")


def files(folder: RunFolder) -> dict[str, tuple[int, bytes]]:
    """Everything but the page, and what the index of files remembers."""
    found = [path for path in folder.path.rglob("*") if path.is_file() and path.name != PAGE]
    return {
        str(path.relative_to(folder.path)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in found
        if not path.is_relative_to(folder.index)
    }


@pytest.fixture
def held(folder: RunFolder, recipe: Recipe) -> Iterator[RunFolder]:
    """The run folder, in which another process trains."""
    training = RunFolder(folder.path)
    with training.lock():
        begin(training, recipe)
        yield folder


def test_report_beside_the_training_writes_the_page_and_nothing_else(held: RunFolder):
    before = files(held)
    assert cli.main(["report", str(held.path)]) == 0
    assert files(held) == before
    assert [path.name for path in held.path.glob("*.html")] == [PAGE]
    assert not (held.path / "report").exists()

    text = page(held)
    assert f"the training is at step 3 of {STEPS}" in text
    assert f'<dd class="value">3 of {STEPS}</dd>' in text
    assert "1m14s" in text  # 37 steps of 8 pairs at 4 pairs/s
    assert "No warning of a collapse so far" in text
    for heading in ("Losses", "Rate and signs of a collapse", "Speed"):
        assert f"<h2>{heading}</h2>" in text
    assert "<script" not in text
    assert not re.findall(r"https?://", text)
    assert 'http-equiv="refresh"' not in text
    assert "secret-place" not in text


def test_status_beside_the_training_says_how_far_it_is(held: RunFolder, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["status", str(held.path)]) == 0
    assert f"step 3 of {STEPS}, loss 1.333, 1m14s to go" in capsys.readouterr().out


def test_a_killed_training_is_shown_as_stopped_and_nothing_becomes_stale(folder: RunFolder, recipe: Recipe):
    before = files(folder)
    assert cli.main(["report", str(folder.path)]) == 0
    assert files(folder) == before
    assert f"the training has stopped at step 3 of {STEPS}" in page(folder)
    distill = next(one for one in pipeline.states(folder, recipe) if one.stage.name == "distill")
    assert (distill.status, distill.resumes) == ("missing", True)


def test_a_collapse_stands_on_the_page_with_its_words(held: RunFolder):
    append(held, log_line(4, collapse="one point: <b>all</b> images"), log_line(5))
    assert cli.main(["report", str(held.path)]) == 0
    assert "Step 4 looks like a collapse." in page(held)
    assert "one point: &lt;b&gt;all&lt;/b&gt; images" in page(held)


def test_a_training_that_has_logged_nothing_yet_has_a_page(held: RunFolder):
    (held.part("distill") / "metrics.jsonl").unlink()
    assert cli.main(["report", str(held.path)]) == 0
    assert "No step is in the log yet" in page(held)


def test_a_log_in_which_a_line_is_being_written_is_read(held: RunFolder):
    with open(held.part("distill") / "metrics.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    assert cli.main(["report", str(held.path)]) == 0
    assert f"the training is at step 3 of {STEPS}" in page(held)


def test_the_page_of_a_training_that_has_finished_meanwhile_says_so(folder: RunFolder, recipe: Recipe):
    assert cli.main(["report", str(folder.path)]) == 0
    finish(folder, recipe)
    pipeline.show_training(folder, recipe)
    assert "The training has ended" in page(folder)
    assert "nfinished" not in page(folder)


@pytest.mark.parametrize("command", [["run", "--until", "distill"], ["distill"]])
def test_the_command_that_ends_the_training_ends_its_page(folder: RunFolder, recipe: Recipe, command: list[str]):
    write_training_page(folder, recipe, "running", refresh=10)
    finish(folder, recipe)
    assert cli.main([command[0], str(folder.path), *command[1:]]) == 0
    ended = page(folder)
    assert "The training has ended" in ended
    assert 'http-equiv="refresh"' not in ended

    (folder.path / PAGE).write_text("not written again")
    assert cli.main([command[0], str(folder.path), *command[1:]]) == 0
    assert page(folder) == "not written again"


def finish(folder: RunFolder, recipe: Recipe) -> None:
    stage = pipeline.BY_NAME["distill"]
    made_from = pipeline.Origins(folder, recipe, pipeline.active_stages(recipe)).of(stage, parts=True)
    publish(
        folder,
        "distill",
        TRAINED,
        settings=stage.settings(recipe),
        key=made_from.key,
        version=stage.version,
        inputs=made_from.inputs,
        by_contents=True,
    )


def test_a_finished_training_gets_no_page_that_nobody_asked_for(folder: RunFolder, recipe: Recipe):
    finish(folder, recipe)
    assert pipeline.show_training(folder, recipe) is False
    assert not (folder.path / PAGE).exists()


def test_watch_writes_again_until_the_training_ends(folder: RunFolder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    training, seen = RunFolder(folder.path), list[str]()

    def wait(_: float) -> None:
        seen.append(page(folder))
        if len(seen) == 1:
            append(folder, log_line(4))
        else:
            finish(training, recipe)
            lock.__exit__(None, None, None)

    monkeypatch.setattr(pipeline.time, "sleep", wait)
    lock = training.lock()
    with lock:
        begin(training, recipe)
        assert cli.main(["report", str(folder.path), "--watch"]) == 0
    assert [re.findall(r"the training is at step (\d+)", text) for text in seen] == [["3"], ["4"]]
    assert all('<meta http-equiv="refresh" content="10">' in text for text in seen)
    assert "The training has ended" in page(folder)
    assert 'http-equiv="refresh"' not in page(folder)


def test_watch_ends_by_ctrl_c_and_leaves_a_page_that_waits_for_nothing(
    held: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.time, "sleep", interrupt)
    assert cli.main(["report", str(held.path), "--watch"]) == 0
    assert f"the training is at step 3 of {STEPS}" in page(held)
    assert 'http-equiv="refresh"' not in page(held)


def test_watch_of_a_run_in_which_nobody_trains_is_refused(
    tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert cli.main(["report", str(tmp_path), "--watch"]) == 1
    assert "nobody trains here" in capsys.readouterr().err


@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser_the_page_fits_and_loads_itself_again(folder: RunFolder, recipe: Recipe, width: int):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")

    write_training_page(folder, recipe, "running", refresh=1)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab, asked, wrong = chromium.new_page(viewport={"width": width, "height": 900}), list[str](), list[str]()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda line: wrong.append(line.text))
        tab.goto((folder.path / PAGE).as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == width

        append(folder, log_line(4))
        write_training_page(folder, recipe, "running", refresh=1)
        heading = tab.locator(".warning b")
        playwright.expect(heading).to_have_text(re.compile("at step 4 of"), timeout=60_000)
        chromium.close()
    assert set(asked) == {(folder.path / PAGE).as_uri()}
    assert not wrong


def test_status_watch_without_a_terminal_prints_a_line_for_each_change(
    held: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    waits = list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            append(held, log_line(4))
        if len(waits) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", wait)
    assert cli.main(["status", str(held.path), "--watch"]) == 0
    lines = [re.sub(r"since \S+", "since then", text) for text in capsys.readouterr().out.splitlines()]
    assert [text for text in lines if text.startswith("distill")] == [
        f"distill  running  since then  step 3 of {STEPS}, loss 1.333, 1m14s to go",
        f"distill  running  since then  step 4 of {STEPS}, loss 1.000, 1m12s to go",
    ]
    assert len([text for text in lines if text.startswith("embed")]) == 1
    assert min(waits) >= 2


def test_a_look_that_fails_once_is_repeated_and_twice_is_an_error(
    held: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = held.path / "recipe.yaml"
    content = recipe.read_text()
    waits = list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        recipe.write_text(content if len(waits) == 2 else "no: [recipe")

    monkeypatch.setattr(cli.time, "sleep", wait)
    assert cli.main(["status", str(held.path), "--watch"]) == 2
    assert len(waits) == 4  # shown, failed, shown, failed, failed
    assert "not valid YAML" in capsys.readouterr().err
