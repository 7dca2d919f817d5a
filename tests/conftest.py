"""Hypothesis profiles: the same examples every time in CI, more of them on request."""

import os

import hypothesis

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; OpenMP reads it when torch is loaded

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
