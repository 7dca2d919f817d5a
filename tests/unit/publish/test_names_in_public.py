import pytest

from clip_cid.publish.public_names import local_names, public_name, public_provenance


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
