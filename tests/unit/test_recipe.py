import itertools
import random
from pathlib import Path

import pytest
import yaml

from clip_cid.errors import ConfigError
from clip_cid.recipe import (
    PRESETS,
    LossWeights,
    Recipe,
    commented_recipe,
    dump_recipe,
    parse_recipe,
    read_recipe,
    read_run_recipe,
)


def problems(values: object) -> str:
    with pytest.raises(ConfigError) as error:
        parse_recipe(values, where="r.yaml")
    return error.value.problem


def test_the_written_recipe_with_its_comments_is_the_default_recipe():
    assert parse_recipe(yaml.safe_load(commented_recipe()), where="init") == Recipe()


def test_every_setting_has_an_explanation_in_the_written_recipe():
    lines = commented_recipe().splitlines()
    for above, line in itertools.pairwise(lines):
        if ":" in line and not line.lstrip().startswith("#"):
            assert above.lstrip().startswith("#") or above.endswith(":"), line


def test_the_written_recipe_says_what_else_a_setting_may_be():
    lines = {line.strip() for line in commented_recipe().splitlines()}
    assert "logq: kl  # none, kl, both" in lines
    assert "target_removed: null  # above 0, below 1" in lines
    assert "share: 0.0  # at least 0, at most 0.5" in lines
    assert "head_perplexity: null  # above 1" in lines
    assert "enabled: true" in lines
    for limits in ({"target_removed": 1}, {"target_removed": 0}, {"keep": "first"}, {"classify": -1}):
        assert "balance." in problems({"balance": limits})


def test_a_dumped_recipe_reads_back_equal():
    recipe = parse_recipe({"balance": {"threshold": 0.05}, "pairs": {"source": ["a.tar"]}}, where="x")
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), where="x") == recipe


def test_a_misspelt_name_gets_the_right_one():
    assert "balance.treshold: no such setting; did you mean threshold?" in problems({"balance": {"treshold": 0.1}})
    assert "distill.weights.cluster_k: no such setting; did you mean cluster_kl?" in problems(
        {"distill": {"weights": {"cluster_k": 1}}}
    )
    assert "balanc: no such setting; did you mean balance?" in problems({"balanc": {}})


def test_all_problems_are_named_at_once_with_the_file():
    text = problems({"balance": {"threshold": 0}, "cluster": {"num_centers": -3}, "distill": {"lr": "fast"}})
    assert text.startswith("r.yaml: 3 problems")
    assert "balance.threshold: input should be greater than 0, got 0" in text
    assert "cluster.num_centers" in text
    assert "got 'fast'" in text


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert parse_recipe(yaml.safe_load("distill: {lr: 1e-3}"), where="x").distill.lr == 0.001


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_stands_for_its_weights(name: str):
    distill = parse_recipe({"distill": {"weights": name}}, where="x").distill
    assert distill.weights.model_dump() == PRESETS[name].weights
    for setting, value in PRESETS[name].settings.items():
        assert getattr(distill, setting) == value
        other = parse_recipe({"distill": {"weights": name, setting: 7.0}}, where="x").distill
        assert getattr(other, setting) == 7.0  # what is said outright goes before


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"schedule": {"kl": [[0, 1]]}}, "distill.schedule: no loss named 'kl'"),
        ({"schedule": {"clip": [[0.5, 1], [0.5, 0]]}}, "schedule.clip: needs points"),
        ({"schedule": {"clip": []}}, "schedule.clip: needs points"),
        ({"augmentation": {"flip": 1.0}}, "augmentation: no flip"),
        ({"validation": {"keep": "best"}}, "need validation.share or validation.sets"),
        ({"validation": {"share": 0.1, "patience": 2}}, "set validation.keep: best"),
        ({"validation": {"sets": {"digits": "builtin:digits"}}}, "validation.metric: retrieval is measured on"),
        ({"validation": {"share": 0.1, "metric": "zero_shot"}}, "zero_shot is measured on validation.sets"),
    ],
)
def test_settings_of_the_training_that_do_not_fit_are_refused(distill: dict[str, object], message: str):
    assert message.removeprefix("distill.") in problems({"distill": distill})


