"""The shards of a spread head: any number of ranks resumes from what any other number wrote."""

import itertools
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_cid.errors import RunError
from clip_cid.method.distill.cluster_distillation import CenterHead, Shard
from clip_cid.run_folder import atomic_file
from clip_cid.training.optimizer import RowAdam
from clip_cid.training.ranks import head_shards
from clip_cid.training.ranks.head_shards import load_rows, num_rows, save_shard, write_rows

TOTAL = 11
ROWS = {
    "weight": torch.randn(TOTAL, 3, generator=torch.Generator().manual_seed(0)),
    "first": torch.randn(TOTAL, 3, generator=torch.Generator().manual_seed(1)),
    "second": torch.rand(TOTAL, 3, generator=torch.Generator().manual_seed(2)),
    "steps": torch.arange(TOTAL, dtype=torch.int32),
}


def write(folder: Path, bounds: list[tuple[int, int]], **changed) -> None:
    for rank, (first, stop) in enumerate(bounds):
        rows = {name: value[first:stop] for name, value in ROWS.items()}
        write_rows(folder, rows, first=first, total=TOTAL, rank=rank, ranks=len(bounds), **changed)


def spread(ranks: int, total: int = TOTAL) -> list[tuple[int, int]]:
    return [Shard.bounds(total, rank, ranks) for rank in range(ranks)]


def name_of(rank: int, ranks: int) -> str:
    return f"head-{rank:05d}-of-{ranks:05d}.safetensors"


@pytest.mark.resume
@pytest.mark.parametrize(("before", "after"), list(itertools.product((1, 2, 3, 4, 13), repeat=2)))
def test_any_number_of_ranks_goes_on_from_any_other(tmp_path: Path, before, after):
    """13 ranks for 11 centers: some have none, as writer and as reader."""
    write(tmp_path, spread(before))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name_of(rank, before) for rank in range(before)]
    assert num_rows(tmp_path) == TOTAL
    for first, stop in spread(after):
        found = load_rows(tmp_path, first, stop)
        assert found.keys() == ROWS.keys()
        for name, rows in found.items():
            assert torch.equal(rows, ROWS[name][first:stop])
            assert rows.dtype == ROWS[name].dtype


def test_shards_may_be_of_any_length_and_in_any_order_of_ranks(tmp_path: Path):
    write(tmp_path, [(4, 11), (0, 0), (0, 1), (1, 4)])
    assert torch.equal(load_rows(tmp_path, 0, 11)["weight"], ROWS["weight"])
    assert torch.equal(load_rows(tmp_path, 3, 5)["steps"], ROWS["steps"][3:5])


def test_a_head_and_its_optimizer_come_back_from_the_file(tmp_path: Path):
    head = CenterHead(torch.eye(4)[:3], trainable=True, sparse=True)
    optimizer = RowAdam([head.weight], lr=0.1)
    head.rows(torch.tensor([0, 2])).sum().backward()
    optimizer.step()
    save_shard(tmp_path, head, optimizer.state[head.weight], step=1)
    found = load_rows(tmp_path, 0, 3)
    assert torch.equal(found.pop("weight"), head.weight)
    assert found.keys() == optimizer.state[head.weight].keys() == {"first", "second", "steps"}
    assert all(torch.equal(value, optimizer.state[head.weight][name]) for name, value in found.items())


def test_a_frozen_head_is_its_rows_alone(tmp_path: Path):
    path = save_shard(tmp_path, CenterHead(torch.eye(4)[:3]), None)
    assert path.name == "head-00000-of-00001.safetensors"
    assert load_file(path).keys() == {"weight"}


def test_half_precision_rows_stay_what_they_are(tmp_path: Path):
    write_rows(tmp_path, {"weight": ROWS["weight"].bfloat16()}, first=0, total=TOTAL, rank=0, ranks=1)
    assert load_rows(tmp_path, 2, 5)["weight"].dtype == torch.bfloat16


