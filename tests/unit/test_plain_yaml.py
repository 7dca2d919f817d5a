"""YAML that people write, and YAML that nobody should: plain values, or a fault with its line."""

import time

import pytest
import yaml

from clip_cid import plain_yaml


def nested(rows: int, width: int, *, merged: bool = False) -> str:
    """Each line names the one above several times."""
    lines = ["a0: &a0 {x: 1}" if merged else "a0: &a0 [x]"]
    for row in range(1, rows):
        names = ", ".join([f"*a{row - 1}"] * width)
        lines.append(f"a{row}: &a{row} {{<<: [{names}], k{row}: 1}}" if merged else f"a{row}: &a{row} [{names}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 2.5, true, null, ~, text, '07', 0x1f, 1e3, 1.0e3]",
        "a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2, e: 3}",
        "a: |\n  two\n  lines\nb: >-\n  one\n  line",
        '{"a": "caf\\u00e9", "b": [1, {"c": null}]}',
        "",
        "# nothing\n",
    ],
)
def test_plain_values_are_those_of_pyyaml(text: str):
    assert plain_yaml.parse(text) == yaml.safe_load(text)


def test_the_recipe_that_a_mapping_is_merged_from_may_be_merged_again():
    text = "a: {b: &x {<<: {k: 1}, k: 2}}\nc: {<<: *x}"
    assert plain_yaml.parse(text) == {"a": {"b": {"k": 2}}, "c": {"k": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-02-30", "2026-02-30"),
        ("2026-02-28", "2026-02-28"),
        ("2026-02-28 10:00:00", "2026-02-28 10:00:00"),
        (r'"\ud83d\ude00"', "😀"),
        (r'"a \ud83d\ude00\ud83c\udfb2 b"', "a 😀🎲 b"),
        ("'\N{ZERO WIDTH NO-BREAK SPACE}a'", "\N{ZERO WIDTH NO-BREAK SPACE}a"),
    ],
)
def test_dates_are_texts_and_emojis_are_one_character(text: str, value: str):
    assert plain_yaml.parse(f"title: {text}") == {"title": value}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('a: 1\nb: !!int ""', "'' is no int at line 2, column 4"),
        ("b: !!float x", "'x' is no float"),
        ("b: !!bool perhaps", "'perhaps' is no bool"),
        ("b: " + "9" * 5000, "is no int"),
        ("b: !!timestamp 2026", "could not determine a constructor"),
        ("b: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("b: !!set {a, b}", "could not determine a constructor"),
        (r'b: "\ud83d"', "half a character"),
        (r'b: "\ude00\ud83d"', "half a character"),
        ("b: \0", "unacceptable character"),
        ("b: [", "line"),
        ("b:\n\tc: 1", "cannot start any token"),
        ("a: b: c", "mapping values are not allowed here at line 1"),
        ("? [a]\n: b", "unhashable key"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: *x", "undefined alias"),
        ("a: {b: 1, c: 2, b: 3}", "the key 'b' is given twice at line 1, column 17"),
    ],
)
def test_a_fault_is_named_with_its_line(text: str, problem: str):
    with pytest.raises(ValueError, match=r"^.+$") as error:
        plain_yaml.parse(text)
    assert problem in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        "[" * 3000 + "]" * 3000,
        "{a: " * 3000,
        "- " * 3000,
        nested(9, 9),
        nested(30, 2),
        nested(9, 9, merged=True),
        nested(2000, 1),
        "a: &a [*a]",
        "&a {b: *a}",
        "a: &a {<<: *a}",
        "a: &a " + "x" * 1_000_000 + "\nb: [" + "*a, " * 50 + "]",
        "[" + "0, " * 120_000 + "]",
    ],
    ids=lambda text: text[:25].replace("\n", " "),
)
def test_what_would_fill_the_memory_is_refused_at_once(text: str):
    started = time.process_time()
    with pytest.raises(ValueError, match=r"more than|undefined alias"):
        plain_yaml.parse(text)
    assert time.process_time() - started < 20  # seconds; written out it would be hours
