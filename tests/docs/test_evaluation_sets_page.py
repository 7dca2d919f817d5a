"""docs/evaluation_sets.md lists what the table of tasks says."""

from pathlib import Path

from clip_cid.data.sets.known_sets import KnownSet, known_sets, load_prompts

PAGE = Path(__file__).parents[2] / "docs" / "evaluation_sets.md"
COLUMNS = "| set | also called | classes | train / val / test | metric | split | layout | licence | where to get it |"


def row(known_set: KnownSet) -> str:
    counts = " / ".join(
        f"{known_set.counts[split]:,}" if split in known_set.counts else "-" for split in ("train", "val", "test")
    )
    cells = [
        f"`{known_set.key}`",
        ", ".join(f"`{alias}`" for alias in known_set.aliases) or "-",
        f"{len(load_prompts(known_set.prompts).names):,}",
        counts,
        known_set.metric,
        known_set.split,
        f"`{known_set.layout}`" if "`" not in known_set.layout else known_set.layout,
        known_set.licence,
        known_set.where,
    ]
    return f"| {' | '.join(cells)} |"


def table_of_sets() -> str:
    return "\n".join([COLUMNS, "|" + "---|" * COLUMNS.count(" | ") + "---|", *map(row, known_sets().values())])


def test_the_page_has_every_row_of_the_table() -> None:
    assert table_of_sets() in PAGE.read_text(encoding="utf-8")
