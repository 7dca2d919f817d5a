"""Commands of clip-cid in processes of their own, undisturbed or harmed; and how each ended."""

import dataclasses
import enum
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 120.0  # seconds; a command that takes longer hangs
MEMORY = 6 << 30  # bytes that a command may ask for


class Action(enum.IntEnum):
    """What the shim does at the k-th operation."""

    COUNT = 0
    KILL = 1
    FAIL_ONCE = 2
    FAIL_FROM_THEN_ON = 3


CHANGE, READ, REMOVE = 1, 2, 4
"""Kinds of operations on files."""


@dataclasses.dataclass(frozen=True)
class Harm:
    """What happens at the k-th operation of some kinds."""

    action: Action
    at: int = 0
    error: int = 0
    kinds: int = CHANGE | REMOVE


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Negative if a signal ended it."""
    hangs: bool
    seconds: float
    memory: int
    stdout: str
    stderr: str
    operations: tuple[str, ...]
    """What the shim has noted: `WHAT INODE SIZE PATH` each."""

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.stderr

    @property
    def is_clean_error(self) -> bool:
        """Two lines: what and where, then what to do. A message of several problems may have more."""
        return self.code in (1, 2) and not self.has_traceback and "clip-cid: " in self.stderr


class Commands:
    """The fork server, with the shim preloaded."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        shim = scratch / "shim.so"
        cc = compiler()
        assert cc is not None, "the shim needs a C compiler"
        subprocess.run([cc, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "COLUMNS": "200"}
        self._server = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._ask()

    def close(self) -> None:
        for pipe in (self._server.stdin, self._server.stdout):
            if pipe is not None:
                pipe.close()
        self._server.wait()

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        harm: Harm | None = None,
        watched: Sequence[Path] = (),
        kill_after: float | None = None,
    ) -> Ended:
        """Run one command in `folder`.

        Args:
            arguments: As behind `clip-cid`.
            folder: Where it runs.
            harm: What is done to it.
            watched: The folders whose operations count; `folder` if there are none.
            kill_after: Seconds until it is killed.
        """
        stdout, stderr, log = (self._scratch / name for name in ("stdout", "stderr", "operations"))
        log.unlink(missing_ok=True)
        done = self._ask(
            {
                "arguments": list(arguments),
                "folder": str(folder),
                "stdout": str(stdout),
                "stderr": str(stderr),
                "watched": [os.path.realpath(path) for path in watched or (folder,)],
                "harm": None if harm is None else {**dataclasses.asdict(harm), "log": str(log)},
                "kill_after": kill_after,
                "patience": PATIENCE,
                "memory": MEMORY,
            }
        )
        operations = log.read_text(errors="replace").splitlines() if log.exists() else ()
        said = (path.read_text(errors="replace") for path in (stdout, stderr))
        return Ended(**done, **dict(zip(("stdout", "stderr"), said, strict=True)), operations=tuple(operations))

    def _ask(self, job: dict[str, Any] | None = None) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        if job is not None:
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the fork server has ended"
        return json.loads(line)


def compiler() -> str | None:
    """A C compiler; None if there is none."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
