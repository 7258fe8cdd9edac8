"""Adds to the site of `make docs` what its pages link to outside of docs/: pages such as README.md, and pictures.

On GitHub, a page of docs/ links to `../README.md` and `../benchmarks/results/picture.png`. The site has neither folder,
so these hooks of mkdocs copy each linked file into the site, and change the link.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTER_PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(!?\[[^\]]*\])\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the outer pages, and every other file that a page links to, to the files of the site."""
    outer = {name: uri for name, uri in OUTER_PAGES.items() if (ROOT / name).is_file()}
    pages = [*DOCS.rglob("*.md"), *(ROOT / name for name in outer)]
    linked = {
        target for page in pages for _, link, _ in _LINK.findall(page.read_text()) if (target := _outside(page, link))
    }
    added = outer | {name: f"repository/{name}" for name in linked - outer.keys() if (ROOT / name).is_file()}
    for name, uri in added.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Changes links to files outside of docs/ into links to their copies; a link to a folder becomes text."""
    sources = {uri: ROOT / name for name, uri in OUTER_PAGES.items()}
    source = sources.get(page.file.src_uri, DOCS / page.file.src_uri)
    up = "../" * page.file.src_uri.count("/")

    def changed(match: re.Match) -> str:
        text, link, anchor = match.groups()
        target = (source.parent / link).resolve()
        if target.is_dir():
            return text.strip("![]")
        if name := _outside(source, link):
            return f"{text}({up}{OUTER_PAGES.get(name, f'repository/{name}')}{anchor or ''})"
        if source.parent == ROOT and target.is_relative_to(DOCS):  # an outer page
            return f"{text}({target.relative_to(DOCS).as_posix()}{anchor or ''})"
        return match[0]

    return _LINK.sub(changed, markdown)


def _outside(page: Path, link: str) -> str | None:
    """Returns the path within the repository of a file that `page` links to, or None if it is in docs/ or missing."""
    target = (page.parent / link).resolve()
    is_outside = target.is_relative_to(ROOT) and not target.is_relative_to(DOCS) and target.exists()
    return target.relative_to(ROOT).as_posix() if is_outside else None
