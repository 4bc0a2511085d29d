"""The list of planted faults fits the tree. That each is noticed, ``python -m tests.faults`` shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import faults
from tests.support import ROOT


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_its_text_is_there_once(fault: faults.Fault) -> None:
    assert fault.problem() == ""
    assert fault.wrong != fault.right
    assert [path for path in fault.tests if path.startswith("tests/") and not (ROOT / path).exists()] == []


def test_names_are_unique() -> None:
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)


def test_what_is_no_longer_there_is_said(tmp_path: Path) -> None:
    fault = faults.Fault("one", "a.py", "x = 1", "x = 2", ())
    assert fault.problem(tmp_path) == "there is no a.py"
    for text, count in (("y = 1\n", 0), ("x = 1\nx = 1\n", 2)):
        (tmp_path / "a.py").write_text(text)
        assert fault.problem(tmp_path) == f"a.py has {count} times 'x = 1', not once"


def test_verdicts(tmp_path: Path) -> None:
    """Of a tree of one file: a fault that its test notices, one that it does not, and one whose tests do not run."""
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "test_a.py").write_text("from a import x\ndef test_x() -> None:\n    assert x == 1\n")
    seen, unseen, lost = (
        faults.Fault(name, "a.py", f"{name} = 1", f"{name} = 2", tests)
        for name, tests in (("x", ("test_a.py",)), ("y", ("test_a.py",)), ("y", ("test_b.py",)))
    )
    passed: set[tuple[str, ...]] = set()
    assert faults.judge(seen, tmp_path, passed) == (True, "test_a.py::test_x")
    assert faults.judge(unseen, tmp_path, passed) == (False, "NOT NOTICED")
    noticed, why = faults.judge(lost, tmp_path, passed)
    assert not noticed and why.startswith("NOT JUDGED: pytest's exit status is 4 without the fault")
    assert passed == {("test_a.py",)}
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 1\n"
