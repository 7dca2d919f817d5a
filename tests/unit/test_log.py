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