def test_an_unknown_preset_is_named_with_those_there_are():
    assert "paper-r1, paper-r2, clip-only" in problems({"distill": {"weights": "paper"}})


@pytest.mark.parametrize("loss", ["clip", "siglip", "instance_image", "instance_text", "affinity", "icl"])
def test_one_pair_is_no_batch_for_a_loss_that_compares_pairs(loss: str):
    weights = dict.fromkeys(LossWeights.model_fields, 0.0) | {loss: 1.0}
    said = problems({"distill": {"batch_size": 1, "weights": weights}})
    assert f"batch_size: 1, but {loss} compare the pairs of a batch with each other: set at least 2" in said
    parse_recipe({"distill": {"batch_size": 2, "weights": weights}}, where="two")


def test_one_pair_is_a_batch_for_losses_that_look_at_each_pair_alone():
    weights = dict.fromkeys(LossWeights.model_fields, 0.0) | {"cluster_cls": 1.0, "cluster_kl": 1.0, "feature": 1.0}
    assert parse_recipe({"distill": {"batch_size": 1, "weights": weights}}, where="one").distill.batch_size == 1


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight: float):
    assert "distill.weights.clip: input should be" in problems({"distill": {"weights": {"clip": weight}}})


def test_a_recipe_without_a_loss_is_refused():
    off = dict.fromkeys(LossWeights.model_fields, 0.0)
    assert "distill.weights: all are 0" in problems({"distill": {"weights": off}})


def test_distillation_without_a_teacher_is_refused():
    assert "distill.weights: clip-only" in problems({"embed": {"teacher": "none"}})


def test_images_can_only_be_of_a_set_that_is_evaluated():
    assert (
        parse_recipe({"evaluate": {"sets": {"pets": "x"}}, "draw": {"images_of": "pets"}}, where="test").draw.images_of
        == "pets"
    )
    assert "draw.images_of: 'cats' is not among" in problems(
        {"evaluate": {"sets": {"pets": "x"}}, "draw": {"images_of": "cats"}}
    )


def test_a_truth_field_that_is_not_stored_is_refused():
    assert "pairs.keep_fields" in problems({"balance": {"truth_field": "dup"}})


