"""A kept pair reads the captions of its removed near-duplicates, each with the teacher's embedding of that very text."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_training import make_batches, make_dataset, tokenize, training_pairs

from clip_cid.data.balance.captions_file import read_captions, read_given_captions, write_captions
from clip_cid.errors import DataError
from clip_cid.recipe import parse_recipe
from clip_cid.training.batch_order import Place
from clip_cid.training.batches import NO_CAPTION, Batch, Item, TrainingPairs
from clip_cid.training.merged_captions import MergedCaptions
from clip_cid.training.validation import hold_out

SETS = {1: [0, 2, 20], 5: [4], 9: [10, 11, 12, 13]}
"""Kept row -> the removed ones; rows 3, 6, 7, 8 and 14 to 19 are alone."""
KEPT = np.array(sorted({*range(21)} - {row for removed in SETS.values() for row in removed}))


def write(folder: Path, captions: Mapping[int, Sequence[str]], sets: Mapping[int, Sequence[int]] = SETS) -> None:
    folder.mkdir(exist_ok=True)
    write_captions(
        folder,
        kept=np.array([*sets], dtype=np.int64),
        rows=np.array([row for kept, removed in sets.items() for row in sorted([kept, *removed])], dtype=np.int64),
        owner=np.repeat(np.arange(len(sets)), [len(removed) + 1 for removed in sets.values()] or 0),
        keys=pa.array(map(str, range(21)), pa.large_string()),
        captions=pa.array([captions.get(row, []) for row in range(21)], pa.large_list(pa.large_string())),
    )


@pytest.fixture
def training(tmp_path: Path) -> TrainingPairs:
    """The kept pairs of `SETS`, in an order that is not the store's."""
    every = training_pairs(tmp_path)
    assert every.store is not None
    write(tmp_path / "balance", {row: every.store.captions(row) for row in range(21)})
    kept = dataclasses.replace(every.take(KEPT[::-1].copy()), text_labels=None, first_texts=None)
    assert kept.store_rows is not None
    given = read_given_captions(tmp_path / "balance")
    return dataclasses.replace(kept, merged=MergedCaptions.of(given, kept.store_rows, every.store.num_captions))


def test_caption_and_embedding_of_a_batch_are_of_one_row_and_of_the_set(training: TrainingPairs) -> None:
    store = training.store
    assert store is not None
    of_text = {
        tuple(tokenize([text])[0].tolist()): (row, number)
        for row in range(21)
        for number, text in enumerate(store.captions(row))
    }
    read: dict[int, set[tuple[int, int]]] = {}
    for batch in make_batches(training).between(0, 60):
        assert batch.teacher_text is not None
        for row, text, embedding in zip(batch.rows.tolist(), batch.texts.tolist(), batch.teacher_text, strict=True):
            of, number = of_text[tuple(text)]
            stored = store.text_for(np.array([of]), number)[0].astype(np.float32)
            torch.testing.assert_close(embedding, torch.from_numpy(stored / np.linalg.norm(stored)))
            read.setdefault(row, set()).add((of, number))
    assert read == {
        row: {(of, number) for of in [row, *SETS.get(row, [])] for number in (0, 1)} for row in KEPT.tolist()
    }


def same(one: Batch, other: Batch) -> bool:
    assert one.teacher_text is not None
    assert other.teacher_text is not None
    return (
        one.rows.tolist() == other.rows.tolist()
        and torch.equal(one.images, other.images)
        and torch.equal(one.texts, other.texts)
        and torch.equal(one.teacher_text, other.teacher_text)
    )


def test_a_resumed_training_reads_the_same_and_other_pairs_read_what_they_did(training: TrainingPairs) -> None:
    whole = [*make_batches(training).between(0, 9)]
    assert all(map(same, whole[4:], make_batches(training).between(4, 9)))

    plain = dataclasses.replace(training, merged=None)
    for batch, own in zip(whole, make_batches(plain).between(0, 9), strict=True):
        alone = torch.tensor([row not in SETS for row in batch.rows.tolist()])
        assert torch.equal(batch.texts[alone], own.texts[alone])
        assert torch.equal(batch.images, own.images)


