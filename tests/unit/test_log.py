import io
import logging
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
