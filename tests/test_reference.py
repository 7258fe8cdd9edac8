"""Tests that the documentation site has every public name and every page; `make docs` tests that it builds."""

import re

import pytest
import yaml
from readme_blocks import ROOT

import jaxpack
import torch_bridge

DOCS = ROOT / "docs"
NAVIGATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


def pages_in(entries: list) -> list[str]:
    """Lists the pages of a part of the navigation, in order."""
    found = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages_in(value) if isinstance(value, list) else [value]
    return found


@pytest.mark.parametrize("module", [jaxpack, torch_bridge], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name_once(module):
    page = (DOCS / "reference" / f"{module.__name__}.md").read_text()
    assert sorted(re.findall(rf"^::: {module.__name__}\.(\w+)$", page, re.MULTILINE)) == sorted(module.__all__)


def test_every_page_is_in_the_navigation_once():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    navigated = pages_in(NAVIGATION)
    assert len(navigated) == len(set(navigated))
    assert pages <= set(navigated)


def test_the_start_page_lists_every_page():
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "index.md").read_text()))
    assert linked == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"index.md"}


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")))
def test_the_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