@pytest.mark.resume
def test_a_killed_write_leaves_the_shard_of_before(tmp_path: Path, monkeypatch):
    write(tmp_path, spread(2), step=1)

    def torn(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(head_shards, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, spread(2), step=2)
    assert torch.equal(load_rows(tmp_path, 0, TOTAL)["weight"], ROWS["weight"])


# What is refused


def refused(folder: Path, words: str, first: int = 0, stop: int = TOTAL) -> None:
    with pytest.raises(RunError, match=words) as error:
        load_rows(folder, first, stop)
    assert str(folder) in error.value.problem
    assert error.value.fix == f"Delete {folder} to resume from what was saved before it, or train from the start."


def test_a_folder_without_shards_is_named(tmp_path: Path):
    refused(tmp_path, "there are no shards of a head")
    refused(tmp_path / "nowhere", "there are no shards of a head")


def test_missing_shards_are_named_by_their_ranks(tmp_path: Path):
    write(tmp_path, spread(4))
    (tmp_path / name_of(1, 4)).unlink()
    refused(tmp_path, "3 of 4 shards; missing: 1")
    (tmp_path / name_of(3, 4)).unlink()
    refused(tmp_path, "2 of 4 shards; missing: 1, 3", stop=1)


def test_shards_of_two_world_sizes_are_not_one_head(tmp_path: Path):
    write(tmp_path, spread(2))
    write(tmp_path, spread(4))
    refused(tmp_path, "there are shards of 2 and of 4 ranks")


def test_shards_of_two_moments_are_not_one_head(tmp_path: Path):
    write(tmp_path, spread(2), step=400)
    first = (tmp_path / name_of(0, 2)).read_bytes()
    write(tmp_path, spread(2), step=800)
    (tmp_path / name_of(0, 2)).write_bytes(first)
    refused(tmp_path, f"{name_of(1, 2)}: step 800, but {name_of(0, 2)} has 400")


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([(0, 6), (5, 11)], "the shards overlap: it begins at row 5 where 6 comes next"),
        ([(0, 6), (0, 11)], "the shards overlap: it begins at row 0 where 6 comes next"),
        ([(0, 6), (7, 11)], "the shards leave a gap: it begins at row 7 where 6 comes next"),
        ([(1, 6), (6, 11)], "the shards leave a gap: it begins at row 1 where 0 comes next"),
        ([(0, 6), (6, 10)], "the shards hold 10 of 11 centers"),
    ],
)
def test_every_center_is_there_exactly_once(tmp_path: Path, bounds, words):
    write(tmp_path, bounds)
    refused(tmp_path, words, stop=1)


def test_shards_agree_on_the_number_of_centers(tmp_path: Path):
    write(tmp_path, spread(2))
    rows = {name: value[5:] for name, value in ROWS.items()}
    write_rows(tmp_path, rows, first=5, total=TOTAL + 1, rank=1, ranks=2)
    refused(tmp_path, f"{name_of(1, 2)}: total 12, but {name_of(0, 2)} has 11")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": torch.zeros(6, 4)}, r"weight F32 \[4\], but .* has .*weight F32 \[3\]"),
        ({"weight": torch.zeros(6, 3).half()}, r"weight F16 \[3\], but"),
        ({"third": torch.zeros(6)}, r"third F32 \[\]"),
    ],
)
def test_shards_agree_on_what_they_keep_of_a_row(tmp_path: Path, changed, words):
    write(tmp_path, spread(2))
    rows = {name: value[5:] for name, value in ROWS.items()}
    write_rows(tmp_path, {**rows, **changed}, first=5, total=TOTAL, rank=1, ranks=2)
    refused(tmp_path, words)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_shard_that_was_cut_short_is_named(tmp_path: Path, keep):
    write(tmp_path, spread(3))
    path = tmp_path / name_of(2, 3)
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, rf"{re.escape(path.name)}: cannot be read \(", stop=1)


def test_a_file_that_is_no_shard_or_of_another_version_is_refused(tmp_path: Path):
    path = tmp_path / name_of(0, 1)
    save_file({"weight": ROWS["weight"]}, path)
    refused(tmp_path, "not a shard of a head, or of another version")
    write(tmp_path, spread(1))
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    about = header["__metadata__"]["clip_cid_head_shard"]
    header["__metadata__"]["clip_cid_head_shard"] = about.replace('"format": 1', '"format": 2')
    path.write_bytes(content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(size) + content[8 + size :])
    refused(tmp_path, "not a shard of a head, or of another version")


@pytest.mark.parametrize(("first", "stop"), [(0, 12), (-1, 3), (5, 4)])
def test_rows_that_the_head_does_not_have_are_refused(tmp_path: Path, first, stop):
    write(tmp_path, spread(2))
    refused(tmp_path, f"rows {first} to {stop} are wanted, but the head has 11", first, stop)


@pytest.mark.parametrize(
    ("first", "rank", "ranks"),
    [(1, 0, 1), (-1, 0, 1), (0, 1, 1), (0, -1, 1)],
    ids=["late", "early", "rank", "negative"],
)
def test_a_shard_that_cannot_be_is_not_written(tmp_path: Path, first, rank, ranks):
    with pytest.raises(ValueError, match=f"of 11 cannot be those of rank {rank} of {ranks}"):
        write_rows(tmp_path, ROWS, first=first, total=TOTAL, rank=rank, ranks=ranks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kept", "shape"), [(torch.tensor(7), r"\(\)"), (torch.zeros(3), r"\(3,\)")])
def test_what_the_optimizer_does_not_keep_by_row_cannot_be_spread(tmp_path: Path, kept, shape):
    with pytest.raises(ValueError, match=f"step must be of the 11 rows, got the shape {shape}"):
        write_rows(tmp_path, {**ROWS, "step": kept}, first=0, total=TOTAL, rank=0, ranks=1)


@pytest.mark.resume
def test_what_a_killed_write_left_is_no_shard(tmp_path: Path):
    write(tmp_path, spread(2))
    with atomic_file(tmp_path / name_of(0, 3)) as temporary:
        temporary.write_bytes(b"half")
        assert len(load_rows(tmp_path, 0, TOTAL)["weight"]) == TOTAL
