import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.distill.collapse import CollapseAlarm

# A few lines of runs of benchmarks/cluster_head.py: step, L_kl, own center, mean image norm, drift.
HEALTHY = {
    "frozen head, real pairs": [
        (10, 3.692, 0.0, 0.966, 0.0),
        (30, 2.306, 0.051, 0.787, 0.0),
        (70, 1.295, 0.297, 0.349, 0.0),
        (150, 0.820, 0.449, 0.394, 0.0),
        (270, 0.447, 0.559, 0.303, 0.0),
    ],
    "trained and detached, from centers": [
        (10, 4.223, 0.008, 0.539, 0.001),
        (100, 1.355, 0.215, 0.675, 0.057),
        (500, 0.930, 0.312, 0.646, 0.180),
        (900, 0.779, 0.324, 0.571, 0.244),
        (1500, 0.704, 0.310, 0.548, 0.263),
    ],
    "trained and detached, from random rows": [
        (10, 5.360, 0.020, 0.555, 0.002),
        (90, 1.480, 0.000, 0.903, 0.078),
        (310, 1.021, 0.012, 0.850, 0.276),
        (910, 0.875, 0.004, 0.796, 0.494),
        (1500, 0.821, 0.000, 0.779, 0.525),
    ],
}
COLLAPSED = {
    "L_kl alone, from centers": [
        (10, 4.213, 0.008, 0.539, 0.001),
        (210, 0.882, 0.270, 0.646, 0.195),
        (510, 0.304, 0.156, 0.703, 0.618),
        (710, 0.075, 0.086, 0.767, 0.832),
        (910, 0.013, 0.063, 0.845, 0.904),
        (1500, 0.004, 0.023, 0.880, 0.931),
    ],
    "L_kl alone, from random rows": [
        (10, 5.352, 0.020, 0.555, 0.002),
        (110, 1.135, 0.004, 0.899, 0.091),
        (310, 0.250, 0.016, 0.883, 0.353),
        (510, 0.024, 0.008, 0.908, 0.537),
    ],
}


def messages(curve: list[tuple[float, ...]]) -> list[str]:
    """What the alarm says of the curve, drawn through at every tenth step."""
    steps, *columns = np.array(curve).T
    every = np.arange(10, steps[-1] + 1, 10)
    numbers = np.transpose([np.interp(every, steps, column) for column in columns])
    alarm = CollapseAlarm(patience=300)
    told = [
        alarm.update(int(step), cluster_kl=kl, own_center=own, mean_image_norm=norm, head_drift=drift, centers=200)
        for step, (kl, own, norm, drift) in zip(every, numbers, strict=True)
    ]
    return [message for message in told if message is not None]


@pytest.mark.parametrize("curve", HEALTHY.values(), ids=HEALTHY)
def test_nothing_is_said_of_a_healthy_run(curve):
    assert messages(curve) == []


@pytest.mark.parametrize("curve", COLLAPSED.values(), ids=COLLAPSED)
def test_a_head_that_makes_both_sides_agree_by_saying_nothing_is_told_once(curve):
    (message,) = messages(curve)
    assert message.startswith("empty agreement: L_kl fell from ")


def test_means_run():
    alarm = CollapseAlarm(patience=0)
    for step in (10, 20):
        alarm.update(step, own_center=0.8, cluster_kl=2.0 if step == 10 else 1.0, mean_image_norm=0.9)
    state = alarm.state_dict()
    assert state["own_now"] == pytest.approx(0.8 * (1 - 0.95**2))  # from 0 on
    assert (state["kl_now"], state["kl_greatest"]) == (pytest.approx(0.8 * 2 + 0.2 * 1), 2.0)  # from the first on
    assert state["norm_now"] == pytest.approx(0.9)


def test_a_mean_near_length_one_counts_only_after_the_patience():
    alarm = CollapseAlarm(patience=140)
    assert [alarm.update(step, mean_image_norm=0.97) for step in (10, 70, 130)] == [None] * 3
    message = alarm.update(140, mean_image_norm=0.97)
    assert message == "one point: the mean of the student's image embeddings has length 0.970 (above 0.95)"
    assert alarm.update(150, mean_image_norm=0.97) is None


def test_own_centers_that_are_no_longer_found_are_told_with_their_best():
    alarm = CollapseAlarm(patience=100)
    told = {step: alarm.update(step, own_center=0.6 if step <= 200 else 0.1) for step in range(1, 260)}
    ((step, message),) = ((step, message) for step, message in told.items() if message is not None)
    assert step == 232  # a mean of 0.1 + 0.5 * 0.95**n is below a third of 0.6 from n = 32 on
    assert message == "own center lost: first for 19.7 % of the images, after 60.0 %"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 64, 256])
def test_the_noise_of_small_batches_is_no_loss(batch):
    random = np.random.default_rng(batch)
    for found in (0.02, 0.1, 0.3):
        alarm = CollapseAlarm(patience=100)
        shares = random.binomial(batch, found, 3_000) / batch
        assert [alarm.update(step, own_center=share) for step, share in enumerate(shares)] == [None] * len(shares)


@pytest.mark.parametrize(
    ("own_center", "head_drift", "fires"),
    [(0.02, 0.4, True), (0.02, None, True), (0.02, 0.0, False), (0.3, 0.4, False)],
)
def test_a_small_divergence_is_empty_only_if_the_head_moved_and_own_centers_are_not_found(
    own_center, head_drift, fires
):
    alarm = CollapseAlarm(patience=1_000)
    alarm.update(1, cluster_kl=4.0, own_center=0.02, head_drift=head_drift, centers=200)
    later = range(2, 100)
    told = [
        alarm.update(step, cluster_kl=0.1, own_center=own_center, head_drift=head_drift, centers=200) for step in later
    ]
    assert any(told) == fires


def test_the_message_of_an_empty_agreement_has_its_numbers():
    alarm = CollapseAlarm(patience=100)
    alarm.update(10, cluster_kl=4.0, own_center=0.4, head_drift=0.0, centers=200)
    assert alarm.update(20, cluster_kl=0.0, own_center=0.4, head_drift=0.0, centers=200) is None
    alarm.load_state_dict({**alarm.state_dict(), "kl_now": 0.125, "own_now": 0.02})
    assert alarm.update(30, cluster_kl=0.125, own_center=0.02, head_drift=0.4, centers=200) == (
        "empty agreement: L_kl fell from 4 to 0.125, but only 2.0 % of the images have their own center first;"
        " the centers moved by 40 % of their length"
    )


def test_nothing_is_said_where_nothing_is_known():
    alarm = CollapseAlarm(patience=0)
    assert [alarm.update(step) for step in (1, 2, 3)] == [None] * 3


share = st.floats(0, 1)
lines = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "mean_image_norm": share,
            "own_center": share,
            "cluster_kl": st.floats(0, 10),
            "head_drift": share,
            "centers": st.integers(1, 1_000),
        },
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.resume
@given(lines, st.integers(0, 11))
def test_a_restored_alarm_goes_on_as_the_one_that_was_saved(curve, cut):
    whole, first, second = CollapseAlarm(patience=300), CollapseAlarm(patience=300), CollapseAlarm(patience=300)
    steps = [(100 * index, line) for index, line in enumerate(curve)]
    expected = [whole.update(step, **line) for step, line in steps]
    told = [first.update(step, **line) for step, line in steps[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert told + [second.update(step, **line) for step, line in steps[cut:]] == expected
    assert second.state_dict() == whole.state_dict()
