"""The distribution of the last layer's weights."""

import csv
from pathlib import Path

import numpy as np
import pytest

from clip_cid.figures import weights


def columns(path: Path) -> dict[str, list[str]]:
    with open(path, newline="") as handle:
        lines = list(csv.DictReader(handle))
    return {name: [line[name] for line in lines] for name in lines[0]}


def test_the_last_block_is_the_one_with_the_highest_number() -> None:
    names = [f"visual.transformer.resblocks.{block}.mlp.c_proj.weight" for block in (0, 9, 10)]
    assert weights.last_layer([*names, "transformer.resblocks.11.mlp.c_proj.weight"]) == names[2]
    assert weights.last_layer(["visual.trunk.blocks.0.mlp.fc2.weight"]) is None


def test_two_points_have_the_least_kurtosis_there_is() -> None:
    found = weights.describe(np.array([-0.5, 0.5, -0.5, 0.5]))
    assert found == {"std": 0.5, "excess_kurtosis": pytest.approx(-2), "near_zero_share": 0}


def test_weights_that_are_all_equal_are_refused() -> None:
    with pytest.raises(ValueError, match=r"all 3 are equal to 0\.5"):
        weights.describe(np.full(3, 0.5))


def test_no_weight_falls_out_of_the_histogram(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    models = {"student": random.normal(size=500), "baseline": 3 * random.standard_t(3, size=500)}
    weights.draw(models, tmp_path)
    table = {name: np.array(values, dtype=float) for name, values in columns(tmp_path / "weights.csv").items()}
    width = table["to"] - table["from"]
    for name, values in models.items():
        assert float(table[name] @ width) == pytest.approx(1)
        assert np.histogram(values, np.append(table["from"], table["to"][-1]), density=True)[0] == pytest.approx(
            table[name]
        )
