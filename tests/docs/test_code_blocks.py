"""The Python blocks of the pages run, one page after the other in a namespace of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from docs.generators.pages import ROOT, blocks, documents

PAGES = [page for page in documents() if page.is_relative_to(ROOT / "docs") and blocks(page, "python")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    with torch.random.fork_rng(devices=[]):
        for block in blocks(page, "python"):
            if block.title:  # a file that the reader is to save
                (tmp_path / block.title).write_text(block.text)
                monkeypatch.delitem(sys.modules, Path(block.title).stem, raising=False)
            else:
                source = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
                exec(compile(source, str(page), "exec"), namespace)


def test_the_pages_that_should_have_code_have_it() -> None:
    assert {page.stem for page in PAGES} >= {"modules", "environments", "backends", "videos", "runs"}
