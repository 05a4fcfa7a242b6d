"""Links, paths and test commands in the documentation exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def anchors(page):
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(page):
    """Links of a page to a file or heading that does not exist."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        exists = target.exists() and (not anchor or anchor in anchors(target))
        if not exists and "://" not in link:
            yield link


def missing_tests(page):
    """Test commands of a page that name a missing file, or select no test by `-k`."""
    for command in re.findall(r"pytest (tests[^`]*)", page.read_text()):
        paths, _, name = command.partition(" -k ")
        files = [ROOT / path for path in paths.split()]
        definition = re.compile(rf"def test_\w*{name}")
        if not all(file.exists() for file in files) or (
            name and not any(definition.search(file.read_text()) for file in files)
        ):
            yield command


def missing_paths(page):
    """Repository paths in the text of a page that do not exist."""
    folders = "moddistill|tests|benchmarks|experiments|docs|tools"
    paths = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/]+(?:\.\w+)?)", page.read_text())
    yield from (path for path in paths if not (ROOT / path).exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("missing", [missing_links, missing_tests, missing_paths])
def test_page_refers_to_what_exists(page, missing):
    assert not list(missing(page))


def test_a_missing_link_path_or_test_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A: b_c\n[x](#a-b_c) [y](#d) [z](e.md)\n`pytest tests/test_docs.py -k nothing_here`\n"
        "`pytest tests/test_docs.py -k refers`, tests/test_docs.py, moddistill/missing.py\n"
    )
    assert list(missing_links(page)) == ["#d", "e.md"]
    assert list(missing_tests(page)) == ["tests/test_docs.py -k nothing_here"]
    assert list(missing_paths(page)) == ["moddistill/missing.py"]
