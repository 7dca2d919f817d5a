"""What of an address is shown and kept."""

from pathlib import Path

import pytest

from clip_cid.addresses import is_remote, path_of, without_secrets
from clip_cid.deciding_settings import deciding
from clip_cid.recipe import dump_recipe, parse_recipe


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/a b/{00..99}.tar", None),
        ("hf://datasets/me/set@refs%2Fpr%2F1/data/*.parquet", None),
        ("https://host/x.tar?file=3&raw", None),
        ("az://files@account/x.tar", None),
        ("pipe:cat x.tar", None),
        ("/local/a?token=x", None),
        ("https://ada:pw@host/x.tar", "https://host/x.tar"),
        ("https://token@host/x.tar", "https://host/x.tar"),
        ("https://ada:p@ss@host/x.tar", "https://host/x.tar"),
        ("s3://KEY:SECRET@bucket/x.tar", "s3://bucket/x.tar"),
        (
            "https://h/x?X-Amz-Signature=S&X-Amz-Credential=C&n=1",
            "https://h/x?X-Amz-Signature=...&X-Amz-Credential=...&n=1",
        ),
        ("https://h/x?sv=2024&se=2026&sig=S%2B", "https://h/x?sv=...&se=...&sig=..."),
        ("https://h/x?t=" + "A" * 41, "https://h/x?t=..."),
        ("HTTP 403 of https://ada:pw@h/x?token=T: see", "HTTP 403 of https://h/x?token=... see"),
    ],
)
def test_secrets_are_cut_and_nothing_else(address: str, shown: str | None) -> None:
    assert without_secrets(address) == (address if shown is None else shown)
    assert without_secrets(without_secrets(address)) == without_secrets(address)


def test_addresses_and_paths() -> None:
    for address in ("s3://b/x", "gs://b/x", "az://c/x", "hf://datasets/a/b/x", "https://h/x", "HTTP://h/x"):
        assert is_remote(address)
    for place in (
        "/a/s3://b",
        "s3:/b/x",
        "pipe:curl https://h",
        "file:///x",
        "hf-hub:a/b",
        "s4://b/x",
        Path("s3://b/x"),
    ):
        assert not is_remote(place)
    assert path_of("https://host/a%20b/x.tar?n=1#end") == "/a b/x.tar"
    assert path_of("s3://bucket/a#b?c.tar") == "bucket/a#b?c.tar"


def test_a_recipe_in_a_run_folder_has_no_secrets() -> None:
    signed = "https://ada:PASSWORD@host/x.tar?sig=SIGNED"
    values = {
        "pairs": {"source": [signed, "s3://b/x.tar", "pipe:curl https://host/x.tar?key=KEPT"]},
        "evaluate": {"sets": {"a": signed}, "retrieval": {"b": [signed]}},
    }
    recipe = parse_recipe(values, where="test")
    text = dump_recipe(recipe)
    assert "PASSWORD" not in text
    assert "SIGNED" not in text
    assert "s3://b/x.tar" in text
    assert "pipe:curl https://host/x.tar?key=KEPT" in text  # a command without its words would be another one
    assert recipe.pairs.source[0] == recipe.model_dump()["pairs"]["source"][0] == signed  # it is read as it was given

    # Records of earlier versions hold what signs an address; that is no change.
    then, now = recipe.model_dump(), recipe.model_dump(mode="json")
    assert deciding({"evaluate": then["evaluate"]})["evaluate"]["sets"] == deciding(now)["evaluate"]["sets"]