def test_held_out_pairs_are_measured_on_their_own_captions(training: TrainingPairs) -> None:
    rest, held_out = hold_out(training, 0.4, batch_size=4, ranks=1)
    assert held_out.pairs.merged is None
    assert rest.merged is not None
    assert training.merged is not None
    for index, row in enumerate(rest.rows.tolist()):
        place = training.rows.tolist().index(row)
        texts = [rest.merged.text(index, number) for number in range(rest.merged.counts[index])]
        assert texts == [training.merged.text(place, number) for number in range(training.merged.counts[place])]


def test_a_caption_without_an_embedding_is_read_only_where_no_loss_asks_for_it(training: TrainingPairs) -> None:
    assert training.merged is not None
    assert training.store_rows is not None
    once = np.ones(21, dtype=np.int32)
    few = MergedCaptions.of(training.merged.given, training.store_rows, once)
    every = MergedCaptions.of(training.merged.given, training.store_rows, None)
    assert few.counts.sum() == 8
    assert every.counts.sum() == 16
    assert few.given.numbers.tolist() == [0] * 8


def test_the_key_of_a_training_is_of_the_texts_and_not_of_how_they_lie_in_memory(training: TrainingPairs) -> None:
    assert training.merged is not None

    def key(texts: list[str]) -> str:
        assert training.merged is not None
        digest = hashlib.sha256()
        given = training.merged.given._replace(texts=pa.array(texts, pa.large_string()))
        dataclasses.replace(training.merged, given=given).add_to(digest)
        return digest.hexdigest()

    own = hashlib.sha256()
    training.merged.add_to(own)
    texts = training.merged.given.texts.to_pylist()
    assert key(texts) == own.hexdigest() != key([*texts[:-1], "another"])


def test_an_image_without_a_caption_is_given_one(training: TrainingPairs) -> None:
    assert training.num_captions is not None
    without = dataclasses.replace(training, num_captions=np.zeros(len(training), dtype=np.int32))
    dataset = make_dataset(without)
    for index, row in enumerate(training.rows.tolist()):
        item = dataset[Place(3, index)]
        assert isinstance(item, Item)
        assert (item.caption == NO_CAPTION) == (row not in SETS)


def test_each_text_comes_once_with_the_row_it_is_of_and_spaces_around_it_do_not_count(tmp_path: Path) -> None:
    captions = {0: ("kept", ""), 1: ("kept", "a\nline, 日本"), 2: ("a\nline, 日本", " of 2 "), 3: ("  ",), 4: ("of 5",)}
    write(tmp_path, captions | {5: ("of 5", "x")}, {5: [4], 0: [1, 2, 3]})
    given = read_given_captions(tmp_path)
    assert given.texts.to_pylist() == ["a\nline, 日本", "of 2"]
    assert (given.kept.tolist(), given.rows.tolist(), given.numbers.tolist()) == ([0, 0], [1, 2], [1, 1])
    assert read_captions(tmp_path)[0] == ["kept", "a\nline, 日本", " of 2 ", "  "]


def test_a_list_without_sets_gives_nothing_and_one_of_an_older_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {}, {})
    assert len(read_given_captions(tmp_path).texts) == 0
    columns = {"row": pa.array([3]), "key": ["d"], "captions": [["a", "b"]]}
    pq.write_table(pa.table(columns), tmp_path / "captions.parquet")
    with pytest.raises(DataError, match="an older version wrote it") as error:
        read_given_captions(tmp_path)
    assert f"clip-cid balance {tmp_path.parent} --force" in error.value.fix
    assert read_captions(tmp_path) == {3: ["a", "b"]}


def test_a_recipe_that_merges_nothing_is_refused() -> None:
    merged, reads = {"merge_captions": True}, {"merged_captions": True}
    parse_recipe({"balance": merged, "distill": reads}, where="test")
    texts = {"cluster": {"texts": True}, "distill": {**reads, "weights": {"text_cluster_cls": 1.0}}}
    for values, words in (
        ({"distill": reads}, "balance.merge_captions: false"),
        ({"distill": reads, "balance": {**merged, "enabled": False}}, "nothing is balanced here"),
        ({"distill": reads, "balance": {**merged, "existing": "kept.npy"}}, "nothing is balanced here"),
        ({"distill": {**reads, "weights": "clip-only"}, "embed": {"teacher": "none"}}, "nothing is balanced here"),
        ({"balance": merged, **texts}, "text_cluster_cls read the cluster of each caption"),
    ):
        with pytest.raises(Exception, match=words):
            parse_recipe(values, where="test")
