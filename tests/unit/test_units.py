"""Numbers as people read them."""

import pytest

from clip_cid import units


def test_a_share_stands_in_percent_in_a_sentence_and_in_a_table():
    assert (units.percent(0.4367), units.percent(0.4367, 0), units.percent(0.4367, 2)) == ("43.7 %", "44 %", "43.67 %")
    assert (units.in_percent(0.12345), units.in_percent(None)) == ("12.3", "-")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4.86e6, "4.9 MB"), (2e9, "2.0 GB"), (1.5e15, "1,500.0 TB")],
)
def test_bytes_of_files_are_decimal(count: float, words: str):
    assert units.size(count) == words


def test_bytes_of_memory_are_binary():
    assert units.memory(3 << 29) == "1.5 GiB"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0s"), (8.24, "8.2s"), (60, "1m00s"), (192.9, "3m12s"), (3600, "1h00m"), (7500, "2h05m")],
)
def test_a_time_has_the_two_units_that_matter(seconds: float, words: str):
    assert units.duration(seconds) == words


def test_one_of_a_thing_has_no_s():
    assert [units.counted(count, "set") for count in (0, 1, 2000)] == ["0 sets", "1 set", "2,000 sets"]
