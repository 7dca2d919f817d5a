"""A finished student on the Hugging Face Hub: reloaded and compared, with its card, in one commit."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from clip_cid import log
from clip_cid.errors import ConfigError, HubError
from clip_cid.models.export import HEAD_FILE, copy_student
from clip_cid.models.references import CONFIG_FILE
from clip_cid.publish.finished_student import finished_student, local_parts, names_on_hub, nobody_can_load
from clip_cid.publish.model_card import model_card
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import DISTILL

CARD_FILE = "README.md"
_NO_CONTENT = {".gitattributes", CARD_FILE}
# What huggingface_hub raises when a request fails: OSError, and the base of whichever HTTP library it is built on.
_FAILURES: tuple[type[BaseException], ...] = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)


def check_repo_name(repo: str) -> None:
    """Refuse a name the Hub would not take.

    Raises:
        ConfigError: Not `ORG/NAME`, or with characters or a length the Hub does not allow.
    """
    try:
        validate_repo_id(repo)
        problem = "" if repo.count("/") == 1 else "it is not ORG/NAME"
    except HFValidationError as error:
        problem = " ".join(str(error).split())
    if problem:
        raise ConfigError(
            f"{repo}: not the name of a repository on the Hub ({problem}).",
            fix="Give your user or organization, a slash, and a name of letters, digits, '-', '_' and '.'.",
        )


def card_of(run: RunFolder, repo: str, *, license: str | None) -> str:
    """The card that `push_student` would upload; no network is needed.

    Raises:
        ConfigError: As `check_repo_name`.
        RunError: As `model_card`, or nobody else could load the student.
    """
    check_repo_name(repo)
    card = model_card(run, repo, license=license)
    if local := local_parts(student := run.stage(DISTILL) / "student"):
        raise nobody_can_load(student, local)
    return card


def push_student(run: RunFolder, repo: str, *, license: str | None, private: bool) -> str:
    """Upload the student of a finished run; the token is the one huggingface_hub finds.

    The folder is written anew, reloaded and compared as any export, and uploaded with its card in one commit. An
    earlier push to the same repository is replaced.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: As `check_repo_name`.
        RunError: The distill stage has not finished, its files changed, or the student cannot be published as it is.
        HubError: There is no token, the Hub refuses or cannot be reached, or the repository holds something else.
    """
    check_repo_name(repo)
    _require_token()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "student"
        _write_student(run, folder)
        (folder / CARD_FILE).write_text(model_card(run, repo, license=license), encoding="utf-8")
        with _hub_errors_in_words(repo):
            api = HfApi()
            _refuse_unknown_parts(api, folder)
            return _upload(api, folder, repo, private=private)


def _require_token() -> None:
    try:
        token = get_token()
    except _FAILURES as error:
        raise _no_token(f"the token cannot be read ({_one_line(error)})") from error
    if token is None:
        raise _no_token("no token of the Hugging Face Hub is set on this machine")


def _no_token(problem: str) -> HubError:
    return HubError(
        f"push: {problem}.",
        fix="Make one with write access in your settings on the Hub, then `hf auth login`, or set HF_TOKEN.",
    )


def _write_student(run: RunFolder, folder: Path) -> None:
    """The student's folder, exported anew."""
    student = finished_student(run)
    if local := local_parts(student):
        raise nobody_can_load(student, local)
    copy_student(student, folder)


def _refuse_unknown_parts(api: HfApi, student: Path) -> None:
    """The tower or the tokenizer may look like a name of the Hub and be a folder that was there in the training."""
    if unknown := [name for name in names_on_hub(student) if not api.repo_exists(name)]:
        raise nobody_can_load(student, unknown)


def _upload(api: HfApi, folder: Path, repo: str, *, private: bool) -> str:
    present = _present(api, repo, private=private)
    if present is None:
        api.create_repo(repo, private=private or None, exist_ok=True)
        present = set()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in zip(names, files, strict=True)]
    # The head of an earlier push belongs to other weights.
    operations += [CommitOperationDelete(name) for name in sorted(present & {HEAD_FILE} - set(names))]
    log.info(f"push      {sum(path.stat().st_size for path in files):,} bytes in {len(files)} files to {repo}")
    return api.create_commit(repo, operations, commit_message="Student of a clip-cid run").commit_url


def _present(api: HfApi, repo: str, *, private: bool) -> set[str] | None:
    """The files of a repository that may be pushed to; None when there is no such repository.

    Raises:
        HubError: It is public but was to be private, or it holds something else than an earlier push.
    """
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise HubError(f"{repo}: exists and is public.", fix="Make it private on the Hub first, or drop --private.")
    files = set(api.list_repo_files(repo))
    if files <= _NO_CONTENT or (CONFIG_FILE in files and _is_ours(api, repo)):
        return files
    raise HubError(
        f"{repo}: exists and holds something that clip-cid did not push"
        f" ({', '.join(sorted(files - _NO_CONTENT)[:5])}).",
        fix="Give another name, or empty the repository on the Hub first.",
    )


def _is_ours(api: HfApi, repo: str) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        config = api.hf_hub_download(repo, CONFIG_FILE, local_dir=temporary)
        return "clip_cid" in json.loads(Path(config).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _hub_errors_in_words(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError; its words never hold the token."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except _FAILURES as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # the Hub does not accept a card or a file
            raise _refusal(repo, error.__cause__) from error
        reasons = dict.fromkeys(_one_line(reason) for reason in (error, error.__cause__) if reason is not None)
        raise HubError(
            f"{repo}: the Hub cannot be reached, or the upload failed ({'; '.join(reasons)}).",
            fix="Check the network (and HF_HUB_OFFLINE, HF_ENDPOINT), then run the same command again.",
        ) from error


def _refusal(repo: str, error: HfHubHTTPError) -> HubError:
    status, answer = error.response.status_code, _one_line(error.server_message or error)
    if status in (401, 403):
        return HubError(
            f"{repo}: the Hub does not let this token write here ({status}: {answer}).",
            fix="Check the name, and that the token has write access to it: `hf auth whoami`, `hf auth login`.",
        )
    if status == 409:
        return HubError(
            f"{repo}: the name is taken on the Hub, or changed meanwhile ({answer}).",
            fix="Run the same command again, or give another name.",
        )
    return HubError(f"{repo}: the Hub answered {status} ({answer}).", fix="Correct what it names, or try again later.")


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
