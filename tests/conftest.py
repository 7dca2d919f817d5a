"""Hypothesis profiles: the same examples every time in CI, more of them on request."""

import os
import signal

import hypothesis

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; OpenMP reads it when torch is loaded

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell ignores it for a job in the background, and children inherit that: tests that interrupt would wait forever.
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
