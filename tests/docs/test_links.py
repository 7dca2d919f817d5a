"""Every link of README and docs leads somewhere: to a file that is there, and to a heading of it."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```|^    .*?$|`[^`\n]*`", "", text)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*?)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path):
    for link in links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        assert "://" not in link, link
        target, _, heading = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        assert there.is_relative_to(ROOT), link
        assert not heading or heading in anchors(there), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != ROOT], ids=lambda page: page.stem)
def test_links_of_the_site_stay_on_the_site(page: Path):
    for link in links(page):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs"), link


def test_links_with_a_wrong_heading_are_noticed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# One thing, or two\nsee [it](#one-thing-or-two) and [that](#three), not `[x](y)`\n")
    assert links(page) == ["#one-thing-or-two", "#three"]
    assert anchors(page) == {"one-thing-or-two"}


@EVERY_PAGE
def test_a_list_or_a_table_begins_after_an_empty_line(page: Path):
    """Else the site shows its lines as one paragraph."""
    text, before = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8")), ""
    for line in text.splitlines():
        begins = line.startswith(("- ", "1. ")) and not before.startswith(("- ", "  ", "1. ", "#"))
        begins |= line.startswith("|") and not before.startswith(("|", "#"))
        assert not (begins and before.strip()), line
        before = line


def test_the_site_has_every_page_once():
    def listed(entries: list) -> list[str]:
        names: list[str] = []
        for entry in entries:
            names += listed(*entry.values()) if isinstance(entry, dict) else [entry]
        return names

    pages = sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs"))
    assert sorted(listed(SITE["nav"])) == pages


def test_the_addresses_of_the_project_are_the_same_everywhere():
    assert SITE["repo_url"] == PROJECT["urls"]["Repository"]
    assert all(PROJECT["urls"][name].startswith(SITE["repo_url"]) for name in PROJECT["urls"] if name != "Paper")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_on_the_package_index_every_link_is_absolute():
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    readme = (ROOT / "README.md").read_text()
    text = module.long_description(readme, repository="https://github.com/a/b", version="7")
    assert not [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith(("https://", "#"))]
    assert "https://github.com/a/b/blob/v7/docs/faq.md" in text
    assert "![The demo's report" not in readme or "https://raw.githubusercontent.com/a/b/v7/docs/report.png" in text
    assert text.count("](") == readme.count("](")


def test_the_extras_that_texts_name_exist():
    for page in PAGES:
        for names in re.findall(r"clip-cid\[([\w,]+)\]|'\.\[([\w,]+)\]'", page.read_text()):
            for extra in "".join(names).split(","):
                assert extra in PROJECT["optional-dependencies"], f"{page}: {extra}"


def test_the_wheel_has_every_file_of_the_package():
    """Files that are no modules come along only if `package-data` names them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "src" / "clip_cid"
    named = {path for pattern in settings["package-data"]["clip_cid"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others - named == set()
    assert {path.parent for path in package.rglob("*.py")} == {path.parent for path in package.rglob("__init__.py")}
