from pathlib import Path

import pytest

from clip_cid.models.public_names import (
    PublicWords,
    local_names,
    public_name,
    public_provenance,
    unique_public_names,
)


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/ada/pairs/{0..9}.tar", "{0..9}.tar"),
        ("data/pairs/", "pairs"),
        ("train.csv", "train.csv"),
        ("~/x/y.tar", "y.tar"),
        ("run:/home/ada/runs/big", "run:big"),
        ("local-dir:teachers/b16", "local-dir:b16"),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("ViT-B-32/laion400m_e32", "ViT-B-32/laion400m_e32"),
        ("ViT-B/32/laion400m_e32", "ViT-B/32/laion400m_e32"),
        ("ViT-B/32", "ViT-B/32"),
        ("clients/acme", "acme"),
        ("https://ada:pw@host.example/a/b.tar?sig=1/2#x/y", "b.tar"),
        ("https://ada:pw@host.example", "https:"),
        ("s3://bucket/a/{00..99}.tar", "{00..99}.tar"),
        ("file:///home/ada/x.tar", "x.tar"),
        ("pipe:curl https://host/x.tar -H 'Authorization: Bearer s3cret'", "pipe:..."),
        (" PIPE:cat x", "pipe:..."),
        ("user:password@host", "host"),
        ("user:password@host:data/x.tar", "x.tar"),
        ("bucket/x.tar?X-Amz-Signature=a/b", "x.tar"),
        ("https://host/x.tar;token=s3cret", "x.tar"),
        ("https://host/x.tar%3Ftoken=s3cret", "x.tar"),
        ("s3://KEY:SECRET@bucket/x.tar", "x.tar"),
        (r"C:\Users\ada\x.tar", "x.tar"),
        (r"\\server\share\x.tar", "x.tar"),
        ("cats & dogs #1", "cats & dogs #1"),
        ("shortest", "shortest"),
        ("", ""),
    ],
)
def test_a_name_is_cut_to_what_the_world_may_know(value: str, public: str) -> None:
    assert public_name(value) == public


def test_every_string_of_the_recipe_is_cut_and_numbers_stay() -> None:
    recipe = {
        "pairs": {"source": ["/a/b.tar"], "max_bad_share": 0.01},
        "evaluate": {"retrieval": {"mine": ("/a/c.tar",)}, "zero_shot": True},
        "machine": {"cache_dir": "/a"},
        "report": {"title": "/a"},
    }
    teacher = {"reference": "unknown (taken over from /a/b)", "model_cfg": {"x": "/a"}}
    assert public_provenance({"recipe": recipe, "steps": 3, "teacher": teacher}) == {
        "recipe": {
            "pairs": {"source": ["b.tar"], "max_bad_share": 0.01},
            "evaluate": {"retrieval": {"mine": ["c.tar"]}, "zero_shot": True},
        },
        "steps": 3,
        "teacher": {"reference": "unknown"},
    }
    assert recipe["pairs"]["source"] == ["/a/b.tar"]


def test_local_files_in_a_model_configuration_are_found() -> None:
    assert local_names({"text_cfg": {"hf_tokenizer_name": "/home/ada/tok", "width": 8}, "a": ["./x", "org/name"]}) == [
        "/home/ada/tok",
        "./x",
    ]


RECIPE = {
    "pairs": {
        "source": [
            "pipe:curl -H 'Authorization: Bearer S3CRET' https://host.example/{00..09}.tar",
            "https://ada:pass@store.example/a/{0..3}.tar?sig=SIGNED",
            "/home/ada lovelace/my pairs/{00..09}.tar",
            "data/private/x.csv",
        ]
    },
    "evaluate": {"compare": {"old": "run:/srv/runs/old"}},
}


@pytest.mark.parametrize(
    ("message", "public"),
    [
        ("pipe:curl -H 'Authorization: Bearer S3CRET' https://host.example/03.tar: cut short", "pipe:...: cut short"),
        ("curl -H 'Authorization: Bearer S3CRET' https://host.example/03.tar ended with 22", "... ended with 22"),
        ("pipe:wget --header=S3CRET x: cut short", "pipe:..."),
        ("https://ada:pass@store.example/a/2.tar?sig=SIGNED: 403 of store.example", "2.tar: 403 of ..."),
        ("/home/ada lovelace/my pairs/03.tar: gone", "03.tar: gone"),
        ("/home/ada lovelace/my pairs/other.json: odd", "my pairs/other.json: odd"),
        ("data/private/x.csv: 3 rows", "x.csv: 3 rows"),
        ("see /var/log/a.txt, ~/b.txt and s3://bucket/c.tar.", "see a.txt, b.txt and c.tar."),
        ("run:/srv/runs/old", "run:old"),
        ("x.tar?sig=SIGNED cannot be opened", "x.tar cannot be opened"),
        ("12 images/s, and/or 3 / 4 </b>", "12 images/s, and/or 3 / 4 </b>"),
    ],
)
def test_a_message_is_cut_to_what_the_world_may_know(message: str, public: str) -> None:
    assert PublicWords(RECIPE)(message) == public


def test_a_caption_loses_only_what_the_run_names() -> None:
    words = PublicWords(RECIPE, Path("/tmp/runs/mine"))
    assert words.data("see /r/cats and https://shop.example/x?id=3") == "see /r/cats and https://shop.example/x?id=3"
    assert words.data("from data/private/x.csv in /tmp/runs/mine") == "from x.csv in mine"


def test_names_that_become_equal_get_a_number() -> None:
    names = unique_public_names(["run:a/student", "run:b/student", "ViT-B-32/laion400m_e32"])
    assert list(names.values()) == ["run:student", "run:student (2)", "ViT-B-32/laion400m_e32"]
