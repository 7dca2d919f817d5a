"""The pages of `clip-cid review` over HTTP: exact, decided at once, and only for the page itself."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from reviewed_run import HOSTILE, NAMES, SETS, THRESHOLD, opened, reviewed_run, squared

from clip_cid import cli
from clip_cid.data.balance.decisions import read_decisions
from clip_cid.errors import ConfigError, DataError, RunError

starlette = pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
testclient = pytest.importorskip("starlette.testclient", reason="httpx2 is not installed")

from clip_cid.review.app import make_app  # noqa: E402
from clip_cid.review.hand_over import write_members  # noqa: E402
from clip_cid.review.serve import listening  # noqa: E402

pytestmark = pytest.mark.slow
OURS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return reviewed_run(tmp_path_factory.mktemp("reviewed"))


@pytest.fixture
def run(made) -> Path:
    (made / "decisions.jsonl").unlink(missing_ok=True)
    return made


class Page:
    """A browser that has the address."""

    def __init__(self, run: Path) -> None:
        self.run = opened(run)
        self.client = testclient.TestClient(make_app(self.run, token="secret"), base_url=OURS)

    def get(self, path: str, *, status: int = 200, **parameters):
        answer = self.client.get(f"/secret/{path}", params=parameters)
        assert answer.status_code == status, answer.text
        return answer.json() if path.startswith("api/") else answer

    def sets(self, **parameters):
        return self.get("api/sets", **{"squared": self.run.squared, **parameters})

    def set_of(self, row: int, **parameters):
        return self.get("api/set", **{"squared": self.run.squared, "row": row, **parameters})

    def post(self, path: str, body, *, status: int = 200):
        answer = self.client.post(f"/secret/api/{path}", json=body, headers={"Origin": OURS})
        assert answer.status_code == status, answer.text
        return answer.json()

    def decide(self, decision: str, *rows: int, status: int = 200):
        return self.post("decide", {"decision": decision, "rows": list(rows)}, status=status)


@pytest.fixture
def page(run) -> Page:
    return Page(run)


# The threshold


def test_the_slider_is_exact_on_every_scale(page):
    at = page.get("api/threshold", squared=page.run.squared)
    assert (at["removed"], at["sets"], at["share"]) == (6, 3, 0.6)
    assert at["on"]["euclidean"] == pytest.approx(THRESHOLD, rel=1e-12)
    for scale, value in at["on"].items():
        again = page.get("api/threshold", scale=scale, value=value)
        assert (again["removed"], again["sets"]) == (6, 3)
    assert page.get("api/threshold", share=0.6)["removed"] == 6
    limit = page.get("api/about")["limit_on_scale"]
    assert page.get("api/threshold", scale="euclidean", value=limit)["removed"] == 7


def test_the_pairs_that_change_at_a_threshold_stand_beside_it(page):
    at = page.get("api/threshold", squared=squared(4.5))
    assert [(link["left"], link["right"]) for link in at["joined_last"]] == [(0, 1), (2, 3), (8, 9), (3, 4)]
    assert [(link["left"], link["right"]) for link in at["joined_next"]] == [(1, 2), (7, 8)]
    exactly = page.get("api/threshold", squared=at["joined_last"][0]["squared"])
    assert exactly["joined_last"] == at["joined_last"]
    below = page.get("api/threshold", squared=np.nextafter(at["joined_last"][0]["squared"], 0))
    assert below["removed"] == at["removed"] - 1


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"squared": 3.9}, "up to which this balance knows all pairs"),
        ({"squared": "nan"}, "the threshold must be from 0"),
        ({"squared": "many"}, "squared: must be a number, got 'many'"),
        ({"scale": "parsec", "value": 1}, "there is no scale 'parsec'"),
        ({"scale": "cosine", "value": -1}, "a cosine distance is above 0"),
        ({"share": 0.9}, "the largest distance of this balance removes 70.00 %"),
    ],
)
def test_a_threshold_that_cannot_be_is_told(page, parameters, problem):
    assert problem in page.get("api/threshold", status=400, **parameters)["problem"]


# Sets


def test_the_sets_of_the_balance_are_listed_with_their_kept_images(page):
    answer = page.sets()
    assert (answer["total"], answer["all"], answer["kept"]) == (3, 3, 4)
    assert [card["row"] for card in answer["sets"]] == [0, 5, 8]
    kept = np.load(page.run.folder.path / "balance" / "kept.npy").tolist()
    assert [card["kept"] for card in answer["sets"]] == [[row for row in rows if row in kept] for rows in SETS]
    assert answer["sets"][0]["width"] == pytest.approx(squared(13))
    assert answer["sets"][0]["weakest"] == pytest.approx(squared(5))
    assert answer["sets"][2]["grows_at"] == pytest.approx(squared(20))


def test_they_are_sorted_and_filtered_as_asked(page):
    def rows(**parameters):
        return [card["row"] for card in page.sets(**parameters)["sets"]]

    assert rows(order="width") == [0, 8, 5]
    assert rows(order="weakest link") == [0, 8, 5]
    assert rows(order="distance to the threshold") == [0, 8, 5]
    assert sorted(rows(order="random", seed=3)) == [0, 5, 8]
    assert rows(text="WOLF-3") == [0]
    assert rows(text="onerror") == [8]
    assert rows(least=3) == [0]
    assert rows(most=2) == [5, 8]
    assert rows(kind="semantic") + rows(kind="perceptual") != []
    assert rows(source="nobody") == []
    assert rows(decided="yes") == []
    assert rows(page=1) == []
    assert "no order 'beauty'" in page.sets(order="beauty", status=400)["problem"]


def test_at_another_threshold_sets_and_kept_images_are_as_the_stage_would_make_them(page, tmp_path):
    at = squared(3.5)
    card = page.sets(squared=at)["sets"]
    assert [one["row"] for one in card] == [2, 5, 8]
    other = reviewed_run(tmp_path)
    assert cli.main(["balance", str(other), "--balance.threshold", str(np.sqrt(at))]) == 0
    kept = np.load(other / "balance" / "kept.npy").tolist()
    assert [one["kept"] for one in card] == [
        [row for row in rows if row in kept] for rows in ([2, 3, 4], [5, 6], [8, 9])
    ]


def test_a_set_opens_with_images_distances_and_the_tree(page):
    answer = page.set_of(3)
    assert (answer["row"], answer["size"]) == (0, 5)
    assert [image["kept_for"] for image in answer["images"]] == [2] * 5
    assert [image["row"] for image in answer["images"]] == [2, 0, 1, 4, 3]
    assert [image["to_kept"] for image in answer["images"]] == pytest.approx([0, *map(squared, (9, 5, 4, 3))])
    assert [(link["left"], link["right"]) for link in answer["links"]] == [(3, 4), (2, 3), (0, 1), (1, 2)]
    assert answer["images"][1]["caption"] == "a wolf-0 looks at you"
    alone = page.set_of(7)
    assert (alone["size"], alone["images"][0]["kept_for"], alone["links"]) == (1, 7, [])
    assert "there is no image 10" in page.set_of(10, status=400)["problem"]


def test_pictures_come_small_and_full(page):
    small, full = page.get("small/8"), page.get("full/8")
    assert Image.open(io.BytesIO(full.content)).size == (60, 48)
    assert Image.open(io.BytesIO(small.content)).format == "WEBP"
    assert page.get("small/8").content == small.content
    assert page.get("api/kind", row=5, other=5)["kind"] == "perceptual"
    assert page.get("small/99", status=404)
    (page.run.folder.path.parent / "pictures" / "wolf-1.png").rename(page.run.folder.path.parent / "moved.png")
    try:
        assert page.get("full/1", status=404).text
    finally:
        (page.run.folder.path.parent / "moved.png").rename(page.run.folder.path.parent / "pictures" / "wolf-1.png")


# Decisions


def test_a_decision_is_saved_obeyed_on_the_page_and_by_the_stage(page):
    page.decide("not_duplicates", 0, 3)
    assert {card["row"] for card in page.sets()["sets"]} == {0, 2, 5, 8}
    assert [page.set_of(row)["size"] for row in (0, 3)] == [2, 3]
    page.decide("keep", 4)
    page.decide("remove_all", 0, 1)
    page.decide("keep_all", 5, 6)
    assert [image["kept_for"] for image in page.set_of(3)["images"]] == [4, 4, 4]
    assert [image["kept_for"] for image in page.set_of(0)["images"]] == [-1, -1]
    shown = page.sets()["kept"]

    path = page.run.log.path
    assert [line.kind for line in read_decisions(path).lines] == ["not_duplicates", "keep", "remove_all", "keep_all"]
    out = page.run.folder.path.parent / "obeyed"
    recipe = page.run.folder.path.parent / "recipe.yaml"
    for stage in ("embed", "balance"):
        flags = ["--balance.decisions", str(path)] if stage == "balance" else []
        assert cli.main([stage, str(out), "--recipe", str(recipe), *flags]) == 0
    kept = np.load(out / "balance" / "kept.npy").tolist()
    assert kept == [4, 5, 6, 7, *(row for row in (8, 9) if row in kept)]
    assert len(kept) == shown


def test_decisions_are_there_after_a_reload_and_undone_one_by_one(page, run):
    first = page.decide("keep", 0)["id"]
    page.decide("keep_all", 5, 6)
    again = Page(run)
    assert again.get("api/decisions")["count"] == 2
    assert [card["row"] for card in again.sets(decided="yes")["sets"]] == [0, 5]
    assert [line["decision"] for line in again.set_of(0)["decisions"]] == ["keep"]
    assert again.post("undo", {"id": None})["undone"] == "keep_all"
    assert again.post("undo", {"id": first})["undone"] == "keep"
    assert again.post("undo", {"id": None})["undone"] is None
    assert [image["kept_for"] for image in again.set_of(0)["images"]] == [2] * 5


def test_a_contradiction_names_the_earlier_decision_and_loses_nothing(page):
    earlier = page.decide("keep", 0)["id"]
    answer = page.decide("remove_all", 0, 1, status=409)
    assert (answer["undo"], "wolf-0" in answer["problem"]) == (earlier, True)
    assert page.get("api/decisions")["count"] == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"decision": "keep", "rows": [99]}, 400),
        ({"decision": "keep", "rows": [-1]}, 400),
        ({"decision": "keep", "rows": [True]}, 400),
        ({"decision": "keep", "rows": "all"}, 400),
        ({"decision": "keep", "rows": []}, 400),
        ({"decision": "burn", "rows": [1]}, 400),
        ({"decision": "not_duplicates", "rows": [1]}, 400),
        ([1], 400),
        ("keep", 400),
    ],
)
def test_what_is_no_decision_is_refused(page, body, status):
    page.post("decide", body, status=status)
    assert page.get("api/decisions")["count"] == 0


def test_a_disk_that_is_full_loses_nothing_and_is_told(page, monkeypatch):
    page.decide("keep", 0)
    before = page.run.log.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clip_cid.review.decision_log.append_line", full)
    assert "space" in page.decide("keep", 1, status=500)["problem"]
    assert page.run.log.path.read_bytes() == before


def test_a_file_that_somebody_broke_meanwhile_is_named(page):
    page.decide("keep", 0)
    whole = page.run.log.path.read_bytes()
    page.run.log.path.write_bytes(b"broken\n")
    assert "line 1: not JSON" in page.decide("keep", 1, status=500)["problem"]
    page.run.log.path.write_bytes(whole)
    page.decide("keep", 1)


# Who may ask


def ask(page: Page, path: str = "/secret/api/about", method: str = "GET", **headers: str) -> int:
    return page.client.request(
        method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    ).status_code


def test_only_the_page_itself_may_ask_and_decide(page):
    assert ask(page) == 200
    assert ask(page, origin=OURS, sec_fetch_site="same-origin") == 200
    assert [ask(page, path) for path in ("/", "/api/about", "/wrong/api/about", "/secre/", "/secret2/")] == [404] * 5
    assert ask(page, host="evil.example") == 421  # a name that was pointed here
    assert ask(page, host="127.0.0.1.evil.example:8000") == 421
    assert ask(page, host="user@127.0.0.1:8000") == 421
    assert ask(page, host="localhost:9999") == 200  # through a tunnel
    assert ask(page, origin="http://evil.example") == 403
    assert ask(page, origin="null") == 403
    assert ask(page, sec_fetch_site="cross-site") == 403
    assert ask(page, "/secret/api/undo", "POST") == 403  # a form of another site need not say who it is
    assert ask(page, "/secret/api/undo", "POST", origin=OURS, content_type="text/plain") == 415
    assert ask(page, "/secret/api/decide", "GET") in (404, 405)


def test_the_page_may_load_nothing_from_elsewhere(page):
    answer = page.get("")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    for name in ("", "review.js", "review.css"):
        text = page.get(name).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
    assert page.get("../pyproject.toml", status=404)
    assert page.client.get("/secret", follow_redirects=False).headers["location"] == "/secret/"


def test_a_caption_is_data_and_not_markup(page):
    answer = page.set_of(9)
    assert HOSTILE in [image["caption"] for image in answer["images"]]
    assert (
        page.client.get(f"/secret/api/set?squared={page.run.squared}&row=9").headers["content-type"]
        == "application/json"
    )


# The command


def test_a_port_in_use_is_named(page):
    with listening(0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port} is used by another program"):
            listening(port)
    with pytest.raises(ConfigError, match="--port: 99999 cannot be used"):
        listening(99_999)


def test_a_run_without_a_balance_or_with_newer_embeddings_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["review", str(tmp_path / "none")]) == 1
    assert "no such run folder" in capsys.readouterr().err
    run = reviewed_run(tmp_path / "data")
    manifest = run / "balance" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["inputs"]["embed"] = "0" * 64
    manifest.write_text(json.dumps(record))
    with pytest.raises(RunError, match="the embeddings were made again after the balance"):
        opened(run)


def test_a_file_of_the_balance_that_was_cut_short_is_named(tmp_path):
    run = reviewed_run(tmp_path)
    hashes = run / "balance" / "row_hashes.npy"
    hashes.write_bytes(hashes.read_bytes()[:100])
    with pytest.raises(DataError, match=r"row_hashes\.npy: cannot be read"):
        opened(run)


def test_a_recipe_that_obeys_the_decisions_can_be_reviewed_on(page, run):
    """Each new decision makes its balance stale, which must not end the review."""
    page.decide("keep", 0)
    path = run.parent / "kept.jsonl"
    path.write_bytes(page.run.log.path.read_bytes())
    try:
        assert cli.main(["balance", str(run), "--balance.decisions", str(path)]) == 0
        again = Page(run)
        assert again.run.log.path == path
        assert [image["kept_for"] for image in again.set_of(1)["images"]] == [0] * 5
        again.post("undo", {})
        assert [image["kept_for"] for image in again.set_of(1)["images"]] == [2] * 5
    finally:
        assert cli.main(["balance", str(run), "--balance.decisions", "None"]) == 0


def test_protected_images_and_decisions_in_the_run_folder_are_obeyed_at_every_threshold(tmp_path):
    run, lists = reviewed_run(tmp_path / "made"), tmp_path / "protected.txt"
    lists.write_text(f"{NAMES[0]}\n{NAMES[3]}\n")
    assert cli.main(["balance", str(run), "--balance.protect", str(lists)]) == 0
    page = Page(run)
    assert [image["row"] for image in page.set_of(1)["images"] if image["kept_for"] == image["row"]] == [0, 3]
    assert page.sets()["kept"] == len(np.load(run / "balance" / "kept.npy"))
    page.decide("not_duplicates", 1, 2)

    at = squared(4.5)
    shown = page.sets(squared=at)
    flags = ["--balance.threshold", str(np.sqrt(at)), "--balance.decisions", str(run / "decisions.jsonl")]
    assert cli.main(["balance", str(run), *flags]) == 0
    kept = np.load(run / "balance" / "kept.npy").tolist()
    assert shown["kept"] == len(kept)
    assert all(set(card["kept"]) <= {*kept} for card in shown["sets"])
    assert {0, 3} <= {*kept}


def test_the_package_is_needed_for_the_page_alone(run, tmp_path):
    code = (
        "import sys; sys.modules['starlette'] = None; import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'starlette' else find(name, *rest);"
        "from clip_cid.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def command(*flags: str):
        return subprocess.run([sys.executable, "-c", code, "review", str(run), *flags], capture_output=True, text=True)

    lacking = command()
    assert (lacking.returncode, 'pip install "clip-cid[review]"' in lacking.stderr) == (1, True)
    assert command("--export", str(tmp_path / "out")).returncode == 0


# Hand-over


def test_other_tools_get_paths_and_a_spreadsheet_gets_no_formula(page, tmp_path):
    page.decide("keep", 0)
    said = write_members(page.run, tmp_path / "out")
    assert "9 images of 3 sets" in said
    table = pq.read_table(tmp_path / "out" / "members.parquet").to_pydict()
    assert table["key"] == [NAMES[row] for rows in SETS for row in rows]
    assert all(Path(path).is_file() for path in table["filepath"])
    assert Path(table["filepath"][1]) == page.run.folder.path.parent / "pictures" / "wolf-1.png"
    assert table["kept"][:5] == [True, False, False, False, False]
    assert table["euclidean_distance"][1] == pytest.approx(np.sqrt(squared(4)))
    assert table["decided"][:2] == ["keep", ""]

    with open(tmp_path / "out" / "members.csv", newline="", encoding="utf-8") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["key"] for line in lines] == table["key"]
    with pytest.raises(DataError, match="exists already"):
        write_members(page.run, tmp_path / "out")
