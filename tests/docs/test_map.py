"""The map in DESIGN.md is that of the tree."""

from __future__ import annotations

import re

from docs.generators.pages import ROOT, blocks


def test_the_map_names_every_folder_and_no_other() -> None:
    (tree,) = (block.text for block in blocks(ROOT / "DESIGN.md") if block.text.startswith("apv_fast/"))
    top, package = "", set[str]()
    for line in tree.splitlines():
        if line.startswith("    "):  # goes on with what the line before says
            continue
        entries = re.match(r"(?:[\w.]+/? )*[\w.]+/?(?=  |$)", line.strip())
        assert entries, line
        if not line.startswith(" "):
            top = entries[0].strip("/")
            assert (ROOT / top).is_dir(), top
        elif top == "apv_fast":
            package.update(entry.strip("/") for entry in entries[0].split())
    folders = {path.parent.name for path in (ROOT / "apv_fast").glob("*/__init__.py")}
    assert not folders - package
    assert not [entry for entry in package if not (ROOT / "apv_fast" / entry).exists()]
    tests = tree.split("\ntests/")[1].split("\ndocs/")[0]
    assert not [name for name in re.findall(r"(\w+)/", tests) if not (ROOT / "tests" / name).is_dir()]