def test_a_key_given_twice_is_refused_though_yaml_would_keep_the_last(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("balance:\n  threshold: 0.1\n  threshold: 0.2\n")
    with pytest.raises(ConfigError, match="'threshold' is given twice"):
        read_recipe(path)


@pytest.mark.parametrize("text", ["balance: [", "a: b: c"])
def test_broken_yaml_is_a_config_error_with_the_file(tmp_path: Path, text: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml: not valid YAML"):
        read_recipe(path)


REMOVED = "cluster: {algorithm: faiss, num_centers: 7}\nmachine: {fsdp: false, workers: 3}\n"


def test_the_recipe_of_an_older_run_is_read_without_the_settings_removed_since(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(REMOVED)
    recipe = read_run_recipe(tmp_path / "recipe.yaml")
    assert (recipe.cluster.num_centers, recipe.machine.workers) == (7, 3)


@pytest.mark.parametrize("text", [REMOVED, "machine: {fsdp: false}", "cluster: {algorithm: blocks}"])
def test_a_recipe_that_a_person_wrote_names_each_removed_setting(tmp_path: Path, text: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"was removed; .* delete this line of the recipe") as error:
        read_recipe(tmp_path / "mine.yaml")
    assert ("machine.fsdp" in str(error.value)) == ("fsdp" in text)
    assert ("cluster.algorithm" in str(error.value)) == ("algorithm" in text)


def test_a_removed_setting_that_had_an_effect_is_not_passed_over(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("machine: {fsdp: true}")
    with pytest.raises(
        ConfigError, match=r"machine\.fsdp: this setting was removed; each device holds the whole student"
    ):
        read_run_recipe(tmp_path / "recipe.yaml")


def test_an_emptied_recipe_of_a_run_is_not_a_recipe_of_defaults(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"this recipe of a run is empty.*\n.*again with --recipe FILE"):
        read_run_recipe(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == Recipe()


def test_a_missing_recipe_points_to_init(tmp_path: Path):
    with pytest.raises(ConfigError, match="clip-cid init"):
        read_recipe(tmp_path / "no.yaml")


def test_a_recipe_that_is_not_a_mapping_is_refused():
    assert "valid dictionary" in problems(["balance"])


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_ship_are_valid(path: Path):
    assert read_recipe(path).pairs.source


def test_one_text_is_a_list_of_one():
    recipe = parse_recipe(
        {
            "pairs": {"source": "folder", "keep_fields": "dup"},
            "evaluate": {"retrieval": {"flickr": "a.tar", "coco": ["b.tar", "c.tar"]}},
            "machine": {"callbacks": "package.module:name"},
        },
        where="x",
    )
    assert (recipe.pairs.source, recipe.pairs.keep_fields) == (("folder",), ("dup",))
    assert recipe.evaluate.retrieval == {"flickr": ("a.tar",), "coco": ("b.tar", "c.tar")}
    assert recipe.machine.callbacks == ("package.module:name",)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"pairs": {"keep_fields": ["dup", "kind", "dup"]}}, "pairs.keep_fields: dup is named twice"),
        (
            {"pairs": {"keep_fields": ["dup", "width", "key"]}},
            "keep_fields: key, width would hide a column the store has",
        ),
        ({"evaluate": {"compare": {"student": "run:a"}}}, "a model is named 'student', which is this run's own"),
        ({"evaluate": {"compare": {"": "run:a"}}}, "evaluate.compare..[key]: a name should be of characters"),
        ({"evaluate": {"sets": {" ": "a"}}}, "a name should be of characters that can be printed"),
        ({"evaluate": {"retrieval": {"a\nb": ["a"]}}}, "a name should be of characters that can be printed"),
        (
            {"distill": {"validation": {"sets": {"\x1b[31m": "a"}}}},
            "a name should be of characters that can be printed",
        ),
        ({"evaluate": {"sets": {"x" * 101: "a"}}}, "should have at most 100 characters"),
        ({"distill": {"lr": float("inf")}}, "distill.lr: input should be a finite number, got inf"),
        ({"distill": {"lr": "nan"}}, "distill.lr: input should be a finite number"),
        ({"balance": {"threshold": "1e999"}}, "balance.threshold: input should be a finite number"),
        ({"distill": {"augmentation": {"gray_scale_prob": float("nan")}}}, "gray_scale_prob: input should be a finite"),
        ({"distill": {"schedule": {"clip": [[0, float("inf")]]}}}, "schedule.clip.0.1: input should be a finite"),
        ({"distill": {"epochs": 10**20}}, "distill.epochs: input should fit into 64 bits"),
        ({"cluster": {"num_centers": 10**5000}}, "cluster.num_centers: input should fit into 64 bits"),
        ({"distill": {"epochs": "9" * 5000}}, "distill.epochs: unable to parse"),
        ({"draw": {"seed": 2**32}}, "draw.seed: input should be less than 4294967296"),
        ({"report": {"title": "a\0b"}}, "report.title: input should be text without zero bytes"),
        ({"evaluate": {"sets": {"a": "x\0"}}}, "evaluate.sets: input should be text without zero bytes"),
        ({"report": {"title": "\udc00"}}, "report.title: input should be text without zero bytes"),
        ({"embed": {"existing": "\udcff.npy"}}, "embed.existing: input should be text without zero bytes"),
        ({"evaluate": {"sets": {"\udcff": "x"}}}, "[key]: input should be a valid string"),
        ({"evaluate": {"sets": {2024: "x"}}}, "evaluate.sets.2024.[key]: input should be a valid string"),
        ({3: {}}, "keys should be strings"),
        ({"pairs": None}, "pairs: input should be a valid dictionary"),
    ],
)
def test_values_that_no_stage_can_use_are_refused(values: object, problem: str):
    assert problem in problems(values)


@pytest.mark.parametrize(
    "values",
    [
        {"balance": {"metric": "x" * 1_000_000}},
        {"x" * 1_000_000: 1},
        {"evaluate": {"sets": {"x" * 1_000_000: 1}}},
        {"distill": {"weights": "x" * 1_000_000}},
        {"distill": {"schedule": {"x" * 1_000_000: [[0, 1]]}}},
        {"draw": {"images_of": "x" * 1_000_000}},
        {"pairs": {"keep_fields": ["x" * 1_000_000] * 2}},
        {"pairs": {"source": [0] * 50_000}},
        {f"x{row}": 1 for row in range(50_000)},
    ],
    ids=lambda values: str(values)[:40],
)
def test_a_message_is_short_whatever_the_recipe_holds(values: object):
    assert len(problems(values)) < 10_000


def test_many_problems_are_counted_and_the_first_named():
    text = problems({"pairs": {"source": list(range(1000))}})
    assert text.startswith("r.yaml: 1,000 problems\n  pairs.source.0: input should be a valid string, got 0\n")
    assert text.endswith("and 980 more")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("pairs: {}".encode("utf-16"), r"not text in UTF-8 \(byte 0\)"),
        (b"report: {title: caf\xe9}", r"not text in UTF-8 \(byte 19\)"),
        (b"pairs: \x00", "not valid YAML"),
        (b"# " + b"x" * (5 << 20), "more than 4.2 MB, so this is not a recipe"),
    ],
)
def test_a_file_that_is_no_text_is_named_as_such(tmp_path: Path, content: bytes, problem: str):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        read_recipe(path)


