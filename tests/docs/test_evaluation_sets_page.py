"""docs/evaluation_sets.md lists what the table of known sets says."""

import re
from pathlib import Path

import pytest

from clip_cid.data.sets.known_sets import KnownSet, known_sets, load_prompts

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation_sets.md").read_text(encoding="utf-8")
SETS = pytest.mark.parametrize("known_set", known_sets().values(), ids=lambda known_set: known_set.key)


@SETS
def test_the_table_has_the_sets_numbers(known_set: KnownSet) -> None:
    counts = known_set.counts
    cells = [
        f"`{known_set.key}`",
        ", ".join(f"`{alias}`" for alias in known_set.aliases) or "-",
        f"{len(load_prompts(known_set.prompts).names):,}",
        " / ".join(f"{counts[split]:,}" if split in counts else "-" for split in ("train", "val", "test")),
        known_set.metric,
    ]
    assert f"\n| {' | '.join(cells)} |\n" in PAGE


@SETS
def test_the_list_has_the_sets_words(known_set: KnownSet) -> None:
    layout = known_set.layout if "`" in known_set.layout else f"`{known_set.layout}`"
    entry = (
        f"- **`{known_set.key}`**: {known_set.split}. Layout: {layout}. Licence: {known_set.licence}."
        f" Where: {known_set.where}."
    )
    assert entry in re.sub(r"\s+", " ", PAGE)
