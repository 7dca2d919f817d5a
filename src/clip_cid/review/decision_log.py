"""The file of decisions while people decide: every decision is on the disk before it is confirmed."""

import fcntl
import secrets
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clip_cid.data.balance.decisions import (
    LEAST_IMAGES,
    UNDO,
    Decision,
    Decisions,
    Image,
    Kind,
    append_line,
    parse_decisions,
)
from clip_cid.errors import DataError
from clip_cid.run_folder import now


class ContradictionError(DataError):
    """A decision says the opposite of an earlier one, which holds; nothing was saved."""

    earlier: Decision

    @classmethod
    def of(cls, kind: Kind, earlier: Decision) -> "ContradictionError":
        what = {"remove_all": "removed", "keep": "kept", "keep_all": "kept"}[earlier.kind]
        key = earlier.images[0].key
        error = cls(
            f"{kind.replace('_', ' ')}: it was decided before that {key!r} is to be {what}.",
            fix="Undo that decision first.",
        )
        error.earlier = earlier
        return error


class DecisionLog:
    """The decisions of one file, of which another process may also add lines.

    Raises:
        DataError: The file holds something else, or contradictions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._content: bytes | None = None
        self._decisions = Decisions(())
        self.read()

    def read(self) -> Decisions:
        """What holds now."""
        with self._lock:
            return self._read()

    def decide(self, kind: Kind, images: Sequence[Image]) -> Decision:
        """Save a decision; when this returns, no power cut takes it away.

        Raises:
            ContradictionError: An earlier decision says the opposite.
            ValueError: Too few images, or one twice.
            OSError: The file cannot be written; nothing is lost.
        """
        if len({*images}) != len(images) or len(images) < LEAST_IMAGES[kind]:
            raise ValueError(f"images: {kind} needs {LEAST_IMAGES[kind]} or more different ones, got {len(images)}")
        with self._writing() as decisions:
            if (earlier := decisions.against(kind, images)) is not None:
                raise ContradictionError.of(kind, earlier)
            line = Decision(secrets.token_hex(8), kind, tuple(images), now())
            append_line(self.path, line.as_json())
            return line

    def undo(self, id: str | None = None) -> Decision | None:
        """Undo a decision, by default the last one that holds; None if there is none.

        Raises:
            OSError: As `decide`.
        """
        with self._writing() as decisions:
            undone = next((line for line in reversed(decisions.lines) if id in (None, line.id)), None)
            if undone is not None:
                append_line(self.path, {"id": secrets.token_hex(8), "decision": UNDO, "of": undone.id, "at": now()})
            return undone

    @contextmanager
    def _writing(self) -> Generator[Decisions]:
        """Alone among the threads and processes that write here."""
        with self._lock, open(self.path, "ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield self._read()
            self._read()

    def _read(self) -> Decisions:
        content = self.path.read_bytes() if self.path.exists() else b""
        if content != self._content:
            self._decisions = parse_decisions(content, where=str(self.path))
            self._content = content
        return self._decisions
