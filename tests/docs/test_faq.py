"""The arithmetic of docs/faq.md, done again by the functions that the program itself uses."""

import re
from pathlib import Path

import pytest
from model_costs import costs

from clip_cid import units
from clip_cid.check import estimates
from clip_cid.first_recipe import choose

PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()
PAIRS, TERAFLOPS = 10_000_000, 1e14


def row(stage: str) -> list[str]:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {stage} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def chosen() -> dict[str, int | str]:
    return {choice.setting: choice.value for choice in choose(PAIRS, 1)}


def test_the_recipe_is_the_one_that_init_writes(chosen: dict[str, int | str]):
    assert (chosen["embed.teacher"], chosen["distill.student"]) == ("ViT-L-14", "ViT-B-32")
    assert (chosen["cluster.num_centers"], chosen["distill.epochs"]) == (160_000, 20)


def test_memory_and_disk():
    least, most = estimates.balance_room(PAIRS, 768, on_cuda=False)
    assert row("embed")[3] == units.size(estimates.embedding_bytes(PAIRS, 768, views=0))
    assert row("balance")[2] == units.size(estimates.balance_memory(PAIRS))
    assert row("balance")[3] == f"{least / 1e9:.1f} to {units.size(most)} while it works"
    assert row("cluster")[2] == units.size(estimates.cluster_memory(PAIRS, 160_000, 768))
    assert row("cluster")[3] == units.size(estimates.cluster_bytes(PAIRS, 160_000, 768))


@pytest.mark.slow
def test_hours():
    teacher, student = costs("ViT-L-14"), costs("ViT-B-32")
    embed = PAIRS * teacher.forward / TERAFLOPS / 3600
    assert row("embed")[1] == f"{embed:.1f} h of a GPU: {teacher.forward / 1e9:.0f} GFLOPs a pair"
    distill = 20 * PAIRS / 2 * student.training / TERAFLOPS / 3600
    assert row("distill")[1] == (f"{distill:.1f} h of a GPU: 100 million pairs of {student.training / 1e9:.0f} GFLOPs")
    cluster = 20 * (PAIRS / 2) * 160_000 * 2.2e-9 * 1.5 / 3600
    assert row("cluster")[1] == f"{cluster:.0f} h of a core"
    assert re.match(r"20 minutes to 6 h", row("balance")[1])
    assert 10 * 77 / 60 < 20
    assert 100 * 192 / 3600 < 6
