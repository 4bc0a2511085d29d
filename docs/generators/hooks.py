"""What mkdocs calls while it builds: files from outside of ``docs/`` become pages, markers become generated tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from docs.generators import benchmarks, equations, settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"DESIGN.md": "design.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = (
    "kernels/rssm_phases.svg",
    "bench/results/demo-open-loop.gif",
    "bench/results/drawer-contact-sheet.png",
    "bench/results/walker-laptop.png",
)
GENERATED: dict[str, Callable[[], str]] = {
    "commands": settings.commands,
    "groups": settings.shared_groups,
    "presets": settings.presets,
    "benchmarks": lambda: benchmarks.page(ROOT / "bench/results"),
}
_MARKER = re.compile(r"<!-- generated: (\w+) -->")
_LINK = re.compile(r"\]\(((?:\.\./)*)([^()#:]+)(#[^()]*)?\)")
_ROLE = re.compile(r":(?:mod|func|class|data|meth|attr):(?=<code|`)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages and pictures that lie elsewhere in the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for picture in PICTURES:
        files.append(File.generated(config, _site_path(picture), abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated, and let links that hold in the repository hold in the site."""
    markdown = _MARKER.sub(lambda match: GENERATED[match[1]](), markdown)
    folder = page.file.src_uri.rpartition("/")[0]
    if folder == "notes":
        page.meta["search"] = {"boost": 0.1}  # what holds now is found before what was measured then
    in_docs = page.file.src_uri not in PAGES.values()
    return _LINK.sub(lambda match: _site_link(match, folder, in_docs), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Equations become MathML; roles of Sphinx in docstrings, which Markdown does not know, go."""
    return _ROLE.sub("", equations.inline(html))


def _site_link(match: re.Match[str], folder: str, in_docs: bool) -> str:
    """A link to a file of the repository, as one to where that file is in the site."""
    up, path, anchor = match[1], match[2], match[3] or ""
    start = (ROOT / "docs" / folder) if in_docs else ROOT
    target = (start / up / path).resolve()
    if not target.is_relative_to(ROOT) or not target.is_file():
        return match[0]
    inside = str(target.relative_to(ROOT))
    if inside in PAGES:
        there = PAGES[inside]
    elif inside in PICTURES:
        there = _site_path(inside)
    elif inside.startswith("docs/"):
        there = inside.removeprefix("docs/")
    else:
        return match[0]
    back = "../" * (folder.count("/") + 1) if folder else ""
    return f"]({back}{there}{anchor})"


def _site_path(picture: str) -> str:
    return "pictures/" + picture.rpartition("/")[2]
