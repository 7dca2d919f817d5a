"""The embedded sample keeps its promises: known duplicates, a long tail, honest captions, the same bytes every time."""

import hashlib
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_cid.data.sample.captions import BACKGROUND_PHRASES, COLOR_WORDS, COUNT_WORDS, OBJECT_WORDS, caption, plural
from clip_cid.data.sample.drawing import SIZE, draw_scene
from clip_cid.data.sample.scenes import COLORS, OBJECTS, Scene, SceneBook, Thing, draw_thing
from clip_cid.data.sample.sets import LABELLED_SETS
from clip_cid.data.sample.write import SampleSummary, _plan, write_sample
from clip_cid.errors import DataError

PAIRS = 200


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "sample"
    write_sample(out, pairs=PAIRS)
    return out


def members(tar: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes, in the order of the tar."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, extension = member.name.split(".")
            content = archive.extractfile(member)
            assert content is not None
            found.setdefault(key, {})[extension] = content.read()
    return found


def pairs_of(folder: Path) -> list[dict[str, Any]]:
    """The json of every pair, with its caption as `text` and its picture as `pixels`."""
    found: list[dict[str, Any]] = []
    for tar in sorted(folder.glob("*.tar")):
        for files in members(tar).values():
            image = files["jpg"] if "jpg" in files else files["webp"]
            pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), dtype=np.float64)
            found.append({**json.loads(files["json"]), "text": files["txt"].decode(), "pixels": pixels})
    return found


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(sample: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "again", pairs=PAIRS)
    write_sample(tmp_path / "other", pairs=PAIRS, seed=1)
    assert digests(tmp_path / "again") == digests(sample)
    assert digests(tmp_path / "other")["pairs/pairs-0000.tar"] != digests(sample)["pairs/pairs-0000.tar"]


def test_writing_it_again_does_nothing_and_tells_the_same(sample: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sample.rglob("*")}
    summary = write_sample(sample, pairs=PAIRS)
    assert {path: path.stat().st_mtime_ns for path in sample.rglob("*")} == before
    assert isinstance(summary, SampleSummary)
    kinds = Counter(pair["kind"] for pair in pairs_of(sample / "pairs"))
    assert kinds == {"original": summary.originals, "perceptual": summary.perceptual, "semantic": summary.semantic}
    assert kinds.total() == summary.pairs == PAIRS
    assert len(pairs_of(sample / "heldout")) == summary.heldout


