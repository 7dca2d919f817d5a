"""Laws of the decisions of a person: they hold in the result, and their order does not count."""

import json
from dataclasses import replace

import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clip_cid.data.balance.decisions import Decision, Decisions, Image, parse_decisions
from clip_cid.method.balance.decided_sets import DecidedRows, cut_links
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.semantic_balance import Balance, BalanceRule, balance_rows
from clip_cid.method.balance.set_explanation import explain
from clip_cid.method.distances import threshold_on
from clip_cid.method.unit_rows import UnitRows

SQUARED = st.floats(0.01, 3.9)


@st.composite
def decided_balance(draw, max_rows: int = 14):
    """Rows, threshold and radius of a rule, and decisions about some rows that do not contradict each other."""
    dim = draw(st.integers(2, 4))
    row = st.lists(st.integers(-3, 3), min_size=dim, max_size=dim).filter(any)
    integers = np.array(draw(st.lists(row, min_size=2, max_size=max_rows)), dtype=np.float64)
    radius, threshold = draw(st.one_of(st.none(), st.floats(0.05, 1.9))), draw(SQUARED)

    of = st.integers(0, len(integers) - 1)
    apart = draw(st.lists(st.tuples(of, of).filter(lambda pair: pair[0] < pair[1]), max_size=4))
    keep = draw(st.sets(of, max_size=3))
    remove = draw(st.sets(of, max_size=3)) - keep
    return integers, threshold, radius, apart, sorted(keep), sorted(remove)


def made(drawn):
    """The same as rows and a rule; our own code is not to run within a strategy, where its checks draw at random."""
    integers, threshold, radius, *decisions = drawn
    images = UnitRows(integers, name="rows", any_length=True)
    return images, BalanceRule(threshold, "squared_euclidean", 3.95, max_radius=radius), *decisions


def decided(apart, keep, remove) -> DecidedRows:
    rows = (np.array(list(rows), dtype=np.int64) for rows in (keep, remove))
    return DecidedRows(np.array(apart, dtype=np.int64).reshape(-1, 2), *rows)


def balanced(images: UnitRows, rule: BalanceRule, decisions: DecidedRows | None) -> Balance:
    return balance_rows(images, None, rule, decided=decisions)


def kept_for(balance: Balance) -> list[int]:
    return [int(balance.kept[place]) if place >= 0 else -1 for place in balance.set_of]


@given(decided_balance())
def test_decisions_hold_in_the_result(data):
    images, rule, apart, keep, remove = made(data)
    result = balanced(images, rule, decided(apart, keep, remove))
    sets = result.joined.sets(result.squared_threshold)
    for one, other in apart:
        assert sets[one] != sets[other]
        assert result.set_of[one] != result.set_of[other] or result.set_of[one] == -1
    assert {*keep} <= {*result.kept.tolist()}
    assert not {*remove} & {*result.kept.tolist()}


@given(decided_balance())
def test_every_row_is_kept_for_by_one_of_its_set_and_undecided_sets_are_as_ever(data):
    images, rule, apart, keep, remove = made(data)
    result, plain = balanced(images, rule, decided(apart, keep, remove)), balanced(images, rule, None)
    sets, plain_sets = result.joined.sets(result.squared_threshold), plain.forest.sets(plain.squared_threshold)
    for row, own in enumerate(kept_for(result)):
        members = np.flatnonzero(sets == sets[row]).tolist()
        if own == -1:
            assert row in remove
            assert {*members} <= {*remove}
        else:
            assert own in members
        touched = {*np.flatnonzero(plain_sets == plain_sets[row]).tolist()}
        if not touched & {*keep, *remove, *(end for pair in apart for end in pair)}:
            assert own == kept_for(plain)[row]


@given(decided_balance())
def test_no_decision_changes_nothing(data):
    images, rule, *_ = made(data)
    one, other = balanced(images, rule, DecidedRows()), balanced(images, rule, None)
    assert one.kept.tobytes() == other.kept.tobytes()
    assert one.set_of.tobytes() == other.set_of.tobytes()


