"""Push against a Hub of this process: what arrives, what is refused, and that nothing local or secret leaves."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_hub import TOKEN, FakeHub, Repo, fake_hub
from finished_run import LOCAL, finished_run, record, tiny
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from clip_cid import cli
from clip_cid.errors import ClipCidError, ConfigError, HubError, RunError
from clip_cid.models import export
from clip_cid.models.export import export_student
from clip_cid.models.loading import load_clip
from clip_cid.publish import hub
from clip_cid.publish.finished_student import local_parts
from clip_cid.publish.hub import card_of, check_repo_name, push_student
from clip_cid.publish.model_card import model_card
from clip_cid.run_folder import RunFolder

# huggingface_hub 2.4 hands bytes to its HTTP library in a way that is on its way out there.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS, CONFIG, HEAD = "open_clip_model.safetensors", "open_clip_config.json", "cid_head.safetensors"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with fake_hub() as running:
        point_at(running.url, monkeypatch)
        yield running


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT would do before huggingface_hub is imported."""
    constants, name = huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE"
    template = getattr(constants, name).replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, name, template)
    monkeypatch.setattr(huggingface_hub.file_download, name, template, raising=False)  # 0.36 has a copy there
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("hub") / "run")


def push(run: RunFolder, repo: str = "me/tiny", **changed: Any) -> str:
    return push_student(run, repo, **{"license": "apache-2.0", "private": False, **changed})


def received(repo: Repo, folder: Path) -> Path:
    folder.mkdir()
    for name, data in repo.files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.slow
def test_what_arrives_is_the_student_and_loads(server: FakeHub, run: RunFolder, tmp_path: Path) -> None:
    address = push(run)
    repo = server.repos["me/tiny"]
    student = run.path / "distill" / "student"
    assert sorted(repo.files) == [".gitattributes", "README.md", HEAD, CONFIG, WEIGHTS]
    for file in (WEIGHTS, HEAD):
        assert repo.files[file] == (student / file).read_bytes()
    assert len(repo.commits) == 2  # the one that made the repository, and ours
    assert address == f"{server.url}/me/tiny/commit/{repo.sha}"
    assert not repo.private

    ours, theirs = load_clip(f"local-dir:{student}"), load_clip(f"local-dir:{received(repo, tmp_path / 'got')}")
    pixels, tokens = torch.randn(2, 3, 32, 32), ours.tokenizer(["a b", "c"])
    models: list[Any] = [ours.model, theirs.model]
    with torch.inference_mode():
        assert torch.equal(*(model.encode_image(pixels) for model in models))
        assert torch.equal(*(model.encode_text(tokens) for model in models))
    assert torch.equal(theirs.tokenizer(["a b"]), ours.tokenizer(["a b"]))


@pytest.mark.slow
def test_the_card_that_arrives_is_the_one_that_was_shown(server: FakeHub, run: RunFolder) -> None:
    push(run)
    arrived = server.repos["me/tiny"].files["README.md"].decode()
    assert arrived == model_card(run, "me/tiny", license="apache-2.0")
    assert ModelCard(arrived).data.get("license") == "apache-2.0"


@pytest.mark.slow
def test_nothing_of_this_machine_arrives(server: FakeHub, run: RunFolder) -> None:
    push(run)
    files = server.repos["me/tiny"].files
    text = (files["README.md"] + files[CONFIG]).decode()
    for secret in ("ada", "secret", "SECRET", "host.example", LOCAL, str(run.path), TOKEN):
        assert secret not in text
    provenance = json.loads(files[CONFIG])["clip_cid"]
    assert provenance["recipe"]["balance"]["threshold"] == 0.05
    assert provenance["teacher"]["weights_sha256"] == "abc123"


@pytest.mark.slow
def test_a_second_push_replaces_the_first_with_the_head_that_was_its(server: FakeHub, run: RunFolder, tmp_path: Path):
    push(run)
    other = finished_run(tmp_path / "other", seed=2, head=False)
    push(other)
    repo = server.repos["me/tiny"]
    assert sorted(repo.files) == [".gitattributes", "README.md", CONFIG, WEIGHTS]
    assert repo.files[WEIGHTS] == (other.path / "distill/student" / WEIGHTS).read_bytes()
    assert len(repo.commits) == 3


@pytest.mark.slow
def test_pushing_the_same_again_makes_no_commit(server: FakeHub, run: RunFolder) -> None:
    assert push(run) == push(run)
    assert len(server.repos["me/tiny"].commits) == 2


