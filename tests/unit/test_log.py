import io
import logging
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from clip_cid import log


@pytest.mark.parametrize("quiet", [False, True])
def test_of_several_processes_only_the_first_speaks_and_shows_a_bar(monkeypatch: pytest.MonkeyPatch, quiet: bool):
    said = io.StringIO()
    logger = logging.Logger("as if new")
    monkeypatch.setattr(log, "_console", Console(file=said, force_terminal=True))
    monkeypatch.setattr(log, "_logger", logger)
    log.setup(quiet=quiet)
    with log.progress("distill", 10) as bar:
        bar.advance(5, note="a note")
        log.info("a line")
        log.warn("a warning")
    words = [word in said.getvalue() for word in ("a line", "a warning", "a note", "5/10")]
    assert words == [not quiet] * 4


def test_a_command_longer_than_the_terminal_can_be_copied_and_no_work_has_no_bar(monkeypatch: pytest.MonkeyPatch):
    said, command = io.StringIO(), 'open_clip.create_model_and_transforms("local-dir:' + "/long/path" * 20 + '")'
    monkeypatch.setattr(log, "_console", log._plain_console(file=said, force_terminal=True, width=80))
    monkeypatch.setattr(log, "_logger", logging.Logger("as if new"))
    log.setup()
    with log.progress("read", 0):
        log.info(command)
    assert said.getvalue() == f"{command}\n"


def test_a_log_file_that_cannot_be_written_is_said_once_and_stops_nothing(caplog: pytest.LogCaptureFixture):
    with log.to_file(Path("/dev/full")):
        for number in range(3):
            log.info(f"line {number}")
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "/dev/full: cannot be written ([Errno 28] No space left on device)" in caplog.text


NAMES = ["[/x] y", "[red]", "a [b] c", "[[", "\\[bold]", "[link=file:x]y[/link]"]


def test_brackets_in_names_are_letters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    log.table(["model", NAMES[0]], [[name, "1"] for name in NAMES], title=NAMES[1])
    for name in NAMES:
        log.say(name)
    out = capsys.readouterr().out
    assert all(out.count(name) >= 2 for name in NAMES)

    shown = io.StringIO()
    logger = logging.Logger("as if new")
    monkeypatch.setattr(log, "_console", Console(file=shown, force_terminal=True, width=200))
    monkeypatch.setattr(log, "_logger", logger)
    log.setup()
    for name in NAMES:
        with log.progress(f"embed {name}", 10) as bar:
            bar.advance(5, note=f"note of {name}")
        log.info(f"info of {name}")
        log.warn(f"warning of {name}")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    for name in NAMES:
        assert all(f"{kind} {name}" in plain for kind in ("embed", "note of", "info of", "warning of")), name


TEXTS = ["[/x] y", "[bold]x[/bold]", ":cat: [red]", "[link=https://x]y", "\\[x]", "100 %s {x}"]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_shown_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, terminal: bool
):
    """In tables, answers, messages and progress, on a terminal and elsewhere."""
    said = io.StringIO()
    monkeypatch.setattr(log, "_console", log._plain_console(file=said, force_terminal=terminal, width=200))
    monkeypatch.setattr(log, "_logger", logging.Logger("as if new"))
    log.setup()
    log.table(["set", name], [[name, "1"]], title=name)
    log.say(name)
    log.info(f"info {name}")
    log.warn(f"warn {name}")
    with log.progress(name, 10) as bar:
        bar.advance(5, note=f"note {name}")
    out = capsys.readouterr().out
    assert out.count(name) == 4
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.getvalue())
    assert f"info {name}" in plain
    assert f"warn {name}" in plain
    assert (f"note {name}" in plain) == terminal


def test_control_characters_and_undecodable_bytes_are_written_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    name = os.fsdecode(b"a\xff\x1b[31m\rb\x07")
    caplog.set_level("INFO", logger="clip_cid")
    with log.to_file(tmp_path / "run.log"):
        log.info(name)
    log.table(["name"], [[name]])
    log.say(name)
    expected = r"a\udcff\x1b[31m\x0db\x07"
    assert expected in (tmp_path / "run.log").read_text()
    assert capsys.readouterr().out.count(expected) == 2


@pytest.mark.parametrize("what", ["distill", "features ViT-bigG-14/laion2b_s39b_b160k imagenet1k"])
@pytest.mark.parametrize("total", [9, 400_000_000])
@pytest.mark.parametrize(
    "note", ["", "loss 3.21, clip 2.1, cluster_cls 1.02, cluster_kl 0.4, instance_image 3.3, lr 1e-3"]
)
@pytest.mark.parametrize("width", [80, 120, 200])
def test_bar_count_and_time_left_are_shown_whatever_the_note(
    monkeypatch: pytest.MonkeyPatch, what: str, total: int, note: str, width: int
):
    shown, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(log, "_console", Console(file=shown, force_terminal=True, width=width))
    monkeypatch.setattr(log, "_logger", logging.Logger("as if new"))
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    log.setup()
    with log.progress(what, total) as bar:
        clock[0] = 120.0  # slower than the seconds in which a speed is usually measured
        bar.advance(total // 3, note=note)

    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    last = [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]
    assert len(last) <= width
    assert f"{total // 3:,}/{total:,}" in last
    assert "0:04:00 left" in last
    assert "━" * 4 in last
    assert what[:15] in last
    if width == 200:
        assert note[:50] in last


def test_the_time_left_is_not_told_before_there_is_a_speed(monkeypatch: pytest.MonkeyPatch):
    shown = io.StringIO()
    monkeypatch.setattr(log, "_console", Console(file=shown, force_terminal=True, width=80))
    monkeypatch.setattr(log, "_logger", logging.Logger("as if new"))
    log.setup()
    with log.progress("embed", 10, start=5) as bar:
        bar.advance(0, note="reading")
    assert "-:--:-- left" in shown.getvalue()


@pytest.mark.parametrize(("width", "height", "whole"), [(200, 50, True), (80, 24, False), (60, 14, False)])
def test_a_table_that_changes_fits_a_low_terminal_with_every_row(width: int, height: int, whole: bool):
    rows = [[f"stage-{number}", "done", "", "2026-11-30T22:39:41+00:00, 30.0s", "words " * 20] for number in range(8)]
    out = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    shown = log._fitting(out, ["stage", "status", "reason", "made", "result"], rows, "RUN")
    lines = ["".join(part.text for part in line) for line in out.render_lines(shown)]
    assert len(lines) < height
    assert all(any(f"stage-{number}" in line and "done" in line for line in lines) for number in range(8))
    assert any("reason" in line for line in lines) == whole
