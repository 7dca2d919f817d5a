"""Ranks share the parts of a pass; threads stand in for their processes."""

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clip_cid.training.ranks import parts
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.training.ranks.parts import BLOCK_ROWS, Column, compute_by_parts, part_edges

ROWS = 23
COLUMNS = {"mean": Column(np.float32, 3), "entropy": Column(np.float64, 1)}


class Killed(BaseException):
    """Ends a rank without giving it a chance to tidy up the work of others."""


@dataclasses.dataclass(frozen=True)
class Threads(Ranks):
    """A rank that is a thread."""

    barrier: Any = None
    box: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def from_main(self, value: Any) -> Any:
        if self.is_main:
            self.box["value"] = value
        self.wait()
        return self.box["value"]

    def wait(self) -> None:
        self.barrier.wait(30)


def together(size: int, work: Callable[[Ranks], object]) -> list[BaseException]:
    """What each rank has raised, if any has."""
    barrier, box, raised = threading.Barrier(size), dict[str, Any](), list[BaseException]()

    def run(rank: int) -> None:
        try:
            work(Threads(rank, size, barrier=barrier, box=box))
        except BaseException as error:
            barrier.abort()
            raised.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def numbers_of(block: slice) -> dict[str, Tensor]:
    rows = torch.arange(block.start, block.stop, dtype=torch.float64)
    return {"mean": (rows[:, None] + torch.tensor([0.1, 0.2, 0.3])).float(), "entropy": rows.sqrt()}


def compute(
    folder: Path, ranks: Ranks = ALONE, key: str = "one", numbers: Callable[[slice], dict[str, Tensor]] = numbers_of
) -> dict[str, Any]:
    return compute_by_parts(folder, COLUMNS, numbers, rows=ROWS, key=key, what="numbers", ranks=ranks)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK_ROWS", 4)
    monkeypatch.setattr(parts, "_MOST_PARTS", 5)  # six blocks: parts of two


@given(st.integers(1, 1 << 33))
def test_parts_are_whole_blocks_that_hold_every_row_and_are_not_too_many(rows: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK_ROWS", BLOCK_ROWS)
        patch.setattr(parts, "_MOST_PARTS", 2048)
        edges = part_edges(rows)
    assert (edges[0], edges[-1]) == (0, rows)
    assert all(edge % BLOCK_ROWS == 0 for edge in edges[:-1])
    assert 1 <= len(edges) - 1 <= 2048
    lengths = {stop - start for start, stop in itertools.pairwise(edges[:-1])}
    assert len(lengths) <= 1
    assert edges[-1] - edges[-2] <= max(lengths, default=BLOCK_ROWS)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_ranks_leaves_the_bytes_of_one_and_computes_each_block_once(tmp_path: Path, size: int):
    alone, found, blocks = compute(tmp_path / "one"), dict[int, Any](), list[tuple[int, int, int]]()

    def work(ranks: Ranks) -> None:
        def noting(block: slice) -> dict[str, Tensor]:
            blocks.append((ranks.rank, block.start, block.stop))
            return numbers_of(block)

        found[ranks.rank] = compute(tmp_path / "many", ranks, numbers=noting)

    assert not together(size, work)
    assert sorted(block[1:] for block in blocks) == [(start, min(start + 4, ROWS)) for start in range(0, ROWS, 4)]
    assert len({rank for rank, *_ in blocks}) == min(size, 3)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    for one in found.values():
        for name, values in alone.items():
            np.testing.assert_array_equal(one[name][:], values[:])
    np.testing.assert_array_equal(alone["entropy"][:][:, 0], np.sqrt(np.arange(ROWS)))


@pytest.mark.resume
def test_what_killed_ranks_have_finished_is_taken_up_by_another_number_of_ranks(tmp_path: Path):
    compute(tmp_path / "whole")

    def killed(ranks: Ranks) -> None:
        def numbers(block: slice) -> dict[str, Tensor]:
            if ranks.rank == 1 and block.start == 12:
                raise Killed
            return numbers_of(block)

        compute(tmp_path / "cut", ranks, numbers=numbers)

    assert any(isinstance(error, Killed) for error in together(3, killed))
    (tmp_path / "cut" / ".mean-0001.npy.tmp-elsewhere-1").write_bytes(b"of a rank that was killed")
    left = {name for name in contents(tmp_path / "cut") if name.startswith("mean")}
    assert "mean-0001.npy" not in left

    blocks: list[int] = []

    def resumed(ranks: Ranks) -> None:
        def numbers(block: slice) -> dict[str, Tensor]:
            blocks.append(block.start)
            return numbers_of(block)

        compute(tmp_path / "cut", ranks, numbers=numbers)

    assert not together(2, resumed)
    assert {8, 12} <= set(blocks)
    assert len(blocks) == sum(2 for part in range(3) if f"mean-{part:04d}.npy" not in left)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_part_with_one_of_its_files_is_computed_again(tmp_path: Path):
    compute(tmp_path / "cut")
    whole = contents(tmp_path / "cut")
    (tmp_path / "cut" / "mean-0001.npy").unlink()
    blocks: list[int] = []

    def noting(block: slice) -> dict[str, Tensor]:
        blocks.append(block.start)
        return numbers_of(block)

    compute(tmp_path / "cut", numbers=noting)
    assert blocks == [8, 12]
    assert contents(tmp_path / "cut") == whole


def test_parts_of_another_key_are_removed(tmp_path: Path):
    compute(tmp_path / "pass", key="other", numbers=lambda block: {n: v + 1 for n, v in numbers_of(block).items()})
    compute(tmp_path / "pass")
    compute(tmp_path / "plain")
    assert contents(tmp_path / "pass") == contents(tmp_path / "plain")


@pytest.mark.resume
@pytest.mark.parametrize(("rows", "taken"), [(ROWS, True), (8, False)], ids=["finished", "unfinished"])
def test_what_a_version_without_parts_has_finished_is_taken_up(tmp_path: Path, rows: int, taken: bool):
    whole = compute(tmp_path / "plain")
    older = tmp_path / "older"
    older.mkdir()
    np.save(older / "mean.npy", whole["mean"][:])
    np.save(older / "entropy.npy", whole["entropy"][:][:, 0])
    (older / "done.json").write_text(json.dumps({"key": "one", "rows": rows}))

    def unexpected(block: slice) -> dict[str, Tensor]:
        raise AssertionError("it was finished")

    for _ in range(2):
        found = compute(older, numbers=unexpected if taken else numbers_of)
        for name, values in whole.items():
            np.testing.assert_array_equal(found[name][:], values[:])
    assert not {"mean.npy", "entropy.npy", "done.json"} & set(contents(older))
