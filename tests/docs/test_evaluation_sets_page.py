"""docs/evaluation_sets.md lists what the table of tasks says."""

from pathlib import Path

from clip_cid.data.sets.known_sets import Task, load_prompts, task_table

PAGE = Path(__file__).parents[2] / "docs" / "evaluation_sets.md"
COLUMNS = "| set | also called | classes | train / val / test | metric | split | layout | licence | where to get it |"


def row(task: Task) -> str:
    counts = " / ".join(
        f"{task.counts[split]:,}" if split in task.counts else "-" for split in ("train", "val", "test")
    )
    cells = [
        f"`{task.key}`",
        ", ".join(f"`{alias}`" for alias in task.aliases) or "-",
        f"{len(load_prompts(task.prompts).names):,}",
        counts,
        task.metric,
        task.split,
        f"`{task.layout}`" if "`" not in task.layout else task.layout,
        task.licence,
        task.where,
    ]
    return f"| {' | '.join(cells)} |"


def table_of_sets() -> str:
    return "\n".join([COLUMNS, "|" + "---|" * COLUMNS.count(" | ") + "---|", *map(row, task_table().values())])


def test_the_page_has_every_row_of_the_table() -> None:
    assert table_of_sets() in PAGE.read_text(encoding="utf-8")
