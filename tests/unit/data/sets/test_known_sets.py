"""The table of tasks and their prompts: names that mean a set, labels that are the set's own, and numbers CLIP published."""

import random
from importlib import resources

import pytest
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torchvision.datasets import Flowers102

from clip_cid.data.sets.known_sets import find_known_set, known_sets, load_prompts, match_keys, metric_of, spelled
from clip_cid.data.sets.readers import READERS
from clip_cid.errors import DataError

FOURTEEN = {
    "food101": (101, 1, 75_750, 25_250),
    "cifar10": (10, 18, 50_000, 10_000),
    "cifar100": (100, 18, 50_000, 10_000),
    "birdsnap": (500, 1, 42_283, 2_149),
    "sun397": (397, 2, 19_850, 19_850),
    "stanford_cars": (196, 8, 8_144, 8_041),
    "fgvc_aircraft": (100, 2, 6_667, 3_333),
    "dtd": (47, 8, 3_760, 1_880),
    "oxford_pets": (37, 1, 3_680, 3_669),
    "caltech101": (102, 34, 3_060, 6_085),
    "flowers102": (102, 1, 2_040, 6_149),
    "stl10": (10, 2, 5_000, 8_000),  # ten folds of 1,000
    "eurosat": (10, 3, 10_000, 5_000),
    "imagenet": (1000, 80, 1_281_167, 50_000),
}
FIVE = {
    "imagenet_v2": (1000, 10_000),
    "imagenet_a": (200, 7_500),
    "imagenet_r": (200, 30_000),
    "imagenet_sketch": (1000, 50_889),
    "objectnet": (113, 18_574),
}


def test_the_table_has_the_numbers_of_the_clip_paper() -> None:
    table = known_sets()
    assert list(table) == [*FOURTEEN, *FIVE]
    for key, (classes, templates, train, test) in FOURTEEN.items():
        known_set, prompts = table[key], load_prompts(table[key].prompts)
        assert (len(prompts.names), len(prompts.templates)) == (classes, templates)
        assert (known_set.counts["train"] + known_set.counts.get("val", 0), known_set.counts["test"]) == (train, test)
        assert not known_set.shifted
    for key, (classes, test) in FIVE.items():
        known_set, prompts = table[key], load_prompts(table[key].prompts)
        assert (len(prompts.names), len(prompts.templates)) == (classes, 80)
        assert known_set.counts == {"test": test}
        assert known_set.shifted


def test_four_sets_are_scored_by_the_mean_of_their_classes() -> None:
    means = {key for key, known_set in known_sets().items() if known_set.metric == "mean_per_class"}
    assert means == {"fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cars", "stanford_cars"),
        ("wds/cars", "stanford_cars"),
        ("wds_vtab-cifar100", "cifar100"),
        ("wds/vtab/flowers", "flowers102"),
        ("vtab/pets", "oxford_pets"),
        ("fgvc_aircraft", "fgvc_aircraft"),
        ("ImageNet-1k", "imagenet"),
        ("imagenetv2", "imagenet_v2"),
        ("imagenet-a", "imagenet_a"),
        ("imagenet_sketch", "imagenet_sketch"),
        ("STL-10", "stl10"),
        ("colors", None),
        ("cifar", None),
        ("imagenet-o", None),
    ],
)
def test_a_name_means_a_set_in_every_spelling_in_use(name: str, key: str | None) -> None:
    known_set = find_known_set(name)
    assert (known_set.key if known_set else None) == key
    assert metric_of(name) == (known_set.metric if known_set else "top1")


def test_no_spelling_means_two_sets_and_every_reader_and_prompts_file_is_used() -> None:
    names = [
        spelled(name)
        for known_set in known_sets().values()
        for name in {spelled(n) for n in (known_set.key, known_set.title, *known_set.aliases)}
    ]
    assert len(names) == len(set(names))
    assert {reader for known_set in known_sets().values() for reader in known_set.readers} == set(READERS)
    files = {file.name for file in resources.files("clip_cid.data.sets").joinpath("prompts").iterdir()}
    assert files == {f"{known_set.prompts}.toml" for known_set in known_sets().values()} - {"imagenet.toml"}


def test_every_template_has_one_place_for_the_name() -> None:
    for known_set in known_sets().values():
        prompts = load_prompts(known_set.prompts)
        assert len(set(prompts.templates)) == len(prompts.templates)
        for template in prompts.templates:
            assert template.count("{c}") == 1
            assert "{}" not in template
        assert all(name == name.strip() and name for name in prompts.names.values())


