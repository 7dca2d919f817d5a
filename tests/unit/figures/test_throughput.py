import csv
from pathlib import Path

import numpy as np

from clip_cid.figures import throughput


def test_a_validations_lines_are_passed_over_and_the_numbers_are_those_of_the_others(tmp_path: Path) -> None:
    nan = np.nan
    metrics = {
        "step": np.array([10.0, 10.0, 20.0, 30.0]),
        "pairs_per_s": np.array([100.0, nan, 300.0, 200.0]),
        "data_wait_share": np.array([0.5, nan, 0.0, 0.25]),
        "skipped_steps": np.array([0.0, nan, 1.0, 2.0]),
    }
    numbers = throughput.draw(metrics, tmp_path)
    assert numbers == {
        "median_pairs_per_s": 200.0,
        "slowest_pairs_per_s": 100.0,
        "fastest_pairs_per_s": 300.0,
        "median_wait_share": 0.25,
        "largest_wait_share": 0.5,
        "skipped_steps": 2,
    }
    with open(tmp_path / "throughput.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["step"] for line in lines] == ["10", "20", "30"]
    assert (tmp_path / "throughput.svg").is_file()