@pytest.mark.slow
def test_a_private_repository_is_made_private(server: FakeHub, run: RunFolder) -> None:
    push(run, private=True)
    assert server.repos["me/tiny"].private


def test_a_public_repository_is_not_pushed_to_when_private_is_asked(server: FakeHub, run: RunFolder) -> None:
    server.repos["me/tiny"] = Repo(private=False)
    with pytest.raises(HubError, match="me/tiny: exists and is public"):
        push(run, private=True)
    assert len(server.repos["me/tiny"].commits) == 1


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b"someone's BERT", "config.json": b"{}"},
        {CONFIG: b'{"model_cfg": {}}', WEIGHTS: b"an open_clip model of another tool"},
    ],
    ids=["another model", "another open_clip model"],
)
def test_a_repository_with_something_else_is_left_alone(
    server: FakeHub, run: RunFolder, files: dict[str, bytes]
) -> None:
    server.repos["me/tiny"] = Repo(files=dict(files))
    with pytest.raises(HubError, match="holds something that clip-cid did not push"):
        push(run)
    assert server.repos["me/tiny"].files == files


@pytest.mark.slow
def test_an_empty_repository_made_by_hand_is_filled(server: FakeHub, run: RunFolder) -> None:
    server.repos["me/tiny"] = Repo(files={".gitattributes": b"", "README.md": b"soon"})
    push(run)
    assert WEIGHTS in server.repos["me/tiny"].files


@pytest.mark.slow
def test_a_namespace_that_is_not_the_users_is_refused(server: FakeHub, run: RunFolder) -> None:
    with pytest.raises(HubError, match=r"does not let this token write here \(403: .*under them"):
        push(run, "them/tiny")
    server.repos["them/tiny"] = Repo()
    with pytest.raises(HubError, match="does not let this token write here"):
        push(run, "them/tiny")