@given(decided_balance(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_decided_about_does_not_count(data, random):
    images, rule, apart, keep, remove = made(data)
    first = balanced(images, rule, decided(apart, keep, remove))
    for part in (apart, keep, remove):
        random.shuffle(part)
    again = balanced(images, rule, decided([pair[::-1] for pair in apart], keep, remove))
    assert (first.kept.tolist(), first.set_of.tolist()) == (again.kept.tolist(), again.set_of.tolist())
    assert first.cut.tolist() == again.cut.tolist()


@given(decided_balance())
def test_the_cut_link_is_the_weakest_on_the_way(data):
    """The link without which the two are apart, and which is needed last when links are added nearest first."""
    images, rule, apart, _, _ = made(data)
    forest = balanced(images, rule, None).forest
    expected = {weakest(forest, one, other) for one, other in apart} - {-1}
    assert cut_links(forest, decided(apart, [], []).apart).tolist() == sorted(expected)


def weakest(forest: Forest, one: int, other: int) -> int:
    links = list(zip(forest.left.tolist(), forest.right.tolist(), strict=True))
    for count in range(1, len(links) + 1):
        sets = oracles.connected_sets(forest.rows, links[:count])
        if any({one, other} <= {*members} for members in sets):
            return count - 1
    return -1


@given(decided_balance())
def test_with_a_radius_whoever_is_not_to_be_removed_is_within_it(data):
    images, rule, apart, keep, remove = made(data)
    result = balanced(images, rule, decided(apart, keep, remove))
    rows = images[0 : len(images)]
    if rule.squared_radius is not None:
        for row, own in enumerate(kept_for(result)):
            if row not in remove:
                assert ((rows[row] - rows[own]) ** 2).sum() <= rule.squared_radius + 1e-12


@given(decided_balance())
def test_rows_without_a_kept_one_are_left_out_of_the_explanation(data):
    images, rule, apart, keep, remove = made(data)
    result = balanced(images, rule, decided(apart, keep, remove))
    if len(result.kept):
        explanation = explain(images, result.kept, result.set_of, result.joined, result.squared_threshold)
        assert not {*explanation.row.tolist()} & {*np.flatnonzero(result.set_of < 0).tolist()}
        assert explanation.removed.sum() == (result.set_of >= 0).sum() - len(result.kept)


def test_by_hand_a_chain_is_cut_at_its_longest_link_and_keeps_what_was_said():
    angles = np.array([0, 4, 9, 12, 13]) * np.pi / 180
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    images = UnitRows(rows, name="rows", any_length=True)
    rule = BalanceRule(threshold_on("euclidean", 0.1, "cosine"))
    plain = balanced(images, rule, None)
    assert kept_for(plain) == [2] * 5

    # From 0 to 12 degrees the longest link is that of 5 degrees.
    result = balanced(images, rule, decided([(0, 3)], keep=[4], remove=[0]))
    assert (result.forest.left[result.cut].tolist(), result.forest.right[result.cut].tolist()) == ([1], [2])
    assert kept_for(result) == [1, 1, 4, 4, 4]

    result = balanced(images, rule, decided([(0, 3)], keep=[], remove=[0, 1]))
    assert kept_for(result)[:2] == [-1, -1]


KINDS = st.sampled_from(["not_duplicates", "keep", "keep_all", "remove_all"])
IMAGES = st.builds(lambda number, key: Image(f"{number:032x}", key), st.integers(0, 5), st.sampled_from("ab"))


LINES = st.lists(st.tuples(KINDS, st.sets(IMAGES, min_size=2, max_size=3), st.booleans()), max_size=6)


@given(LINES, st.randoms(use_true_random=False))
def test_lines_in_any_order_twice_or_undone_decide_the_same(lines, random):
    made = [Decision(f"id{number}", kind, tuple(images), "now") for number, (kind, images, _) in enumerate(lines)]
    undone = [line for line, (_, _, is_undone) in zip(made, lines, strict=True) if is_undone]
    holds = Decisions(tuple(line for line in made if line not in undone))
    assume(not holds.keep & holds.remove)

    written = [line.as_json() for line in made] + [{"decision": "undo", "of": line.id} for line in undone]
    shuffled = written + random.sample(written, len(written) // 2)
    random.shuffle(shuffled)
    read = parse_decisions("".join(json.dumps(line) + "\n" for line in shuffled).encode(), where="file")
    assert read.digest == holds.digest
    assert (read.apart, read.keep, read.remove) == (holds.apart, holds.keep, holds.remove)
    assert read.digest == replace(read, lines=read.lines[::-1]).digest


@pytest.mark.parametrize("kind", ["keep", "keep_all"])
def test_a_decision_against_another_one_is_named(kind):
    image, other = Image("0" * 32, "a"), Image("0" * 32, "b")
    line = Decision("x", "remove_all", (image, other))
    assert Decisions((line,)).against(kind, [image]) == line
    assert Decisions((line,)).against("not_duplicates", [image]) is None
    assert Decisions((line,)).against("remove_all", [image]) is None
