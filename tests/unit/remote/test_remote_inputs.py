"""Embeddings, sets, kept rows and texts elsewhere: copied once, as if they lay here, changes noticed."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from remote_servers import Answers, Place, hub, needs_s3, place, s3, web
from tiny_sets import tar_set

from clip_cid import cli
from clip_cid.data.balance.decisions import hash_text
from clip_cid.data.inputs import brought_here, copy_of
from clip_cid.data.outside_files import Reader
from clip_cid.data.sets.evaluation_sets import MissingSetError, open_set
from clip_cid.errors import DataError
from clip_cid.file_digests import FileDigests, digest
from clip_cid.recipe import PairsConfig, parse_recipe
from clip_cid.remote.remembered import forget
from clip_cid.run_folder import RunFolder

__all__ = ["hub", "place", "s3", "web"]


def rows(seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((40, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def keys(*names: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": names}), buffer)
    return buffer.getvalue()


def reader(tmp_path: Path) -> Reader:
    return Reader(FileDigests(tmp_path / "digests.jsonl"), None, tmp_path / "cache")


def test_a_file_elsewhere_comes_with_the_keys_beside_it(place: Place, tmp_path: Path) -> None:
    address = place.put("emb.npy", npy(rows()))
    place.put("emb.parquet", keys("a", "b"))
    copy = copy_of(address, tmp_path)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["emb.npy", "emb.parquet"]
    np.testing.assert_array_equal(np.load(copy), rows())


def test_contents_elsewhere_are_those_of_the_same_files_here_and_are_read_once(place: Place, tmp_path: Path) -> None:
    here = tmp_path / "emb.npy"
    here.write_bytes(npy(rows()))
    here.with_suffix(".parquet").write_bytes(keys("a"))
    local = reader(tmp_path).embeddings(here)

    outside = reader(tmp_path).embeddings(Path(place.put("emb.npy", npy(rows()))))
    place.put("emb.parquet", keys("a"))
    assert outside.is_here()
    assert outside.contents() == local.contents()
    state = outside.state()
    for copy in (tmp_path / "cache").rglob("*.npy"):
        copy.unlink()
    assert outside.contents() == local.contents()  # the version is known
    place.put("emb.npy", npy(rows(1)))
    assert outside.state() != state
    assert outside.contents() != local.contents()
    assert not reader(tmp_path).embeddings(Path(place.put("x.npy", b"") + ".gone")).is_here()


def test_a_copy_is_never_changed(place: Place, tmp_path: Path) -> None:
    before = copy_of(place.put("emb.npy", npy(rows(0))), tmp_path)
    after = copy_of(place.put("emb.npy", npy(rows(1))), tmp_path)
    np.testing.assert_array_equal(np.load(before), rows(0))
    np.testing.assert_array_equal(np.load(after), rows(1))


@needs_s3
@pytest.mark.slow
def test_balance_from_a_bucket_runs_again_when_the_object_changes(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    there = Place("s3", s3)
    for number in range(2):
        there.put(f"emb/img_emb/img_emb_{number}.npy", npy(rows(number)))
    command = ["balance", "run", "--embeddings", "s3://bucket/set/emb", "--machine.cache-dir", str(tmp_path / "cache")]
    assert cli.main(command) == 0
    assert np.load("run/balance/kept.npy").shape == (80,)
    assert "existing: s3://bucket/set/emb\n" in Path("run/recipe.yaml").read_text()

    there.put("emb/img_emb/img_emb_1.npy", npy(rows(0)))
    capsys.readouterr()
    assert cli.main(["status", "run"]) == 0
    assert "embed.existing (s3://bucket/set/emb) changed on disk" in " ".join(capsys.readouterr().out.split())
    assert cli.main(command) == 0
    assert np.load("run/balance/kept.npy").shape == (40,)


def test_errors_name_the_address_and_not_the_copy(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    answers.files["/emb.npy"] = b"no array"
    recipe = parse_recipe(
        {"embed": {"existing": f"{url}/emb.npy"}, "machine": {"cache_dir": str(tmp_path)}}, where="test"
    )
    with pytest.raises(DataError, match=rf"{url}/emb\.npy: damaged") as error, brought_here(recipe, {"embed"}) as local:
        raise DataError(f"{local.embed.existing}: damaged", fix=f"Write {local.embed.existing} again.")
    assert error.value.fix == f"Write {url}/emb.npy again."
    assert str(tmp_path) not in str(error.value)


def test_texts_and_kept_rows_may_be_elsewhere(place: Place, tmp_path: Path) -> None:
    recipe = parse_recipe(
        {
            "balance": {"existing": place.put("kept.npy", npy(np.arange(3)))},
            "distill": {"texts": [place.put("words.txt", b"a cat\n"), "/here/words.txt"]},
            "machine": {"cache_dir": str(tmp_path)},
        },
        where="test",
    )
    with brought_here(recipe, {"balance", "texts"}) as local:
        assert local.balance.existing is not None
        assert np.load(local.balance.existing).tolist() == [0, 1, 2]
        assert [Path(text).name for text in local.distill.texts] == ["words.txt", "words.txt"]
        assert Path(local.distill.texts[0]).read_text() == "a cat\n"
    outside = reader(tmp_path).files(recipe.distill.text_files[:1])
    (tmp_path / "words.txt").write_text("a cat\n")
    assert outside.contents() == reader(tmp_path).files([tmp_path / "words.txt"]).contents()


def circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.slow
def test_decisions_and_protected_keys_elsewhere_are_obeyed_and_each_version_read_once(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", circle(0, 1, 2, 90, 91))
    run, cache = tmp_path / "run", str(tmp_path / "cache")
    command = ["balance", str(run), "--embeddings", str(tmp_path / "rows.npy"), "--machine.cache-dir", cache]
    assert cli.main(command) == 0
    hashes = np.load(run / "balance" / "row_hashes.npy")
    line = {"id": "1", "decision": "keep", "images": [{"hash": hash_text(hashes[2]), "key": "rows/2"}]}

    decisions = place.put("d.jsonl", json.dumps(line).encode() + b"\n")
    protect = place.put("keys.txt", b"rows/4\n")
    flags = ["--balance.decisions", decisions, "--balance.protect", protect]
    assert cli.main([*command, *flags]) == 0
    assert np.load(run / "balance" / "kept.npy").tolist() == [2, 4]
    record = RunFolder(run).record("balance")
    forget()
    assert cli.main(command) == 0
    assert RunFolder(run).record("balance") == record

    assert cli.main(["review", str(run), "--export", str(tmp_path / "out")]) == 1
    assert "decisions at an address can be obeyed, but not added to" in capsys.readouterr().err
    place.put("d.jsonl", b"")
    assert cli.main(command) == 0
    assert np.load(run / "balance" / "kept.npy").tolist() == [1, 4]
    place.put("keys.txt", b"rows/3\n")
    capsys.readouterr()
    assert cli.main(["status", str(run)]) == 0
    assert f"balance.protect ({protect}) changed on disk" in " ".join(capsys.readouterr().out.split())
    gone = place.put("d.jsonl", b"") + ".gone"
    assert cli.main([*command, "--balance.decisions", gone]) == 1
    assert "d.jsonl.gone: not there" in capsys.readouterr().err


def test_what_signs_the_address_of_protected_keys_is_not_kept() -> None:
    entry = "https://host/keys.txt?X-Amz-Signature=0123"
    recipe = parse_recipe({"balance": {"protect": [entry, "tars/*.tar"]}}, where="test")
    assert (len(recipe.balance.protected_lists), recipe.balance.protected_sources) == (1, ("tars/*.tar",))
    assert recipe.model_dump(mode="json")["balance"]["protect"] == [
        "https://host/keys.txt?X-Amz-Signature=...",
        "tars/*.tar",
    ]


def test_a_folder_on_the_web_is_told_to_be_none(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    answers.files["/emb/0.npy"] = npy(rows())
    with pytest.raises(DataError, match=r"/emb: not there"):
        copy_of(f"{url}/emb", tmp_path)


@needs_s3
@pytest.mark.parametrize("name", ["../x.npy", "a/../../x.npy", "a//x.npy", "/x.npy", "a\\x.npy"])
def test_no_name_in_a_bucket_leads_out_of_the_folder_of_the_copy(s3: Any, tmp_path: Path, name: str) -> None:
    s3.put_object(Bucket="bucket", Key=f"set/{name}", Body=b"x")
    s3.put_object(Bucket="bucket", Key="set/y.npy", Body=b"y")
    with pytest.raises(DataError, match="cannot be the name of a file below a folder"):
        copy_of("s3://bucket/set", tmp_path / "cache")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_sets_elsewhere_are_measured_as_those_here(place: Place, tmp_path: Path) -> None:
    local = tar_set(tmp_path / "colors", each=4, splits=("train", "test"))
    for path in (path for path in local.rglob("*") if path.is_file()):
        place.put(f"colors/{path.relative_to(local).as_posix()}", path.read_bytes())
    where = place.put("x", b"").removesuffix("x") + "colors"

    cache = tmp_path / "cache"
    there, here = (open_set("colors", at, max_pixels=10**6, cache_dir=cache) for at in (where, str(local)))
    assert [part.fingerprint for part in there.splits.values()] == [part.fingerprint for part in here.splits.values()]
    outside, as_here = (reader(tmp_path).set(at) for at in (where, str(local)))
    assert outside.contents() == as_here.contents()
    state = outside.state()
    place.put("colors/classnames.txt", (local / "classnames.txt").read_bytes() + b"\n")
    assert outside.state() != state


def test_a_set_that_is_not_there_is_left_out_as_one_here(place: Place, tmp_path: Path) -> None:
    where = place.put("x.npy", b"").removesuffix("x.npy") + "nothing"
    with pytest.raises(MissingSetError, match=r"evaluate\.sets\.colors: .*nothing.*: not there"):
        open_set("colors", where, max_pixels=10**6, cache_dir=tmp_path)
    assert not reader(tmp_path).set(where).is_here()


def test_a_run_of_an_earlier_version_knows_its_pairs_by_their_addresses(
    web: tuple[str, Answers], tmp_path: Path
) -> None:
    url, answers = web
    answers.files["/x.tar"] = b""
    settings = PairsConfig(source=(f"{url}/x.tar",))
    outside = reader(tmp_path).pairs(settings)
    assert outside.as_before() == digest([[f"{url}/x.tar"], settings.reading])
    assert reader(tmp_path).set(f"{url}/set").as_before() is None  # it had no record of such a set