def test_a_wrong_token_is_refused_and_not_repeated(
    server: FakeHub, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not let this token write here") as caught:
        push(run)
    assert "hf_wrong" not in str(caught.value)
    assert not server.repos


def test_without_a_token_nothing_is_tried(server: FakeHub, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="no token of the Hugging Face Hub") as caught:
        push(run)
    assert "hf auth login" in caught.value.fix
    assert server.requests == []


def test_no_network_is_said(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub() as gone:
        address = gone.url
    point_at(address, monkeypatch)
    with pytest.raises(HubError, match="me/tiny: the Hub cannot be reached"):
        push(run)


def test_a_license_the_hub_does_not_know_uploads_nothing(server: FakeHub, run: RunFolder) -> None:
    with pytest.raises(HubError, match=r'the Hub answered 400 \("license" must be one of'):
        push(run, license="my own")
    assert server.blobs == {}


@pytest.mark.slow
def test_an_error_of_the_hub_is_told(server: FakeHub, run: RunFolder) -> None:
    for part in ("/objects/batch", "/lfs/", "/commit/"):
        server.broken = part
        with pytest.raises(HubError, match=r"the Hub answered 413 \(too much for this hub"):
            push(run)
    assert list(server.repos["me/tiny"].files) == [".gitattributes"]


@pytest.mark.slow
def test_a_student_that_changed_on_disk_is_not_pushed(server: FakeHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    export_student(tiny(tmp_path / "other", seed=9), tmp_path / "another", head_state={}, provenance={})
    shutil.copytree(tmp_path / "another", run.path / "distill/student", dirs_exist_ok=True)
    with pytest.raises(RunError, match="the distill stage is not as it was written"):
        push(run)
    assert server.requests == []


def test_a_student_that_fails_the_self_test_is_not_pushed(
    server: FakeHub, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(state: Any, path: Path, **options: Any) -> None:
        real(state | {"visual.proj": state["visual.proj"] + 1e-3} if "visual.proj" in state else state, path, **options)

    real = export.save_file
    monkeypatch.setattr(export, "save_file", wrong)
    with pytest.raises(RunError, match="gives other image embeddings"):
        push(run)
    assert server.requests == []


def test_a_student_nobody_else_could_load_is_not_pushed(
    server: FakeHub, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "local_parts", lambda student: ["/home/ada/tokenizer"])
    with pytest.raises(RunError, match=r"names what only this machine has \(/home/ada/tokenizer\)"):
        push(run)
    assert server.requests == []
    with pytest.raises(RunError, match="names what only this machine has"):
        card_of(run, "me/tiny", license=None)


@pytest.mark.parametrize(
    ("text_cfg", "local"),
    [
        ({"hf_model_name": "/home/ada/bert"}, ["/home/ada/bert"]),
        ({"hf_tokenizer_name": "./tokens"}, ["./tokens"]),
        ({"hf_model_name": "here", "hf_tokenizer_name": "org/name"}, ["here"]),
        ({"hf_model_name": "models/mine"}, ["models/mine"]),
        ({"hf_tokenizer_name": "a/b/c"}, ["a/b/c"]),
        ({"hf_model_name": r"C:\bert"}, [r"C:\bert"]),
        ({"hf_model_name": "roberta-base", "hf_tokenizer_name": "org/name.v2"}, []),
        ({"width": 8}, []),
    ],
)
def test_a_text_tower_or_a_tokenizer_of_this_machine_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_cfg: dict[str, Any], local: list[str]
) -> None:
    """By its path, or because it is a folder here though it looks like a name of the Hub."""
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "student"
    for folder in (student, tmp_path / "here", tmp_path / "models" / "mine"):
        folder.mkdir(parents=True)
    config = {"model_cfg": {"embed_dim": 4, "vision_cfg": {}, "text_cfg": text_cfg}}
    (student / CONFIG).write_text(json.dumps(config))
    assert local_parts(student) == [os.path.abspath(name) if Path(name).is_dir() else name for name in local]


def test_a_name_that_was_a_folder_in_the_training_and_is_not_on_the_hub_is_refused(
    server: FakeHub, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos["org/tokens"] = Repo()
    monkeypatch.setattr(hub, "names_on_hub", lambda student: ["org/tokens", "models/bert"])
    with pytest.raises(RunError, match=r"names what only this machine has \(models/bert\)"):
        push(run)
    assert "me/tiny" not in server.repos
    server.repos["models/bert"] = Repo()
    push(run)
    assert "me/tiny" in server.repos


def test_what_push_refuses_export_refuses_too(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = finished_run(tmp_path / "run", evaluated=False)
    weights = changed.path / "distill" / "student" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert cli.main(["export", str(changed.path), str(tmp_path / "out")]) == 1
    assert f"is not as it was written (student/{WEIGHTS}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_distilled_is_refused(server: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the distill stage has not finished"):
        push(RunFolder(tmp_path))
    assert server.requests == []


@pytest.mark.parametrize(
    "name", ["tiny", "me/ti ny", "me/", "/tiny", "a/b/c", "me/-x", "me/x.git", "me/" + "x" * 100, ""]
)
def test_a_name_the_hub_would_not_take_is_a_wrong_setting(name: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a repository") as caught:
        check_repo_name(name)
    assert isinstance(caught.value, ClipCidError)
    assert caught.value.exit_code == 2


def test_dry_run_prints_the_card_and_asks_nobody(
    server: FakeHub, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert cli.main(["push", str(run.path), "me/tiny", "--dry-run", "--license", "mit"]) == 0
    assert capsys.readouterr().out == model_card(run, "me/tiny", license="mit") + "\n"
    assert server.requests == []


@pytest.mark.slow
def test_the_command_pushes_and_the_lines_of_the_card_load_it_from_the_hub(run: RunFolder, tmp_path: Path) -> None:
    """As a user: two fresh processes that know the Hub and the token from their environment only."""
    with fake_hub() as running:
        here = {"HF_ENDPOINT": running.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "clip_cid", "push", str(run.path), "me/tiny", "--private"]
        options: dict[str, Any] = {"env": {**os.environ, **here}, "capture_output": True, "text": True}
        done = subprocess.run(command, **options, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{running.url}/me/tiny/commit/{running.repos['me/tiny'].sha}"
        assert TOKEN not in done.stdout + done.stderr
        card = running.repos["me/tiny"].files["README.md"].decode()
        lines = card.partition("```python\n")[2].partition("```")[0]
        save = f"\nfrom safetensors.torch import save_file\nsave_file(model.state_dict(), {str(tmp_path / 'got')!r})"
        check = "\nassert tokenizer(['a b']).shape == (1, 9)"
        loaded = subprocess.run([sys.executable, "-c", lines + check + save], **options, check=False)
        assert loaded.returncode == 0, loaded.stderr
    got, sent = load_file(tmp_path / "got"), load_file(run.path / "distill/student" / WEIGHTS)
    assert got.keys() == sent.keys()
    assert all(torch.equal(got[name], sent[name]) for name in sent)


def test_the_record_of_a_run_is_one_the_run_folder_reads(run: RunFolder) -> None:
    """The runs of these tests are made by hand; they must be runs."""
    assert run.record("balance") is not None
    assert run.changed_files("distill", digests=True) == []
    assert record("x", {}, {}).stage == "x"
