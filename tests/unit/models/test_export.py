import json
import shlex
from pathlib import Path
from typing import Any, cast

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clip_cid.errors import RunError
from clip_cid.models import export
from clip_cid.models.clip import Clip
from clip_cid.models.export import copy_student, export_student, usage
from clip_cid.models.loading import load_clip
from clip_cid.models.student import build_student

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def tiny(folder: Path, **changed: Any) -> Clip:
    (folder / "tiny.json").write_text(json.dumps(TINY | changed))
    return build_student(str(folder / "tiny.json"), embed_dim=None, seed=1)


def test_open_clip_loads_the_folder_with_bit_equal_outputs(tmp_path: Path) -> None:
    clip = tiny(tmp_path)
    head = {"head.weight": torch.randn(5, 12)}
    export_student(clip, tmp_path / "student", head_state=head, provenance={"teacher": "x", "steps": 3})
    reference = f"local-dir:{tmp_path / 'student'}"
    model, _, preprocess = cast(tuple[Any, Any, Any], open_clip.create_model_and_transforms(reference))
    tokenizer = open_clip.get_tokenizer(reference)
    image = Image.radial_gradient("L").convert("RGB").resize((90, 40))
    ours: Any = clip.model.eval()
    pixels = preprocess(image)
    assert torch.equal(pixels, clip.preprocess(image))
    assert torch.equal(model.encode_image(pixels[None]), ours.encode_image(pixels[None]))
    assert torch.equal(model.encode_text(tokenizer(["a b"])), ours.encode_text(clip.tokenizer(["a b"])))
    config = json.loads((tmp_path / "student" / "open_clip_config.json").read_text())
    assert config["clip_cid"] == {"teacher": "x", "steps": 3}
    assert torch.equal(load_file(tmp_path / "student" / "cid_head.safetensors")["head.weight"], head["head.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "tiny.json"]


def test_a_student_without_head_has_no_head_file(tmp_path: Path) -> None:
    export_student(tiny(tmp_path), tmp_path / "student", head_state={}, provenance={})
    names = sorted(path.name for path in (tmp_path / "student").iterdir())
    assert names == ["open_clip_config.json", "open_clip_model.safetensors"]


def test_exporting_leaves_the_student_in_its_mode(tmp_path: Path) -> None:
    clip = tiny(tmp_path)
    export_student(clip, tmp_path / "student", head_state={}, provenance={})
    assert clip.model.training


def test_a_bias_of_the_logits_survives(tmp_path: Path) -> None:
    clip = tiny(tmp_path, init_logit_bias=-10.0)
    model: Any = clip.model
    with torch.no_grad():
        model.logit_bias.fill_(-7.25)
    export_student(clip, tmp_path / "student", head_state={}, provenance={})
    reloaded: Any = load_clip(f"local-dir:{tmp_path / 'student'}").model
    assert reloaded.logit_bias.item() == -7.25


@pytest.mark.slow
def test_a_compiled_student_is_exported_under_its_plain_names(tmp_path: Path) -> None:
    clip = tiny(tmp_path)
    compiled = Clip(**{**vars(clip), "model": torch.compile(clip.model, backend="eager")})
    export_student(compiled, tmp_path / "student", head_state={}, provenance={})
    assert load_file(tmp_path / "student" / "open_clip_model.safetensors").keys() == clip.model.state_dict().keys()


@pytest.mark.slow
def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    export_student(tiny(tmp_path), tmp_path / "student", head_state={}, provenance={"run": 1})
    export_student(tiny(tmp_path), tmp_path / "student", head_state={}, provenance={"run": 2})
    assert json.loads((tmp_path / "student" / "open_clip_config.json").read_text())["clip_cid"] == {"run": 2}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(RunError, match="is not an export of clip-cid"):
        export_student(tiny(tmp_path), tmp_path / "thesis", head_state={}, provenance={})
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "mine"


def test_a_student_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    clip = tiny(tmp_path)
    with torch.no_grad():
        next(iter(clip.model.parameters())).view(-1)[0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        export_student(clip, tmp_path / "student", head_state={}, provenance={})
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_an_export_that_would_give_other_outputs_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(state: Any, path: Path, **options: Any) -> None:
        real(state | {"visual.proj": state["visual.proj"] + 1e-3} if "visual.proj" in state else state, path, **options)

    real = export.save_file
    monkeypatch.setattr(export, "save_file", wrong)
    with pytest.raises(RunError, match=r"gives other image embeddings \(largest difference"):
        export_student(tiny(tmp_path), tmp_path / "student", head_state={}, provenance={})
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


@pytest.mark.slow
def test_two_exports_of_one_student_have_equal_bytes(tmp_path: Path) -> None:
    clip = tiny(tmp_path)
    for name in ("a", "b"):
        export_student(clip, tmp_path / name, head_state={"w": torch.ones(2)}, provenance={"x": 1})
    copy_student(tmp_path / "a", tmp_path / "c")
    for file in ("open_clip_config.json", "open_clip_model.safetensors", "cid_head.safetensors"):
        first, *others = [(tmp_path / name / file).read_bytes() for name in ("a", "b", "c")]
        assert others == [first, first]


def test_the_lines_to_paste_run(tmp_path: Path) -> None:
    export_student(tiny(tmp_path), tmp_path / "student", head_state={}, provenance={})
    text = usage(tmp_path / "student")
    python, _, shell = text.partition("# CLIP_benchmark")
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["tokenizer"](["a"]).shape == (1, 9)
    command = shlex.split(shell.partition("\n")[2].partition("\n")[2].replace("\\\n", " "))
    assert command[:2] == ["clip_benchmark", "eval"]
    assert "{model}" not in command[command.index("--output") + 1]
    assert command[command.index("--model") + 1] == f"local-dir:{tmp_path / 'student'}"


def test_no_secret_and_no_local_path_is_in_an_exported_folder(tmp_path: Path) -> None:
    """Neither in a new one, nor in a copy of one whose version wrote the recipe as it is."""
    recipe = {
        "pairs": {"source": ["pipe:curl -H 'Authorization: HEADER'", "https://u:PASSWORD@h/x.tar?sig=SIGNED"]},
        "distill": {"student": "/home/ada/top-secret/tiny.json"},
        "machine": {"cache_dir": "/home/ada/cache"},
    }
    teacher = {"reference": "local-dir:/home/ada/teacher", "weights_sha256": "12", "model_cfg": {"x": "/home/ada"}}
    provenance = {"recipe": recipe, "steps": 3, "teacher": teacher}
    export_student(tiny(tmp_path), tmp_path / "new", head_state={}, provenance=provenance)

    config = tmp_path / "new" / "open_clip_config.json"
    copy_student(tmp_path / "new", tmp_path / "old")
    old = tmp_path / "old" / "open_clip_config.json"
    old.write_text(json.dumps(json.loads(old.read_text()) | {"clip_cid": provenance}))
    copy_student(tmp_path / "old", tmp_path / "copy")

    assert (tmp_path / "copy" / "open_clip_config.json").read_bytes() == config.read_bytes()
    for path in (*(tmp_path / "new").iterdir(), *(tmp_path / "copy").iterdir()):
        data = path.read_bytes()
        for secret in (b"HEADER", b"PASSWORD", b"SIGNED", b"/home/ada", b"top-secret", bytes(tmp_path)):
            assert secret not in data, (path, secret)
    assert json.loads(config.read_text())["clip_cid"]["teacher"] == {
        "reference": "local-dir:teacher",
        "weights_sha256": "12",
    }
