import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.distill.gradient_weights import LARGEST_FACTOR, weights_by_gradients

names = st.sampled_from(["clip", "icl", "feature", "affinity"])
positive = st.floats(0.01, 100.0)


@given(st.dictionaries(names, st.tuples(positive, positive), min_size=1))
def test_weighted_norms_have_the_proportions_of_the_weights_and_their_sum_stays(
    of_each: dict[str, tuple[float, float]],
):
    weights, norms = ({name: pair[which] for name, pair in of_each.items()} for which in (0, 1))
    found = weights_by_gradients(weights, norms)
    total = sum(weights[name] * norms[name] for name in weights)
    for name, weight in weights.items():
        assert found[name] * norms[name] == pytest.approx(total * weight / sum(weights.values()), rel=1e-12)


@given(st.dictionaries(names, st.tuples(positive, positive), min_size=1), st.floats(0.1, 10.0), names)
def test_the_size_of_a_loss_does_not_matter(of_each: dict[str, tuple[float, float]], size: float, name: str):
    """A loss ten times as large has a tenth of the weight, and the others keep their proportions."""
    weights, norms = ({name: pair[which] for name, pair in of_each.items()} for which in (0, 1))
    if name not in weights:
        return
    before = weights_by_gradients(weights, norms)
    after = weights_by_gradients(weights, {**norms, name: size * norms[name]})
    shares = [
        {one: found[one] * norms[one] * (size if one == name and found is after else 1.0) for one in weights}
        for found in (before, after)
    ]
    for one in weights:
        ours, theirs = (share[one] / math.fsum(share.values()) for share in shares)
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_loss_that_does_not_pull_is_left_alone_and_does_not_count():
    weights = {"clip": 1.0, "icl": 3.0, "feature": 2.0, "affinity": 0.0}
    found = weights_by_gradients(weights, {"clip": 4.0, "icl": 1.0, "feature": 0.0, "affinity": 5.0})
    assert found == {"clip": pytest.approx(7 / 16), "icl": pytest.approx(21 / 4), "feature": 2.0, "affinity": 0.0}
    assert weights_by_gradients(weights, {}) == weights
    assert weights_by_gradients(weights, dict.fromkeys(weights, 0.0)) == weights


def test_a_factor_has_limits():
    found = weights_by_gradients({"clip": 1.0, "icl": 1.0}, {"clip": 1.0, "icl": 1e-30})
    assert found["icl"] == LARGEST_FACTOR
    assert weights_by_gradients({"clip": 1e-9, "icl": 1.0}, {"clip": 1e30, "icl": 1.0})["clip"] >= 1e-9 / LARGEST_FACTOR
