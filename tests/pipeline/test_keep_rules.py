"""Which image of a set is kept, by pixels, bytes, a field and several rules, in the balance stage."""

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_cid import cli
from clip_cid.data.balance.captions_file import read_captions
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.deciding_settings import deciding
from clip_cid.errors import ConfigError, DataError
from clip_cid.recipe import parse_recipe
from clip_cid.run_folder import RunFolder, StageRecord
from clip_cid.stages import balance

KEYS = ["a", "b", "c", "d", "alone"]
SIZES = [(4, 4), (8, 2), (3, 5), (2, 2), (9, 9)]
CAPTIONS = [("a sock",), ("a sock", "black"), ("shoe",), ("a sock",), ("alone",)]
SCORES = ["1", "", "7", "7.0", "3"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Four images of one set and one alone; the files have the pixels that the store tells, and bytes of their own."""
    (tmp_path / "pairs").mkdir()
    for number, (key, (width, height)) in enumerate(zip(KEYS, SIZES, strict=True)):
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pairs" / f"{key}.bmp")
        (tmp_path / "pairs" / f"{key}.txt").write_text("caption")
    with (tmp_path / "pairs" / "d.bmp").open("ab") as handle:
        handle.write(bytes(5000))

    rows = oracles.unit(np.array([[1, 0.01], [1, 0.02], [1, 0.03], [1, 0.05], [0, 1]])).astype(np.float16)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    part = folder.begin("embed", {"key": "k"}, resumable=False).part
    writer = StoreWriter(part, teacher={}, dim=2, fields=("score", "word"), num_shards=1)
    captions, fields = CAPTIONS, {"score": SCORES, "word": ["x"] * 5}
    writer.add(ShardRows("s", rows, rows, rows[:1], np.ones(5, dtype=bool), KEYS, captions, SIZES, fields, []))
    writer.finish()
    folder.publish(
        StageRecord("embed", "k", 1, {}, {}, {}, {}, "cpu", started="2026-01-01T00:00:00+00:00", seconds=1.0)
    )
    return folder


def kept(run: RunFolder, keep: Any, **changed: Any) -> list[str]:
    values = {
        "pairs": {"source": [str(run.path.parent / "pairs")], "keep_fields": ["score", "word"]},
        "embed": {"teacher": "run:t"},
        "balance": {"keep": keep, "threshold": 0.01, "classify": 0, **changed},
    }
    part = run.begin("balance", {"key": "k"}, resumable=False).part
    balance.run(run, part, parse_recipe(values, where="test"))
    return [KEYS[row] for row in np.load(part / "kept.npy").tolist()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("nearest_centroid", "c"),
        (["nearest_centroid"], "c"),
        ("most_pixels", "b"),  # of a and b, with 16 pixels each, the nearer to the centroid of the set
        ("largest_file", "d"),
        ("field:score", "c"),  # of c and d likewise
        (["field:score", "largest_file"], "d"),
        (["most_pixels", "field:score"], "a"),
    ],
)
def test_the_kept_image_is_the_first_by_the_rules_in_their_order(run: RunFolder, keep: Any, expected: str) -> None:
    assert kept(run, keep) == sorted([expected, "alone"], key=KEYS.index)


@pytest.mark.slow
def test_with_a_radius_the_far_images_choose_by_the_same_rule(run: RunFolder) -> None:
    assert kept(run, "largest_file", max_radius=0.0005) == ["a", "d", "alone"]


@pytest.mark.slow
def test_a_field_without_numbers_is_named(run: RunFolder) -> None:
    with pytest.raises(DataError, match="the field 'word' of 'a' is 'x', not a number"):
        kept(run, "field:word")


@pytest.mark.slow
def test_columns_beside_imported_embeddings_are_fields(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    angles = np.array([0, 1, 2, 90, 91]) * np.pi / 180
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    columns = {"key": list("abcde"), "score": [1.0, 3.0, None, None, 0.5], "none": [None] * 5}
    pq.write_table(pa.table({**columns, "embedding": pa.array(vectors.tolist())}), tmp_path / "e.parquet")

    def kept_with(*keep: str, code: int = 0) -> str:
        command = ["balance", str(tmp_path / "run"), "--embeddings", str(tmp_path / "e.parquet"), "--balance.keep"]
        assert cli.main([*command, *keep]) == code
        rows = np.load(tmp_path / "run" / "balance" / "kept.npy") if not code else []
        return "".join("abcde"[row] for row in rows)

    assert kept_with("field:score", "nearest_centroid") == "be"
    assert "2 images of 5 without 'score'" in capfd.readouterr().err
    for rule, problem in (
        ("field:none", "no image has a number in 'none'"),
        ("field:nope", "no column 'nope'; there are key, score, none"),
        ("most_pixels", "the sizes of the images are not known here"),
    ):
        kept_with(rule, code=1)
        assert problem in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_the_captions_of_removed_images_go_to_the_kept_one_each_once(run: RunFolder) -> None:
    kept(run, "largest_file", merge_captions=True)
    table = pq.read_table(run.part("balance") / "captions.parquet").to_pylist()
    origins = {"from_rows": [3, 1, 2], "numbers": [0, 1, 0]}
    assert table == [{"row": 3, "key": "d", "captions": ["a sock", "black", "shoe"], **origins}]
    assert read_captions(run.part("balance")) == {3: ["a sock", "black", "shoe"]}
    kept(run, "most_pixels")
    assert not (run.part("balance") / "captions.parquet").exists()


def test_a_rule_that_cannot_be_followed_is_refused_with_the_recipe() -> None:
    for keep, message in (
        (
            "biggest",
            "a rule should be nearest_centroid, best_caption, most_pixels, largest_file or field:NAME, not biggest",
        ),
        ("field:", "most_pixels, largest_file or field:NAME, not field:"),
        ("field:score", "'score' is not among pairs.keep_fields"),
        ("largest_file", "largest_file reads the images; set pairs.source"),
        (["most_pixels", "most_pixels"], "most_pixels is named twice"),
        ([], "at least 1 item"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_recipe({"balance": {"keep": keep}}, where="test")


def test_one_rule_is_written_as_earlier_versions_wrote_it_so_their_runs_stay_valid() -> None:
    recipe = parse_recipe({"balance": {"keep": "best_caption"}}, where="test").model_dump(mode="json")
    assert recipe["balance"]["keep"] == ["best_caption"]
    assert deciding(recipe)["balance"]["keep"] == "best_caption"
    assert deciding({"balance": {"keep": "best_caption"}})["balance"] == {"keep": "best_caption"}
