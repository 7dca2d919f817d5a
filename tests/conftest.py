"""What all tests share: one thread, hypothesis profiles, and other made-up data on request."""

import os
import signal
from collections.abc import Iterator

import hypothesis
import other_seeds  # noqa: F401
import pytest
from threadpoolctl import threadpool_limits

# OpenMP reads these when torch is loaded; processes that tests start inherit them. The arrays are so small that threads
# only get in each other's way, and pytest-xdist has a process for every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))  # of NumPy's BLAS, which jaxtyping's plugin has loaded already

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell ignores it for a job in the background, and children inherit that: tests that interrupt would wait forever.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time; a few of them for `make quick`; others with `make test-elsewhere`; many on request.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.register_profile("quick", derandomize=True, deadline=None, max_examples=10)
hypothesis.settings.register_profile("elsewhere", deadline=None, max_examples=50, database=None)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _servers_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files elsewhere are asked for anew in each test, and again at once."""
    from clip_cid.remote import files
    from clip_cid.remote.remembered import forget

    monkeypatch.setattr(files, "WAITS", [0.0] * len(files.WAITS))
    forget()
    yield
    forget()
