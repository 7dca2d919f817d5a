import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clip_cid.data.pairs import formats
from clip_cid.data.pairs.format import COMMON_COLUMNS, PairFormat, Scan, SourceFile
from clip_cid.data.pairs.formats import FORMATS
from clip_cid.data.pairs.pair import Pair
from clip_cid.data.pairs.pairs import fingerprint, open_pairs
from clip_cid.data.pairs.sample_parts import clean_captions, key_hash
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig


class Lines(PairFormat):
    """A pair is a line with the image inside; all that a new format has to say."""

    kind = "file of lines"
    examples = "a .lines file"
    schema = pa.schema([*COMMON_COLUMNS, ("line", pa.string())])

    def owns(self, path: Path, settings: PairsConfig) -> bool:
        return path.suffix == ".lines"

    def scan(self, source: SourceFile, settings: PairsConfig) -> Scan:
        lines = source.path.read_text().splitlines()
        keys = [json.loads(line)["key"] for line in lines]
        columns = {"key": keys, "key_hash": [key_hash(key) for key in keys], "problem": [None] * len(keys)}
        batch = pa.RecordBatch.from_pydict(columns | {"line": lines}, schema=self.schema)
        return Scan([source.bytes, source.mtime_ns], iter([batch]))

    def read(self, source: SourceFile, row: dict[str, Any], settings: PairsConfig) -> Pair:
        values = json.loads(row["line"])
        return Pair(row["key"], base64.b64decode(values["image"]), clean_captions([values["caption"]]), {})


@pytest.mark.parametrize("with_index", [True, False])
def test_a_new_format_needs_its_class_and_its_place_in_the_list_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_index: bool
) -> None:
    file, index = tmp_path / "pairs.lines", tmp_path / "index" if with_index else None
    lines = [{"key": key, "image": base64.b64encode(key.encode()).decode(), "caption": f" {key} "} for key in "ab"]
    file.write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    settings = PairsConfig(source=(str(file),))
    with pytest.raises(DataError, match="not a known format"):
        open_pairs(settings, index=index)

    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, Lines()))
    pairs = open_pairs(settings, index=index)
    assert [pairs.read(row) for row in range(2)] == [Pair("a", b"a", ("a",), {}), Pair("b", b"b", ("b",), {})]
    assert pairs.known_bad == {2: "duplicate key, first used by row 0"}
    assert [shard.name for shard in pairs.shards] == [f"{file}#00000"]
    assert fingerprint(settings) == [(str(file), file.stat().st_size)]
    assert (pairs.has_members, pairs.image_name(0)) == (False, "")


def test_a_source_of_no_known_format_is_refused_with_all_that_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "pairs.doc").write_text("")
    with pytest.raises(DataError, match=r"pairs.doc: not a known format of pairs") as error:
        open_pairs(PairsConfig(source=(str(tmp_path / "pairs.doc"),)))
    for example in (".tar shards", ".csv, .tsv, .txt, .jsonl or .parquet", "a folder of images"):
        assert example in str(error.value)


def test_formats_have_nouns_of_their_own_and_the_common_columns_first() -> None:
    assert len({known.kind for known in FORMATS}) == len(FORMATS)
    for known in FORMATS:
        assert [(field.name, field.type) for field in known.schema][: len(COMMON_COLUMNS)] == list(COMMON_COLUMNS)