@pytest.mark.parametrize("path", ["", "/dev/zero", "x" * 5000])
def test_a_path_that_is_no_recipe_is_a_config_error(tmp_path: Path, path: str):
    with pytest.raises(ConfigError) as error:
        read_recipe(tmp_path / path)
    assert len(str(error.value)) < 800


def test_a_recipe_with_a_mark_of_its_encoding_is_read(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfreport: {title: caf\xc3\xa9}\r\n")
    assert read_recipe(tmp_path / "r.yaml").report.title == "caf\u00e9"


RECIPES = [commented_recipe(), *(path.read_text() for path in sorted(Path(__file__).parents[2].glob("recipes/*.yaml")))]
ODDITIES = [
    *("[", "]", "{", "}", ":", ": ", "- ", "#", "|", ">", "&a ", "*a", "<<: *a", "!!int ", "!!float ", "!!map "),
    *(
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "? ",
        ",",
        '"',
        "'",
        "\t",
        "\n",
        "\r",
        "\0",
        "\x85",
        "\u2028",
        "\ufeff",
        "@",
        "`",
    ),
    *(
        '"\\ud83d\\ude00"',
        '"\\ud83d"',
        '"\\0"',
        "2026-02-30",
        "2026-02-30 25:61:61",
        "1:30",
        ".inf",
        "-.nan",
        "~",
        "null",
    ),
    *(
        "0x" + "f" * 5000,
        "9" * 5000,
        "-1",
        "0x",
        "0o9",
        "1e400",
        "no",
        "{a: b}",
        "[[]]",
        "!!binary ===",
        "!!timestamp 1",
        "\U0001f600",
        "é",
    ),
]


def mutant(source: random.Random) -> bytes:
    """A recipe with a few changes, mostly still a text."""
    lines = source.choice(RECIPES).splitlines(keepends=True)
    for _ in range(source.randint(1, 4)):
        line = source.randrange(len(lines))
        place = source.randint(0, len(lines[line]))
        match source.randrange(6):
            case 0:
                lines[line] = lines[line][:place] + source.choice(ODDITIES) + lines[line][place:]
            case 1:
                name = lines[line].partition(":")[0]
                lines[line] = f"{name}: {source.choice(ODDITIES)}\n"
            case 2:
                lines.insert(line, lines[source.randrange(len(lines))])
            case 3:
                lines[line] = " " * source.randint(0, 6) + lines[line].lstrip()
            case 4:
                lines[line] = lines[line][:place]
            case _:
                lines = lines[: line + 1]
    content = "".join(lines).encode("utf-8", "surrogatepass")
    if source.random() < 0.2:
        place = source.randrange(len(content) + 1)
        content = content[:place] + source.randbytes(source.randint(1, 3)) + content[place + source.randint(0, 2) :]
    return content


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_recipe_is_a_recipe_or_a_config_error(tmp_path: Path, seed: int):
    """400 of them. What is read is stored and read again as it is."""
    source, path = random.Random(seed), tmp_path / "r.yaml"
    outcomes, longest = {"read": 0, "refused": 0}, 0
    for _ in range(50):
        path.write_bytes(mutant(source))
        try:
            recipe = read_recipe(path)
        except ConfigError as error:
            outcomes["refused"] += 1
            longest = max(longest, len(str(error)))
            continue
        outcomes["read"] += 1
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert read_run_recipe(path) == recipe
    assert min(outcomes.values()) > 0
    assert longest < 10_000


# Texts without images


def test_a_quarter_of_the_batch_is_read_as_texts_without_images_by_default():
    assert parse_recipe({"distill": {"batch_size": 100}}, where="test").distill.lines_per_step == 25
    assert parse_recipe({"distill": {"batch_size": 2}}, where="test").distill.lines_per_step == 1
    assert parse_recipe({"distill": {"texts_per_step": 7}}, where="test").distill.lines_per_step == 7


def test_texts_are_used_where_a_loss_reads_a_text_alone_and_need_the_teacher_itself():
    texts = {"texts": "words.txt"}
    assert not parse_recipe({"distill": {**texts, "weights": "clip-cid"}}, where="test").uses("texts")
    used = {"distill": {**texts, "weights": PRESETS["clip-cid"].weights | {"bank_text": 1.0}}}
    assert parse_recipe(used, where="test").uses("texts")
    assert parse_recipe(used, where="test").distill.text_files == (Path("words.txt"),)
    with pytest.raises(ConfigError, match=r"distill\.texts: the teacher embeds them, but embed\.existing"):
        parse_recipe({**used, "embed": {"existing": "store"}}, where="test")


# Images without a caption


def test_images_without_a_caption_need_a_teacher_and_no_clusters_of_texts():
    optional = {"pairs": {"captions": "optional"}}
    assert parse_recipe(optional, where="test").pairs.captions_are_optional
    for more, words in (
        ({"embed": {"teacher": "none"}, "distill": {"weights": "clip-only"}}, "only a teacher can say something of"),
        ({"cluster": {"texts": True}}, r"cluster\.texts needs a caption for every image"),
        (
            {"distill": {"weights": {"cross_cluster_text": 1.0}}},
            r"distill\.weights\.cross_cluster_text needs a caption",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_recipe({**optional, **more}, where="test")


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ("embed", {"teacher": "s3://bucket/teacher"}),
        ("embed", {"teacher": "ViT-B-32/https://user:pw@host/x.pt"}),
        ("embed", {"teacher": "local-dir:hf://org/name"}),
        ("embed", {"pretrained": "https://user:pw@host/x.pt?sig=1"}),
        ("distill", {"student": "gs://bucket/student.json"}),
        ("distill", {"pretrained": "s3://bucket/x.pt"}),
        ("distill", {"text_tower": "local-dir:s3://bucket/x"}),
        ("evaluate", {"compare": {"old": "s3://bucket/x"}}),
    ],
)
def test_a_model_at_an_address_is_refused_with_what_to_do(section: str, setting: dict[str, object]):
    with pytest.raises(ConfigError, match="models are not read from addresses") as error:
        parse_recipe({section: setting}, where="test")
    assert "hf-hub:ORG/NAME" in str(error.value)
    assert "pw" not in str(error.value)
    for name in ("hf-hub:org/name", "local-dir:/a/b", "ViT-B-32/./x.pt", "hf-hub:timm/ViT-B-16-SigLIP"):
        parse_recipe({"embed": {"teacher": name}}, where="test")
