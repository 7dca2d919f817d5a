"""The README's table of costs: the arithmetic again, by the functions that the program itself uses."""

from pathlib import Path

import pytest
from model_costs import costs

from clip_cid import units
from clip_cid.check import estimates

README = (Path(__file__).parents[2] / "README.md").read_text()
FAQ = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()
TERAFLOPS, KEPT, EPOCHS = 1e14, 0.563, 32


def row(pairs: str) -> list[str]:
    line = next(line for line in README.splitlines() if line.startswith(f"| {pairs} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_cost_says_how_it_is_known():
    for pairs in ("10 thousand", "10 million", "400 million"):
        assert all(cell.endswith(("(measured)", "(arithmetic)", "hours not known")) for cell in row(pairs)[1:3])


def test_ten_thousand_and_ten_million():
    assert row("10 thousand")[3] == units.size(estimates.embedding_bytes(10_000, 768, views=0))
    of_balance, of_training = row("10 million")[1:3]
    assert of_balance == f"20 minutes to 6 h of a core, {units.size(estimates.balance_memory(10_000_000))} (arithmetic)"
    assert "20 minutes to 6 h of a core" in FAQ  # whose hours have a test of their own
    assert "| embed | 4.9 h of a GPU" in FAQ
    assert "| distill | 12.3 h of a GPU" in FAQ
    assert of_training == "4.9 + 12.3 h of a GPU (arithmetic)"
    assert row("10 million")[3] == units.size(estimates.embedding_bytes(10_000_000, 768, views=0))


@pytest.mark.slow
def test_four_hundred_million():
    pairs = 400_000_000
    embed = pairs * costs("ViT-bigG-14").forward / TERAFLOPS / 3600
    distill = EPOCHS * KEPT * pairs * costs("ViT-B-32").training / TERAFLOPS / 3600
    assert row("400 million")[1:] == [
        f"{units.size(estimates.balance_memory(pairs))} (arithmetic); hours not known",
        f"{embed:,.0f} + {distill:,.0f} h of a GPU (arithmetic)",
        units.size(estimates.embedding_bytes(pairs, 1280, views=0)),
    ]
