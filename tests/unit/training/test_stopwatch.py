import time
from collections.abc import Iterator

import pytest

from clip_cid.training.stopwatch import Stopwatch


def slow(count: int) -> Iterator[int]:
    for number in range(count):
        time.sleep(0.02)
        yield number


def test_only_the_time_until_a_batch_is_there_counts_as_waiting():
    watch = Stopwatch()
    for _ in watch.waiting(slow(3)):
        time.sleep(0.04)
    assert 0.06 <= watch.waited < watch.seconds - 0.1
    assert watch.wait_share == pytest.approx(watch.waited / watch.seconds, rel=0.1)


@pytest.mark.resume
def test_a_resumed_watch_continues_and_a_lap_counts_from_the_last_one():
    watch = Stopwatch()
    watch.load_state_dict({"seconds": 100.0, "waited": 7.0})
    watch.lap(50)
    time.sleep(0.01)
    seconds, waited, steps = watch.lap(53)
    assert 0.01 <= seconds < 50
    assert (waited, steps) == (0.0, 3)
    assert watch.seconds > 100
    assert watch.state_dict() == {"seconds": pytest.approx(watch.seconds, abs=5), "waited": 7.0}
    assert watch.lap(60)[2] == 7