def test_labels_are_the_sets_own() -> None:
    """The short ones in full, the long ones where a list by position goes wrong."""
    labels = {key: load_prompts(known_set.prompts).names for key, known_set in known_sets().items()}
    assert set(labels["cifar10"]) == {
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    }
    assert set(labels["stl10"]) == {"airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"}
    assert dict(labels["eurosat"]) == {
        "AnnualCrop": "annual crop land",
        "Forest": "forest",
        "HerbaceousVegetation": "brushland or shrubland",
        "Highway": "highway or road",
        "Industrial": "industrial buildings or commercial buildings",
        "Pasture": "pasture land",
        "PermanentCrop": "permanent crop land",
        "Residential": "residential buildings or homes or apartments",
        "River": "river",
        "SeaLake": "lake or sea",
    }
    assert labels["caltech101"]["BACKGROUND_Google"] == "background"
    assert labels["caltech101"]["Faces"] == "off-center face"
    assert labels["caltech101"]["Faces_easy"] == "centered face"
    assert labels["oxford_pets"]["american_pit_bull_terrier"] == "american pit bull terrier"
    assert {key for key in labels["oxford_pets"] if key[0].isupper()} == {
        *("Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau", "Maine_Coon", "Persian"),
        *("Ragdoll", "Russian_Blue", "Siamese", "Sphynx"),
    }  # cats have capitals, dogs do not
    assert labels["sun397"]["/t/theater/indoor_procenium"] == "theater indoor procenium"
    assert labels["birdsnap"]["Says_Phoebe"] == "Says Phoebe"
    assert labels["fgvc_aircraft"]["F-16A/B"] == "F-16A/B"


def test_flowers_are_numbered_as_torchvision_lists_them_but_for_three_names() -> None:
    names = load_prompts("flowers102").names
    assert list(names) == [str(number) for number in range(1, 103)]
    differ = {(theirs, ours) for theirs, ours in zip(Flowers102.classes, names.values(), strict=True) if theirs != ours}
    assert differ == {
        ("globe-flower", "globe flower"),
        ("pink-yellow dahlia?", "pink and yellow dahlia"),
        ("ball moss", "air plant"),
    }


def test_imagenet_is_open_clips_names_by_wordnet_id() -> None:
    prompts = load_prompts("imagenet")
    wnids = list(prompts.names)
    assert wnids == sorted(wnids)  # the order of the classes is that of the ids
    assert list(prompts.names.values()) == list(IMAGENET_CLASSNAMES)
    assert (prompts.names["n01440764"], prompts.names["n15075141"]) == ("tench", "toilet paper")
    assert prompts.templates[0] == OPENAI_IMAGENET_TEMPLATES[0]("{c}") == "a bad photo of a {c}."


def test_the_classes_of_the_subsets_are_those_timm_lists() -> None:
    whole = list(load_prompts("imagenet").names)
    listed = resources.files("timm.data._info")
    for name in ("imagenet_a", "imagenet_r"):
        prompts = load_prompts(name)
        assert sorted(prompts.names) == sorted(listed.joinpath(f"{name}_synsets.txt").read_text().split())
        assert prompts.superset is not None
        assert [whole[number] for number in prompts.superset] == list(prompts.names)
    both = set(load_prompts("imagenet_a").names) & set(load_prompts("imagenet_r").names)
    assert len(both) == 86


def test_objectnet_stands_for_125_classes_of_imagenet() -> None:
    prompts = load_prompts("objectnet")
    assert prompts.superset is not None
    assert len(set(prompts.superset)) == len(prompts.superset) == 125
    assert len(prompts.others) == 313 - 113
    assert not prompts.others & set(prompts.names)
    behind = {IMAGENET_CLASSNAMES[number] for number in prompts.superset}
    assert {"analog clock", "digital clock", "mountain bike", "tandem bicycle", "banana"} <= behind


@pytest.mark.parametrize("key", known_sets())
def test_labels_and_names_of_a_set_are_matched_in_any_order(key: str) -> None:
    known_set = known_sets()[key]
    names = load_prompts(known_set.prompts).names
    rows = list(names.items())
    random.Random(0).shuffle(rows)
    assert match_keys(known_set, [label.upper() for label, _ in rows], "here") == [label for label, _ in rows]
    if len(set(map(spelled, names.values()))) == len(names):
        assert match_keys(known_set, [name.title() for _, name in rows], "here") == [label for label, _ in rows]
    assert match_keys(known_set, list(names.values()), "here") == list(names)


def test_a_name_that_two_classes_share_is_refused_out_of_order() -> None:
    names = list(load_prompts("imagenet").names.values())
    assert sorted({name for name in names if names.count(name) > 1}) == ["missile", "sunglasses"]
    with pytest.raises(
        DataError, match=r"4 are each the name of two classes \(sunglasses, sunglasses, missile, \.\.\.\)"
    ):
        match_keys(known_sets()["imagenet"], names[::-1], "here")
