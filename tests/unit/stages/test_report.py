import contextlib
import csv
import html.parser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated_run import (
    COPIES,
    GROUPS,
    HOSTILE,
    PLAIN,
    ROWS,
    TRAINED,
    fake_clip,
    make_recipe,
    make_run,
    publish,
)
from PIL import Image

from clip_cid.data.pairs.pictures import NoPicturesError
from clip_cid.errors import RunError
from clip_cid.models.public_names import public_settings
from clip_cid.recipe import Recipe, as_yaml
from clip_cid.report import parts
from clip_cid.report.drawing import run_inputs
from clip_cid.run_folder import RunFolder
from clip_cid.stages import draw, report
from clip_cid.summaries import as_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Everything a test asks of a page: elements with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Recipe]:
    """A run of everything, drawn; its report is still to be written."""
    return drawn(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def written(full: tuple[RunFolder, Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Its report, with its summary. Only to be read; it lies where no other report of the run takes its place."""
    out, summary = write(*full)
    return shutil.copytree(out, tmp_path_factory.mktemp("written") / "report"), summary


def drawn(base: Path, **changed: dict[str, Any]) -> tuple[RunFolder, Recipe]:
    recipe = make_recipe(base, **changed)
    folder = make_run(base, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_inputs, "load_clip", fake_clip)
        redraw(folder, recipe)
    return folder, recipe


def redraw(folder: RunFolder, recipe: Recipe) -> None:
    summary = draw.run(folder, folder.begin("draw", {"key": "key"}, resumable=False).part, recipe)
    publish(folder, "draw", as_json(summary))


def write(folder: RunFolder, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    out = folder.begin("report", {"key": "key"}, resumable=False).part
    return out, as_json(report.run(folder, out, recipe))


@contextlib.contextmanager
def rotten(path: Path, content: bytes) -> Iterator[None]:
    """For a while the file has other bytes, with the time of writing that it had: as when a disk rots."""
    whole, time = path.read_bytes(), path.stat().st_mtime_ns
    try:
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        yield
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(time, time))


def read(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_nothing_on_the_page_is_fetched_and_nothing_runs(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            value = attributes.get(name)
            here = tag == "a" and (value or "").startswith("tables/")  # opened by a click, and beside the page
            assert value is None or here or value.startswith(("data:", "#")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert not page.all("script")
    assert "@import" not in text
    assert all(address.startswith("#") for address in re.findall(r"url\(['\"]?([^)]*)", text))
    assert not re.findall(r"https?://", text)


def test_every_address_inside_the_page_leads_somewhere(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    wanted = {
        value[1:] for _, a in page.elements for n in ("href", "xlink:href") if (value := a.get(n) or "").startswith("#")
    }
    assert wanted | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(names)
    assert {"balance", "clusters", "scores"} <= wanted
    linked = {href for a in page.all("a") if not (href := a["href"] or "").startswith("#")}
    assert linked == {f"tables/{path.name}" for path in (out / "tables").iterdir()}


def test_every_picture_says_what_it_shows(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    page = read(out)
    assert len(page.all("img")) >= GROUPS * COPIES
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("svg"))


def test_captions_are_text_and_never_markup(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "<i>" not in text.replace("<i></i>", "")
    assert "<b>three" not in text
    assert f"{HOSTILE} 0" in [attributes["alt"] for attributes in page.all("img")]
    assert f"{HOSTILE} 0" in [attributes.get("title") for attributes in page.all("figure")]
    assert "image <i>cannot</i> be decoded" in page.text
    assert "lost: no such <folder>" in page.text
    assert "<b>three</b>" in page.text


def test_the_numbers_are_those_of_the_summaries(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = full
    out, _ = written
    text = read(out).text
    record = folder.record("balance")
    assert record is not None
    balance = record.summary
    assert f"pairs in {balance['images']} 1 skipped" in text
    assert f"removed {balance['removed']} {100 * balance['removed_share']:.1f} % of the usable ones" in text
    assert f"sets of duplicates {balance['sets_with_duplicates']} the largest has {balance['largest_set']}" in text
    assert "threshold, cosine 0.05 = 0.1 squared euclidean, 0.3162 euclidean" in text
    assert "true pairs among those joined 93.8 %" in text
    assert "true pairs found 81.2 %" in text
    assert "teacher the-teacher 16 dimensions" in text
    assert "300 steps, 1,200 pairs seen" in text
    assert "wall time 6m09s" in text  # six stages of 61.5 seconds
    drawing = folder.record("draw")
    assert drawing is not None
    before, after = drawing.summary["figures"]["cluster_sizes"].values()
    assert f"Gini coefficient {before['gini']:.3f} {after['gini']:.3f}" in text
    assert "mean of 3/4" in text
    assert "numpy 9.9.9" in text


def test_the_clusters_have_their_objective_by_round_and_their_purity(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = full
    out, _ = written
    text = read(out).text
    record = folder.record("cluster")
    assert record is not None
    summary = record.summary
    first, last = summary["history"][0], summary["history"][-1]
    assert f"objective (Eq. 1) {first['objective']:.5f} {last['objective']:.5f} {summary['objective']:.5f}" in text
    within, overall = (f"{summary[name]:.3f}" for name in ("within_cosine", "all_pairs_cosine"))
    assert f"Mean cosine of two images of one cluster {within}, of any two images {overall}." in text
    assert "size of the cluster, at most " + " ".join(map(str, summary["size_quantiles"].values())) in text
    assert f"({summary['margin_sample']} images)" in text
    assert (
        "Purity by <thing> : 81.2 % of 1,234 images have the most frequent class of their cluster (6 classes)" in text
    )
    assert "with classes assigned at random it would be 25.0 %" in text
    with (out / "tables" / "cluster_rounds.csv").open() as handle:
        rounds = list(csv.DictReader(handle))
    assert [float(line["objective"]) for line in rounds] == [entry["objective"] for entry in summary["history"]]


def test_what_the_models_look_at_is_told_with_pictures_and_without_markup(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    page = read(out)
    shown = {attributes.get("id") for attributes in page.all("figure")}
    assert {"activation_maps", "patch_pca", "single_linkage", "embedding_map"} <= shown
    assert len(page.all("image")) == (1 + 3) * 3 + (1 + 3) * 6 + COPIES  # three classes; of each two images at most
    assert (
        "an image of the set two and the prompt of its class, such as \N{LEFT DOUBLE QUOTATION MARK}<i>a</i> "
        in page.text
    )
    assert "shared with teacher" in page.text
    assert "What a validation measured" not in page.text


@pytest.mark.slow
def test_what_a_validation_measured_is_told(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    folder = make_run(tmp_path, recipe)
    with open(folder.path / "distill" / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write('{"step": 300, "val/loss": 1.25, "val/zero_shot": 0.5, "val/zero_shot/pets": 0.75}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "FIGURES", [figure for figure in draw.FIGURES if figure.name == "losses"])
        redraw(folder, recipe)
    text = read(write(folder, recipe)[0]).text
    assert "Validation results are in the second color" in text
    assert "total (validation) 1.250 1.250 zero shot (validation) 0.500 0.500" in text
    assert "pets" not in text.split("All settings")[0]


def test_retrieval_counts_queries_and_not_images(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    folder = make_run(tmp_path, recipe)
    line = {
        "model": "student",
        "set": "coco",
        "task": "retrieval",
        "metric": "text_to_image_R@1",
        "score": 0.5,
        "n": 721,
    }
    with open(folder.path / "evaluate" / "results.jsonl", "a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")
    (folder.path / "evaluate" / "retrieval.json").write_text(
        '{"mean": {}, "mean_of": "1/1", "missing": {}, "differences": []}'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "FIGURES", [])
        redraw(folder, recipe)
    text = read(write(folder, recipe)[0]).text
    assert "Retrieval set metric queries classes" in text
    assert "coco text to image R@1 721" in text


@pytest.mark.slow
def test_models_without_patches_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "its image tower is a <Thing>."
    monkeypatch.setattr(
        run_inputs, "why_no_patches", lambda clip: reason if clip is fake_clip("run:t", device="auto") else None
    )
    folder, recipe = drawn(tmp_path)
    text = read(write(folder, recipe)[0]).text
    assert text.count(f"Without the teacher: {reason}") == 2
    assert "shared with student" in text


def test_the_bar_is_to_scale(full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = full
    out, _ = written
    widths = re.findall(r'<span class="(\w+)" style="width: ([\d.]+)%"', (out / "report.html").read_text())
    kept = len(np.load(folder.stage("balance") / "kept.npy"))
    expected = {"kept": kept, "removed": ROWS - 1 - kept, "skipped": 1}
    assert {name: float(width) for name, width in widths} == pytest.approx(
        {name: 100 * count / ROWS for name, count in expected.items()}, abs=1e-3
    )


def test_scores_deltas_and_chance_are_in_the_table(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    text = read(out).text
    assert "set metric images classes chance student baseline teacher vs baseline vs teacher" in text
    plain = text.replace("\N{EN DASH}", "to").replace("\N{MINUS SIGN}", "-")
    paired = "-7.0 -10.0 to -4.0 -14.0 -17.0 to -11.0"
    assert f"one top-1 1,234 10 10.0 30.0 28.0 to 32.0 37.0 35.0 to 39.0 44.0 42.0 to 46.0 {paired}" in plain
    assert f"lost not measured {5 * 'to '}mean of 3/4 40.0 47.0 54.0 {paired}" in plain
    with open(out / "tables" / "scores.csv", newline="") as handle:
        first = next(csv.DictReader(handle))
    assert (float(first["student"]), float(first["delta_to_baseline"])) == (0.3, pytest.approx(-0.07))


def test_settings_are_all_there_and_so_are_the_commands(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]]
) -> None:
    folder, recipe = full
    out, _ = written
    page = read(out)
    assert as_yaml(public_settings(recipe.model_dump(mode="json"))) in page.words
    assert f"clip-cid verify {folder.path.name}" in page.text


def test_equal_runs_give_equal_bytes(full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]]) -> None:
    first = (written[0] / "report.html").read_bytes()
    assert first == (write(*full)[0] / "report.html").read_bytes()


def test_every_csv_of_a_figure_is_a_table_of_the_report(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = full
    out, _ = written
    for path in folder.stage("draw").glob("*.csv"):
        assert (out / "tables" / path.name).read_bytes() == path.read_bytes()
    assert {"scores", "skipped", "stages"} < {path.stem for path in (out / "tables").iterdir()}


@pytest.mark.parametrize("images", [True, False])
def test_no_secret_and_no_local_path_of_the_recipe_is_published(tmp_path: Path, images: bool) -> None:
    """Sources, models, sets, the reasons of what failed, names that are paths, and the folder of the run itself."""
    base = tmp_path / "Grace Hopper" / "top-secret"
    recipe = make_recipe(base, evaluate={"compare": {f"run:{base}/runs/old": f"run:{base}/runs/old"}})
    folder = make_run(base, recipe)
    secrets = {
        "pairs": {"source": ["https://ada:PASSWORD@127.0.0.1:9/TENANT/x.tar?X-Amz-Signature=SIGNED&token=TOKEN"]},
        "embed": {"teacher": f"local-dir:{base}/teacher-of-ours"},
        "distill": {"student": f"{base}/models/tiny.json"},
        "machine": {"cache_dir": str(base / "cache")},
        "report": {"images": images},
    }
    recipe = make_recipe(base, **secrets, evaluate=recipe.evaluate.model_dump())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_inputs, "load_clip", fake_clip)
        redraw(folder, recipe)
    out, _ = write(folder, recipe)

    page = read(out)
    assert "the pairs cannot be read (x.tar" in page.text or not images
    assert all(name in page.text for name in ("teacher-of-ours", "tiny.json", "run:old"))
    planted = ("Grace", "top-secret", "PASSWORD", "TENANT", "SIGNED", "TOKEN", "127.0.0.1", str(tmp_path))
    for path in (path for path in out.rglob("*") if path.is_file() and path.name != "stage-key"):
        text = path.read_text(encoding="utf-8")
        assert not [secret for secret in planted if secret in text], path


def test_a_command_behind_a_pipe_is_not_published(full: tuple[RunFolder, Recipe]) -> None:
    folder, recipe = full
    command = "pipe:curl -H 'Authorization: Bearer HEADER' https://host.example/{00..03}.tar?key=KEY"
    changed = recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"source": (command,)})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "open_pictures", _refuse(command.replace("{00..03}", "02")))
        out, _ = write(folder, changed)
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "pipe:...: cannot be fetched" in text
    assert not [secret for secret in ("curl", "Authorization", "HEADER", "KEY", "host.example") if secret in text]


def _refuse(source: str) -> Any:
    def refuse(*_: Any) -> None:
        raise NoPicturesError(f"the pairs cannot be read ({source}: cannot be fetched)")

    return refuse


def test_with_images_off_no_picture_caption_or_key_is_left(full: tuple[RunFolder, Recipe]) -> None:
    folder, _ = full
    out, summary = write(folder, make_recipe(folder.path.parent, report={"images": False}))
    page = read(out)
    assert page.all("img") == page.all("image") == []
    assert {"embedding_map", "cluster_sizes"} < {attributes.get("id") for attributes in page.all("figure")}
    assert "alert(1)" not in page.text
    assert "picture 1" not in page.text
    assert "report.images is off" in page.text
    assert summary["picture_bytes"] == 0
    assert all("alert(1)" not in path.read_text() for path in (out / "tables").iterdir())


def test_pairs_that_are_gone_leave_a_page_that_says_so(full: tuple[RunFolder, Recipe]) -> None:
    folder, _ = full
    out, _ = write(folder, make_recipe(folder.path.parent, pairs={"source": [str(folder.path / "gone")]}))
    page = read(out)
    assert page.all("img") == []
    assert "No pictures on this page: the pairs cannot be read" in page.text
    assert "sets of duplicates 4" in page.text


@pytest.mark.slow
def test_pictures_stop_at_the_budget_and_are_counted(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = written[1]["picture_bytes"]
    monkeypatch.setattr(parts, "_THUMBNAIL_BUDGET", everything // 2)
    out, summary = write(*full)
    assert 0 < summary["picture_bytes"] <= everything // 2
    assert "pictures were left out to keep the page small" in read(out).text


@pytest.mark.slow
def test_a_picture_lost_since_is_an_empty_place_and_counted(full: tuple[RunFolder, Recipe]) -> None:
    folder, recipe = full
    with rotten(folder.path.parent / "pairs" / "001.png", b"no longer an image"):
        out, _ = write(folder, recipe)
    text = read(out).text
    assert "no picture" in text
    assert "1 pictures could not be read" in text


@pytest.mark.slow
def test_a_plain_run_has_a_page_without_the_missing_parts(tmp_path: Path) -> None:
    folder, recipe = drawn(tmp_path, **PLAIN)
    out, _ = write(folder, recipe)
    page = read(out)
    sections = [attributes.get("id") for attributes in page.all("section")]
    assert sections == ["pairs", "training", "scores", "inside", "skipped", "provenance"]
    assert "pairs in 14 plain CLIP training" in page.text
    assert "vs " not in page.text
    assert "distances: this recipe does not balance" in page.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("absent", "sections"),
    [
        (("distill", "evaluate"), ["pairs", "balance", "clusters", "skipped", "provenance"]),
        (("cluster", "distill", "evaluate"), ["pairs", "balance", "skipped", "provenance"]),
        (("balance", "cluster", "distill", "evaluate"), ["pairs", "skipped", "provenance"]),
    ],
)
def test_a_run_without_a_student_has_a_page_of_what_is_there(
    tmp_path: Path, absent: tuple[str, ...], sections: list[str]
) -> None:
    recipe = make_recipe(tmp_path)
    folder = make_run(tmp_path, recipe)
    for stage in absent:
        shutil.rmtree(folder.path / stage)
    redraw(folder, recipe)
    page = read(write(folder, recipe)[0])
    assert [attributes.get("id") for attributes in page.all("section")] == sections
    assert f"not run: {', '.join(absent)}." in page.text
    assert "losses: distill has not run" in page.text


def test_the_contents_name_every_section_with_its_heading(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    text = (out / "report.html").read_text(encoding="utf-8")
    contents = text[text.index('<nav class="contents"') : text.index("</nav>")]
    linked = re.findall(r'<a href="#([^"]*)">([^<]*)</a>', contents)
    assert [name for name, _ in linked] == [attributes.get("id") for attributes in read(out).all("section")]
    assert dict(linked)["balance"] == "What the balance removed"


def test_kept_rows_made_elsewhere_are_named(full: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, recipe = full
    absent = dict.fromkeys(("threshold", "truth", "chains", "kinds"))
    with_summary(monkeypatch, folder, {**absent, "from": "kept&.npy"})
    out, _ = write(folder, recipe)
    text = read(out).text
    assert "The kept rows were made elsewhere, in kept&.npy" in text
    assert "threshold none" in text
    assert "(precision)" not in text


@pytest.mark.slow
def test_sets_that_keep_more_than_one_image_are_told(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]]
) -> None:
    folder, recipe = full
    assert "keeps more than one" not in read(written[0]).text
    within = recipe.model_copy(update={"balance": recipe.balance.model_copy(update={"max_radius": 0.125})})
    text = read(write(folder, within)[0]).text
    assert "and a set keeps more than one where a removed image would be farther than 0.125 from the kept one." in text


def test_pairs_that_the_balance_removed_are_not_called_used(
    full: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_skipped", lambda *_: [])
    text = read(write(*full)[0]).text
    assert "every pair could be read" in text
    assert "every pair was used" not in text


def test_the_shares_of_perceptual_and_semantic_duplicates_are_told_with_examples(
    full: tuple[RunFolder, Recipe],
    written: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = full
    out, _ = written
    page = read(out)
    assert (
        "Of 4 removed images drawn at random and compared, 50.0 % (15.0 \N{EN DASH} 85.0) have nearly the same pixels"
        in page.text
    )
    assert "2 more were drawn and could not be compared" in page.text
    assert "Perceptual duplicates Pairs with nearly the same pixels, drawn at random" in page.text
    assert "Semantic duplicates Pairs with other pixels" in page.text
    with open(folder.stage("draw") / "removed_pairs.csv", newline="") as handle:
        pairs = list(csv.DictReader(handle))
    assert {line["kind"] for line in pairs} == {"perceptual", "semantic"}
    assert all(line["distance"] == "0.0" for line in pairs[::2])
    assert page.text.count(" kept ") >= len(pairs) // 2 + GROUPS


def test_a_run_balanced_without_kinds_or_chains_has_a_page(
    full: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = full
    with_summary(monkeypatch, folder, {"kinds": None, "chains": None})
    assert "drawn at random and compared, 50" not in read(write(folder, recipe)[0]).text


@pytest.mark.slow
def test_chained_sets_are_warned_of(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = full
    giant = {"set": 3, "size": 5000, "share_of_rows": 0.25, "beyond_threshold_share": 0.97, "farthest": 1.134}
    giant["widest"] = 1.5
    chains = {"beyond_threshold_share": 0.9, "distance": {"0.99": 0.9876}, "largest": 5000, "top_sizes": [5000]}
    chains["giants"] = [giant]
    assert "chained images" not in read(written[0]).text
    with_summary(monkeypatch, folder, {"chains": chains})
    text = read(write(folder, recipe)[0]).text
    assert "1 set of chained images. Linked one by one" in text
    assert "5,000 images (25.0 % of all), 97.0 % of its removed images are farther than the threshold" in text
    assert "up to 1.134 ." in text.replace("1.134.", "1.134 .")
    assert "99 % are within 0.9876" in text


def with_summary(
    patch: pytest.MonkeyPatch, folder: RunFolder, changed: dict[str, Any], *, stage: str = "balance"
) -> None:
    """The run, with other numbers in a stage's summary; None leaves one out."""
    records = {name: folder.record(name) for name in ("embed", "balance", "cluster", "distill", "evaluate", "draw")}
    record = records[stage]
    assert record is not None
    summary = {name: value for name, value in (record.summary | changed).items() if value is not None}
    records[stage] = replace(record, summary=summary)
    patch.setattr(RunFolder, "record", lambda _, stage: records[stage])


@pytest.mark.slow
def test_a_run_that_evaluates_nothing_has_a_page(tmp_path: Path) -> None:
    folder, recipe = drawn(tmp_path, evaluate={"sets": {}, "compare": {}})
    out, _ = write(folder, recipe)
    assert "scores" not in [attributes.get("id") for attributes in read(out).all("section")]


def test_a_large_set_is_folded_and_the_rest_counted(full: tuple[RunFolder, Recipe]) -> None:
    folder, recipe = full
    table = folder.stage("draw") / "removed_sets.csv"
    kept = table.read_bytes()
    with open(table, newline="") as handle:
        rows = list(csv.DictReader(handle))[:COPIES]
    facts = {"size": "100", "component_size": "1234", "widest_pair": "0.5", "widest_exact": "False"}
    many = [{**rows[min(place, COPIES - 1)], **facts, "place": str(place)} for place in range(20)]
    try:
        with open(table, "w", newline="") as handle:
            writer = csv.DictWriter(handle, many[0].keys())
            writer.writeheader()
            writer.writerows(many)
        out, _ = write(folder, recipe)
    finally:
        table.write_bytes(kept)
    text = read(out).text
    assert "100 images of a connected set of 1,234, farthest" in text
    assert "widest pair at least 0.500 (threshold 0.05), weakest link" in text
    assert "80 not shown" in text
    assert "8 more" in text


def test_a_run_that_was_not_drawn_is_named_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the draw stage has not finished") as error:
        report.run(RunFolder(tmp_path), tmp_path, Recipe())
    assert f"clip-cid draw {tmp_path}" in str(error.value)


def test_the_first_screen_says_what_was_removed_how_the_clusters_changed_and_who_is_ahead(
    written: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = written
    page = read(out)
    first = page.text.split("What went in")[0].replace("\N{MINUS SIGN}", "-")
    assert f"{100 * GROUPS * (COPIES - 1) / (ROWS - 1):.1f} % removed as duplicates" in first
    assert "belong together, and 81.2 % of all true pairs were found" in first
    assert "perceptual \N{LEFT DOUBLE QUOTATION MARK}<script>alert(1)</script>" in first
    assert "semantic \N{LEFT DOUBLE QUOTATION MARK}<script>alert(1)</script>" in first
    assert "-7.0 points student against baseline" in first
    assert "40.0 % against 47.0 % (zero-shot, mean of 3/4)" in first
    assert "over the same images: -10.0 to -4.0. The interval does not contain 0: the baseline is ahead" in first
    assert "How the baseline was trained is not known here" in first
    assert {"gain", "cluster_sizes_small"} <= {attributes.get("id") for attributes in page.all("figure")}


@pytest.mark.slow
def test_equal_steps_are_read_from_the_baselines_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, recipe = drawn(
        tmp_path, evaluate={"compare": {"baseline": f"run:{tmp_path / 'other'}", "teacher": "run:t"}}
    )
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    part = other.begin("distill", {"key": "key"}, resumable=False).part
    (part / "student").mkdir()
    plain = make_recipe(tmp_path, **PLAIN).distill.model_dump(mode="json")
    publish(other, "distill", TRAINED, settings={"distill": plain})
    text = read(write(folder, recipe)[0]).text
    assert "The baseline is plain CLIP (its loss alone), the same architecture, at equal steps" in text
    assert "both took 300 and saw 1,200 pairs" in text


@pytest.mark.slow
def test_without_a_baseline_nothing_is_said_of_a_gain(tmp_path: Path) -> None:
    folder, recipe = drawn(tmp_path, evaluate={"compare": {"teacher": "run:t"}})
    page = read(write(folder, recipe)[0])
    assert "removed as duplicates" in page.text
    assert "student against" not in page.text
    assert "gain: the only model to compare the student with is the teacher" in page.text


@pytest.mark.slow
def test_the_training_tells_its_speed_its_waiting_and_what_it_skipped(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = full
    text = read(written[0]).text
    # The log's lines are steps 10 to 300, at 1000 + step pairs a second and 1 / step of the time waiting.
    assert "pairs a second, median 1,155 slowest and fastest 1,010 and 1,300" in text
    assert "at most 10.0 % steps skipped 0 pairs that could not be read 3" in text
    assert "steps were skipped" not in text
    with_summary(monkeypatch, folder, {"skipped_steps": 4}, stage="distill")
    assert "4 steps were skipped , because their loss or gradient was not finite" in read(write(folder, recipe)[0]).text


@pytest.mark.slow
def test_robustness_and_sets_unlike_clips_are_told(
    full: tuple[RunFolder, Recipe], written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, recipe = full
    results = folder.stage("evaluate") / "results.jsonl"
    before = results.read_text()
    shifted = {"top1": 0.4375, "imagenet_same_classes": 0.8125, "variant": "<half> of it"}
    lines = [json.loads(text) for text in before.splitlines()]
    lines = [line | shifted if (line["set"], line["task"]) == ("one", "zero_shot") else line for line in lines]
    try:
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = read(write(folder, recipe)[0]).text
    finally:
        results.write_text(before)
    assert "one this set 43.8 43.8 43.8 ImageNet, same classes 81.2 81.2 81.2" in text
    assert "* one: <half> of it" in text
    assert "Robustness" not in read(written[0]).text


@pytest.mark.slow
def test_blurred_pictures_are_shown_by_pointer_keyboard_or_tap_and_never_on_paper(
    full: tuple[RunFolder, Recipe],
    written: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = full
    plain = read(written[0])
    assert not [a for _, a in plain.elements if "tabindex" in a]
    assert "blur" not in (plain.all("body")[0].get("class") or "")
    out, _ = write(folder, make_recipe(folder.path.parent, report={"blur": True}))
    page = read(out)
    assert page.all("body")[0]["class"] == "blur"
    assert "Pictures of the data are blurred" in page.text
    figures = page.all("figure")
    shown = [a for a in figures if {"picture", "of-data"} & set((a.get("class") or "").split())]
    assert len(shown) > GROUPS * COPIES
    assert all(a.get("tabindex") == "0" for a in shown)
    assert {a["id"] for a in shown if "id" in a} == {"single_linkage", "patch_pca", "activation_maps"}
    assert not [a for a in figures if a not in shown and "tabindex" in a]
    paper = (out / "report.html").read_text().split("@media print")[1]
    assert re.search(r"\.blur [^{]*\{ filter: blur\(10px\) !important", paper)


def browser(work: Path) -> list[str]:
    assert CHROMIUM is not None
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    return [CHROMIUM, "--headless", "--no-sandbox", *quiet.split(), f"--user-data-dir={work / 'profile'}"]


def scroll_width(page: Path, work: Path, *, width: int) -> int:
    """How wide a page is in a frame of this width, which a browser can make narrower than its window."""
    told = "document.title = frame.contentDocument.documentElement.scrollWidth"
    frame = (
        f'<iframe id="frame" src="{page.as_uri()}" style="width: {width}px; height: 900px; border: 0" onload="{told}">'
    )
    (work / "frame.html").write_text(frame)
    command = [*browser(work), "--allow-file-access-from-files", "--hide-scrollbars", "--virtual-time-budget=10000"]
    command += ["--window-size=1600,1000", "--dump-dom", (work / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+)</title>", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


def browse(page: Path, work: Path, *, width: int = 1200) -> tuple[np.ndarray, str, set[str]]:
    """What a browser shows of a page, what it complains of, and which addresses the page made it ask for."""
    command = browser(work)
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={work / 'net.json'}"]
    command += [f"--window-size={width},1500", "--enable-logging=stderr", f"--screenshot={work / 'page.png'}"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    with Image.open(work / "page.png") as shot:
        pixels = np.asarray(shot.convert("RGB"), dtype=np.float64)
    asked = set(re.findall(r'"url":"(https?://[^"]*)', (work / "net.json").read_text()))
    own = re.compile(r"https?://([a-z0-9-]+\.)*(google|googleapis|gvt1|gstatic)\.com/")  # the browser's, of any page
    return pixels, done.stderr, {address for address in asked if not own.match(address)}


needs_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium to open the page in")


@needs_a_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_opens_the_page_without_complaint_or_request(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, width: int
) -> None:
    out, _ = written
    pixels, said, asked = browse(out / "report.html", tmp_path, width=width)
    assert "CONSOLE" not in said
    assert asked == set()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


@needs_a_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_never_wider_than_the_window(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, width: int
) -> None:
    out, _ = written
    assert scroll_width(out / "report.html", tmp_path, width=width) == width


@needs_a_browser
def test_a_page_that_is_too_wide_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<p>{'0123456789abcdef' * 8}</p>")
    assert scroll_width(page, tmp_path, width=390) > 390


@needs_a_browser
def test_a_request_and_a_complaint_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='http://localhost:9/x.png'><script>console.error('oh')</script>")
    _, said, asked = browse(page, tmp_path)
    assert asked == {"http://localhost:9/x.png"}
    assert "CONSOLE" in said


@needs_a_browser
def test_blurred_pictures_have_no_edges(full: tuple[RunFolder, Recipe], tmp_path: Path) -> None:
    folder, _ = full

    def edges(blur: bool) -> float:
        """Steps between neighbors where the page is colorful: in the pictures, which are noise; what else is, is hidden."""
        out, _ = write(folder, make_recipe(folder.path.parent, report={"blur": blur}))
        hidden = "<style>a, svg {visibility: hidden}</style></head>"
        (tmp_path / "page.html").write_text((out / "report.html").read_text().replace("</head>", hidden))
        pixels, *_ = browse(tmp_path / "page.html", tmp_path)
        colorful = np.ptp(pixels, axis=2) > 40
        steps = np.abs(np.diff(pixels, axis=1)).sum(axis=2)
        return float(steps[colorful[:, 1:]].sum())

    assert edges(blur=True) < 0.5 * edges(blur=False)


@pytest.mark.parametrize("name", ["draw/losses.csv", "draw/removed_sets.csv", "evaluate/results.jsonl"])
def test_a_file_that_is_not_as_it_was_written_is_named_and_not_shown(full: tuple[RunFolder, Recipe], name: str) -> None:
    folder, recipe = full
    path = folder.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with rotten(path, bytes(content)), pytest.raises(RunError, match=f"{path.name} has other contents") as error:
        write(RunFolder(folder.path), recipe)
    assert f"`clip-cid {name.partition('/')[0]} {folder.path} --force`" in error.value.fix
