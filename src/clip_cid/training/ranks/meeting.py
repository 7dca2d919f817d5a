"""Where the processes of torchrun meet before they work together, and where one that ends leaves word for the others.

Both go through torchrun's own store of names and values, which needs no connection between the processes yet.
"""

import contextlib
import datetime
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from clip_cid import os_errors
from clip_cid.errors import ClipCidError, RunError
from clip_cid.tasks import Place

_MEETING = datetime.timedelta(seconds=90)  # torchrun starts all at once; a slow disk delays the imports of one
_WORK = datetime.timedelta(days=365)
_LAST_WORDS = 5.0  # seconds
_STUCK = 15.0  # seconds until a process is ended that still waits for one that has ended
_CONNECTIONS = re.compile(r"gloo|nccl", re.IGNORECASE)
_TOGETHER = (
    "Start the same torchrun command on every machine, with one number of machines and one address that all reach; a"
    " process that has ended says why in its own output."
)


class Meeting:
    """All processes of one torchrun, each with its host. Each listens for the word of one that ends.

    Args:
        place: Of this process.

    Raises:
        RunError: Some have not come within a minute and a half.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        names = [f"here/{rank}" for rank in range(place.size)]
        store: Store | None = None
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=_MEETING)))  # pyright: ignore[reportPrivateImportUsage]
            store.set(names[place.rank], json.dumps({"host": socket.gethostname(), "cuda": _has_cuda()}))
            store.wait(names, _MEETING)
            self._here = [json.loads(store.get(name)) for name in names]
        except (dist.DistError, RuntimeError) as error:
            raise RunError(
                f"rank {place.rank} of {place.size} on {socket.gethostname()}: {_who_is_missing(store, names)}.",
                fix=_TOGETHER,
            ) from error
        self.store = store

        # Who waits for others cannot listen.
        self._is_standing, self._over = False, threading.Event()
        self._words: dict[str, Any] = {}
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._ended, self._heard = f"clip-cid/{attempt}/ended", f"clip-cid/{attempt}/heard"
        self._listener = threading.Thread(target=self._listen, args=(_line(),), daemon=True)
        self._listener.start()

    @property
    def all_have_cuda(self) -> bool:
        return all(one["cuda"] for one in self._here)

    def tell(self, error: BaseException) -> None:
        """Leave word of the error that ends this process; only the first one counts."""
        self._over.set()
        known = os_errors.explain(error) if isinstance(error, Exception) else None
        if isinstance(error, ClipCidError):
            known = error
        problem = known.problem if known is not None else f"{type(error).__name__}: {error}"
        fix = known.fix if known is not None else "Look at the output of that process."
        self._spread({"rank": self._place.rank, "problem": problem, "fix": fix})

    def stand(self) -> None:
        """All are connected with each other: from now on one that is gone is noticed without the store."""
        self._is_standing = True

    def end(self) -> None:
        """All processes are here for the last time."""
        self._over.set()
        self._spread({})

    def first_error(self) -> RunError:
        """The error of the rank that ended first, as far as it has left word."""
        self._over.set()
        self._listener.join(_LAST_WORDS)
        return self._error()

    def _error(self) -> RunError:
        words = self._words
        if not words:
            return RunError(
                f"rank {self._place.rank} of {self._place.size} lost another process, which was killed or whose"
                " machine or network failed.",
                fix="Look at the output of the others, then run the same command again; it resumes.",
            )
        rank = words["rank"]
        return RunError(f"rank {rank} on {self._here[rank]['host']} has ended: {words['problem']}", fix=words["fix"])

    def _spread(self, words: dict[str, Any]) -> None:
        """Leave word, if nobody has, and stay until all have heard: the store may end with this process."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            line, deadline = _line(), time.monotonic() + _LAST_WORDS
            line.compare_set(self._ended, "", json.dumps(words))
            while line.add(self._heard, 0) < self._place.size and time.monotonic() < deadline:
                time.sleep(0.02)

    def _listen(self, line: Store) -> None:
        with contextlib.suppress(RuntimeError):  # the store has ended
            line.wait([self._ended], _WORK)
            self._words = json.loads(line.get(self._ended))
            line.add(self._heard, 1)

        # A connection that is half made, or a device that waits for another's, does not notice that one is gone.
        if (self._words or not self._is_standing) and not self._over.wait(_STUCK):
            error = self._error()
            sys.stderr.write(f"clip-cid: {error.problem}\n{error.fix}\n")
            sys.stderr.flush()
            os._exit(error.exit_code)


def is_of_another_rank(error: BaseException | None) -> bool:
    """Whether an error says no more than that another process is gone."""
    while error is not None and not isinstance(error, ClipCidError):
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _CONNECTIONS.search(str(error))):
            return True
        error = error.__cause__
    return False


def _line() -> Store:
    """A connection to the store of its own: one on which somebody listens serves nobody else."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_MEETING)


def _has_cuda() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


def _who_is_missing(store: Store | None, names: list[str]) -> str:
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    within = f"within {_MEETING.total_seconds():g} seconds"
    if store is None:
        return f"not all processes came to {where} {within}"
    try:
        missing = [rank for rank, name in enumerate(names) if not store.check([name])]
    except RuntimeError:  # the store is in the process of rank 0, or in torchrun's own
        return f"the process at {where} that all meet through has ended, before all had come {within}"
    if not missing:
        return f"lost the connection to {where}"
    return f"rank {', '.join(map(str, missing))} did not come {within}"
