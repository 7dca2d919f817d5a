import io
import logging
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
