import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_run import LOCAL, finished_run, publish
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from clip_cid.errors import DataError, RunError
from clip_cid.publish.model_card import markdown_text, model_card
from clip_cid.run_folder import RunFolder


def body(card: str) -> str:
    return card.split("---\n", 2)[2]


def tokens(markdown: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(markdown)


def shown(token: Token) -> str:
    """The text a reader sees."""
    return "".join(child.content for child in token.children or [])


def tables(card: str) -> list[list[list[str]]]:
    """Every table of the card as a Markdown parser sees it."""
    found: list[list[list[str]]] = []
    inside = ""
    for token in tokens(body(card)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            inside = token.type
        elif token.type == "inline" and inside:
            found[-1][-1].append(shown(token))
            inside = ""
    return found


def facts(card: str) -> dict[str, str]:
    """The tables of two columns, as one."""
    return {row[0]: row[1] for table in tables(card) if len(table[0]) == 2 for row in table[1:]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("card") / "run")


@pytest.fixture(scope="module")
def card(run: RunFolder) -> str:
    return model_card(run, "me/tiny-clip", license="apache-2.0")


def test_the_hub_reads_the_front_matter(card: str) -> None:
    data = ModelCard(card).data.to_dict()
    assert data == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "license": "apache-2.0",
        "tags": ["clip", "clip-cid", "distillation"],
    }


def test_without_a_license_none_is_claimed(run: RunFolder) -> None:
    assert "license" not in ModelCard(model_card(run, "me/x", license=None)).data.to_dict()


def test_every_number_comes_from_the_records(card: str) -> None:
    found = facts(card)
    expected = {
        "parameters of the image tower": "20,000",
        "parameters of the text tower": "400,000",
        "width of the embeddings": "12",
        "image size": "32 x 32",
        "context length": "9 tokens",
        "teacher": "local-dir:teacher (a model of the author's own)",
        "SHA-256 of the teacher's weights": "abc123",
        "image-text pairs": "1,234",
        "of them usable": "1,200",
        "threshold of near-duplicates": "0.05 (cosine) = 0.1 (squared euclidean) = 0.316 (euclidean)",
        "near-duplicates removed": "300 (25.0 %)",
        "kept": "900",
        "clusters of the kept images": "64",
        "pairs trained on": "890",
        "steps": "3",
        "pairs seen": "48",
        "batch size": "16",
        "arithmetic": "float32 on cpu",
        "open_clip_torch": "3.3.0",
    }
    assert {key: found[key] for key in expected} == expected


def test_the_cost_of_each_model_is_a_table_and_an_older_evaluation_shows_none(run: RunFolder, tmp_path: Path) -> None:
    assert "### Cost" not in model_card(run, "me/x", license=None)
    shutil.copytree(run.path, tmp_path / "run")
    manifest = tmp_path / "run/evaluate/manifest.json"
    values = json.loads(manifest.read_text())
    cost = {"model": "student", "key": "k", "machine": "a | machine", "image_parameters": 20_000}
    cost |= {"text_parameters": 400_000, "image_flops": 2_500_000, "text_flops": None}
    values["summary"]["costs"] = [{**cost, "latency": [{"batch": 64, "image_ms": 12.5, "text_ms": 3.25}]}]
    manifest.write_text(json.dumps(values))

    card = model_card(RunFolder(tmp_path / "run"), "me/x", license=None)
    (table,) = [table for table in tables(card) if "GFLOPs an image" in table[0]]
    assert table[1] == ["student", "20,000", "400,000", "0.0025", "-", "12.5", "3.25"]
    assert table[0][-2:] == ["ms of 64 images", "ms of 64 texts"]
    assert "times measured on a &#124; machine." in card


def test_the_weights_are_those_of_the_recipe_whatever_their_names(run: RunFolder, card: str) -> None:
    config = json.loads((run.path / "distill/student/open_clip_config.json").read_text())
    weights = config["clip_cid"]["recipe"]["distill"]["weights"]
    (table,) = [table for table in tables(card) if table[0] == ["loss (others are off)", "weight"]]
    assert {name: float(weight) for name, weight in table[1:]} == {name: w for name, w in weights.items() if w}


def test_few_pairs_of_a_cluster_and_weights_of_gradients_are_told(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    config = run.path / "distill/student/open_clip_config.json"
    made = json.loads(config.read_text())
    made["clip_cid"]["recipe"]["distill"] |= {"per_cluster": 7, "weigh_gradients_every": 50}
    config.write_text(json.dumps(made))
    manifest = run.path / "distill/manifest.json"
    record = json.loads(manifest.read_text())
    record["summary"] |= {"epoch_pairs": 1234, "epochs": 2.5, "weight/clip": 0.25, "weight/feature": 131.5}
    manifest.write_text(json.dumps(record))
    found = facts(model_card(run, "me/tiny-clip", license=None))
    assert found["epochs"] == "2.5 of 1,234 pairs each, at most 7 of a cluster"
    assert "proportions of the gradients; in the last step they meant clip 0.25, feature 132" in found["weights above"]


def test_the_scores_stand_with_their_intervals_and_a_bar_in_a_name_does_not_break_the_table(card: str) -> None:
    zero_shot, probe, retrieval = [table for table in tables(card) if table[0][0] == "set"]
    assert zero_shot == [
        ["set", "metric", "n", "chance", "student", "base"],
        ["cifar|10", "top1", "1,000", "10.0", "50.0 [37.5, 62.5]", "62.5 [50.0, 75.0]"],
    ]
    assert probe[1] == ["cifar|10", "top1", "1,000", "10.0", "75.0 [62.5, 87.5]"]
    assert retrieval[1][:2] == ["heldout", "image to text R@1"]
    assert "In the recipe but not measured: flowers." in card
    assert '"base" is ViT-B-32/laion400m&#95;e32, "old" is run:old (a model' in card


def test_nothing_local_is_in_the_card(card: str) -> None:
    for secret in ("ada", "secret", "SECRET", "host.example", LOCAL):
        assert secret not in card


def test_the_recipe_in_the_card_is_whole_yaml(card: str) -> None:
    (fence,) = [token for token in tokens(body(card)) if token.type == "fence" and token.info == "yaml"]
    recipe = yaml.safe_load(fence.content)
    assert recipe["balance"]["threshold"] == 0.05
    assert recipe["pairs"]["source"] == ["{00..09}.tar", "more.tar"]


def test_a_run_that_was_not_evaluated_says_so(tmp_path: Path) -> None:
    card = model_card(finished_run(tmp_path / "run", evaluated=False), "me/x", license=None)
    assert "This model was not evaluated." in card
    assert "The scores were measured" not in card


def test_stages_run_again_since_say_nothing_of_this_student(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished_run(tmp_path / "run")
    publish(run, "balance", {"kept": 1, "removed": 2, "removed_share": 0.6}, ("embed",), version=2)
    found = facts(model_card(run, "me/x", license=None))
    assert "kept" not in found
    assert found["clusters of the kept images"] == "64"
    assert "balance does not belong to this student any more" in caplog.text


def test_the_evaluation_of_another_student_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished_run(tmp_path / "run")
    manifest = run.path / "distill" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"distill-1"', '"distill-2"'))
    assert "This model was not evaluated." in model_card(run, "me/x", license=None)
    assert "evaluate does not belong to this student any more" in caplog.text


def test_a_run_without_a_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the distill stage has not finished"):
        model_card(RunFolder(tmp_path), "me/x", license=None)


def test_records_of_another_version_are_refused_in_words(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    manifest = run.path / "distill" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"parameters"', '"params"'))
    with pytest.raises(
        RunError, match=r"the summary of the distill stage is not of this version \(KeyError: 'parameters'\)"
    ):
        model_card(run, "me/x", license=None)


def test_broken_results_are_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run.path / "evaluate/results.jsonl").write_text('{"model": "student"}\n')
    with pytest.raises(DataError, match=r"results\.jsonl, line 1: not a result with shares of 1"):
        model_card(run, "me/x", license=None)


@pytest.mark.parametrize(
    "hostile",
    [
        "a|b",
        "*bold* _em_ **x** ~~gone~~ `code`",
        "<script>alert(1)</script> &lt;",
        "[text](http://example.com) ![image](x)",
        "http://example.com www.x.org me@example.com",
        r"back\slash \| \\",
        "two\nlines\r\nand a | bar",
        "</details> # heading --- ```",
        "$x$ and $$y$$",
    ],
)
def test_a_hostile_name_is_shown_as_it_is_in_one_cell(hostile: str) -> None:
    parsed: list[Any] = tokens(f"| a | b |\n|---|---|\n| {markdown_text(hostile)} | 1 |\n")
    cells = [token for token in parsed if token.type == "inline"][2:]
    assert [shown(cell) for cell in cells] == [" ".join(hostile.split()), "1"]
    assert {child.type for cell in cells for child in cell.children} <= {"text", "text_special"}


def test_a_student_without_a_teacher_is_not_called_distilled(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", evaluated=False)
    config = run.path / "distill/student/open_clip_config.json"
    values = json.loads(config.read_text())
    values["clip_cid"]["teacher"] = None
    config.write_text(json.dumps(values))
    for stage in ("embed", "balance", "cluster"):
        shutil.rmtree(run.path / stage)
    card = model_card(run, "me/x", license=None)
    assert ModelCard(card).data.get("tags") == ["clip", "clip-cid"]
    assert "without a teacher" in card
    assert "distilled" not in body(card)
    found = facts(card)
    assert found["teacher"] == "none"
    assert found["pairs trained on"] == "890"
    assert "kept" not in found
    assert "were not searched" in card