def test_nothing_but_the_sample_is_left_beside_it(sample: Path) -> None:
    assert list(sample.parent.iterdir()) == [sample]


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a sample"):
        write_sample(tmp_path, pairs=PAIRS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"), [({"pairs": 300}, "pairs 200, not 300"), ({"pairs": PAIRS, "seed": 7}, "seed 0, not 7")]
)
def test_a_sample_of_other_arguments_is_refused_in_numbers(sample: Path, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        write_sample(sample, **arguments)


def test_a_broken_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text('{"version": 1')
    with pytest.raises(DataError, match=r"sample\.json: not the description"):
        write_sample(tmp_path, pairs=PAIRS)


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_cid.data.sample.write._write_set", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "sample", pairs=PAIRS)
    assert list(tmp_path.iterdir()) == []


def test_every_group_has_one_original_and_every_copy_shows_its_scene(sample: Path) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs_of(sample / "pairs"):
        groups.setdefault(pair["dup"], []).append(pair)
    for group in groups.values():
        assert [pair["kind"] for pair in group].count("original") == 1
        assert all(pair["scene"] == group[0]["scene"] for pair in group)
    scenes = [json.dumps(group[0]["scene"]) for group in groups.values()]
    assert len(set(scenes)) == len(scenes)


def test_perceptual_copies_are_near_in_pixels_and_semantic_ones_are_not(sample: Path) -> None:
    pairs = pairs_of(sample / "pairs")
    originals = {pair["dup"]: pair["pixels"] for pair in pairs if pair["kind"] == "original"}
    difference: dict[str, list[float]] = {"perceptual": [], "semantic": []}
    for pair in pairs:
        if pair["kind"] != "original":
            difference[pair["kind"]].append(float(np.abs(pair["pixels"] - originals[pair["dup"]]).mean()))
    assert 0 < np.median(difference["perceptual"]) < 0.5 * np.median(difference["semantic"])
    assert min(difference["semantic"]) > 3


def test_half_of_the_pairs_captions_name_the_things_alone_and_no_held_out_one_does(sample: Path) -> None:
    def full(pair: dict[str, Any]) -> bool:
        places = BACKGROUND_PHRASES[pair["scene"]["background"]]
        return any(place in pair["text"].lower() for place in places)

    shares = [np.mean([full(pair) for pair in pairs_of(sample / folder)]) for folder in ("pairs", "heldout")]
    assert 0.4 < shares[0] < 0.6
    assert shares[1] == 1


def test_copies_follow_zipfs_law() -> None:
    counts = Counter(entry.group for entry in _plan(6_000, random.Random(0)))
    sizes = sorted(counts.values(), reverse=True)
    # 2,400 copies by Zipf's law over 3,600 scenes: the first has 2,400 / 8.77 = 274 of them, the tenth a tenth of that.
    assert sizes[0] == pytest.approx(275, rel=0.2)
    assert sizes[9] == pytest.approx(28, rel=0.4)


@pytest.mark.slow
def test_concepts_have_a_long_tail() -> None:
    rng = random.Random(0)
    counts = Counter(draw_thing(rng).object for _ in range(20_000))
    observed = np.log([counts[name] for name in OBJECTS])
    slope = np.polyfit(np.log(np.arange(1, len(OBJECTS) + 1)), observed, 1)[0]
    assert -1.2 < slope < -0.3  # a straight line in log-log, as Zipf has it
    assert counts[OBJECTS[0]] > 3 * counts[OBJECTS[-1]]


@pytest.mark.slow
def test_a_few_scenes_have_many_copies_and_most_have_none(tmp_path: Path) -> None:
    write_sample(tmp_path / "sample", pairs=400)
    sizes = sorted(Counter(pair["dup"] for pair in pairs_of(tmp_path / "sample" / "pairs")).values())
    assert sizes[len(sizes) // 2] == 1
    assert sizes[-1] >= 5


def test_scenes_that_are_not_duplicates_differ_in_two_attributes() -> None:
    book, rng = SceneBook(), random.Random(0)
    scenes = [book.new(rng) for _ in range(300)]
    for k, scene in enumerate(scenes):
        for other in scenes[:k]:
            assert attributes_apart(scene, other) >= 2


def attributes_apart(one: Scene, two: Scene) -> int:
    if (one.other is None) != (two.other is None):
        return 4
    pairs = [(one.background, two.background), (one.count, two.count), (one.relation, two.relation)]
    for a, b in zip(one.things, two.things, strict=True):
        pairs += [(a.object, b.object), (a.color, b.color), (a.texture, b.texture)]
    return sum(a != b for a, b in pairs)


def test_captions_say_what_is_drawn_and_nothing_else(sample: Path) -> None:
    for pair in pairs_of(sample / "pairs"):
        scene = pair["scene"]
        things = [scene["thing"], *([scene["other"]] if scene["other"] else [])]
        drawn = {COLOR_WORDS.get(thing["color"], (thing["color"],)) for thing in things}
        for text in pair.get("captions", [pair["text"]]):
            lower = text.lower()
            for thing in things:
                words = OBJECT_WORDS.get(thing["object"], (thing["object"],))
                assert any(word in lower or plural(word) in lower for word in words), (text, thing)
            said = [color for color in COLORS if color in lower.replace(",", "").replace(".", "").split()]
            assert all(any(color in words for words in drawn) for color in said), (text, things)
            if scene["count"] > 1:
                number = COUNT_WORDS[scene["count"]]
                assert number in lower or not said  # a brief caption names the things and no more
                assert not any(word in lower.split() for word in COUNT_WORDS.values() if word != number)


def test_captions_vary_and_part_of_the_pairs_have_several(sample: Path) -> None:
    several = [pair["captions"] for pair in pairs_of(sample / "pairs") if "captions" in pair]
    assert 0.15 * PAIRS < len(several) < 0.6 * PAIRS
    assert all(len(set(captions)) == len(captions) >= 2 for captions in several)
    scene = Scene("snow", Thing("cat", "red", "striped"))
    assert len({caption(scene, random.Random(seed)) for seed in range(100)}) > 20


def test_the_first_of_several_captions_is_the_text(sample: Path) -> None:
    assert all(pair["captions"][0] == pair["text"] for pair in pairs_of(sample / "pairs") if "captions" in pair)


def test_held_out_scenes_occur_nowhere_in_the_pairs(sample: Path) -> None:
    seen = {json.dumps(pair["scene"]) for pair in pairs_of(sample / "pairs")}
    held_out = [json.dumps(pair["scene"]) for pair in pairs_of(sample / "heldout")]
    assert len(set(held_out)) == len(held_out) > 0
    assert seen.isdisjoint(held_out)


@pytest.mark.parametrize("name", list(LABELLED_SETS))
def test_labelled_sets_are_readable_and_balanced(sample: Path, name: str) -> None:
    folder = sample / "sets" / name
    classes = (folder / "classnames.txt").read_text().splitlines()
    assert len(set(classes)) == len(classes) >= 2
    assert all("{c}" in line for line in (folder / "zeroshot_classification_templates.txt").read_text().splitlines())
    for split in ("train", "test"):
        assert (folder / split / "nshards.txt").read_text().strip() == "1"
        files = members(folder / split / "0.tar")
        counts = Counter(int(sample["cls"]) for sample in files.values())
        assert sorted(counts) == list(range(len(classes)))
        assert len(set(counts.values())) == 1
        assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in files.values()} == {(SIZE, SIZE)}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_shows_its_color(name: str) -> None:
    red = np.asarray(draw_scene(Scene("snow", Thing(name, "red", "plain")), random.Random(0)), dtype=int)
    blue = np.asarray(draw_scene(Scene("snow", Thing(name, "blue", "plain")), random.Random(0)), dtype=int)
    reddish = (red[..., 0] > red[..., 2] + 100).mean()
    assert reddish > 0.04
    assert (blue[..., 2] > blue[..., 0] + 100).mean() == pytest.approx(reddish, abs=0.01)


def test_too_few_pairs_is_a_mistake_in_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs must be at least 20, got 5"):
        write_sample(tmp_path / "sample", pairs=5)
