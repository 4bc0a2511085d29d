"""The tests that ``python -m bench.device`` runs on a GPU: which first, and what is read of them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench.gpu import plugin, suite
from bench.gpu.checkout import ROOT, environment

SUITE = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "because"
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError("in a fixture")
def test_broken(broken): pass
"""


def test_results_of_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of these tests, not of those
    (tmp_path / "test_small.py").write_text(SUITE)
    (tmp_path / "test_absent.py").write_text("import gymnasium_is_not_here\ndef test_it(): pass\n")
    (tmp_path / "test_wrong.py").write_text("import bench.no_such_module\ndef test_it(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    ini = ("-c", str(tmp_path / "pytest.ini"))
    parts = ((str(tmp_path / "test_small.py"), *ini), (str(tmp_path), f"--ignore={tmp_path / 'test_small.py'}", *ini))
    monkeypatch.setattr(suite, "PARTS", parts)
    monkeypatch.setattr(suite, "WAIT", 0.2)
    seen: list[dict[str, Any]] = []
    summary = suite.run(tmp_path / "report", tmp_path / "log", 240, expression="not gpu", progress=seen.append)
    assert [one["passed"] for one in seen] == sorted(one["passed"] for one in seen) and summary["parts"] == 2
    counts = {name: summary[name] for name in ("collected", "passed", "failed", "skipped", "not_run", "stopped")}
    # Skipped: the marked one, and the module that needs a package; failed: two tests and the module that is wrong.
    assert counts == {"collected": 4, "passed": 1, "failed": 3, "skipped": 2, "not_run": 0, "stopped": False}
    whys = {Path(one["test"]).name: one["why"] for one in summary["failures"]}
    assert "because" in whys["test_small.py::test_fails"]
    assert "in a fixture" in whys["test_small.py::test_broken"]
    assert "no_such_module" in whys["test_wrong.py"]
    assert summary["unfinished"] == []
    assert summary["skips"] == {"no reason": 1, "gymnasium_is_not_here is not installed": 1}


def test_what_matters_most_comes_first() -> None:
    class Item:
        def __init__(self, path: str, name: str) -> None:
            self.path, self.name = Path(path), name

    names = ["test_opcheck[observe-triton]", "test_values[ones-triton]", "test_values[odd-triton]"]
    items: list[Any] = [Item("tests/ops/test_rssm_observe.py", name) for name in names]
    items += [
        Item("tests/ops/test_kl_balance.py", "test_values[triton]"),
        Item("tests/test_gpu.py", "test_full_size[x]"),
    ]
    items += [Item("tests/test_gpu.py", "test_barrier_orders[x]")]
    plugin.pytest_collection_modifyitems(items)
    order = [f"{item.path.name} {item.name}" for item in items]
    assert order[:2] == ["test_gpu.py test_barrier_orders[x]", "test_gpu.py test_full_size[x]"]
    assert order[2:] == [
        "test_rssm_observe.py test_values[odd-triton]",
        "test_kl_balance.py test_values[triton]",
        "test_rssm_observe.py test_values[ones-triton]",
        "test_rssm_observe.py test_opcheck[observe-triton]",
    ]


def test_results_until_the_time_was_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that was skipped is not one of the tests that were collected."""
    lines: list[dict[str, Any]] = [{"part": []}, {"collected": 4}, {"started": "g.py::a"}, {"started": "g.py::hangs"}]
    lines += [{"test": "f.py", "outcome": "skipped", "seconds": 0.0, "why": "x is not installed"}]
    lines += [{"test": "g.py::a", "outcome": "passed", "seconds": 1.0, "why": ""}]
    written = tmp_path / "written"
    written.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"test": "cut o')
    report = tmp_path / "report"
    monkeypatch.setattr(
        suite, "command", lambda expression, part, processes: ["sh", "-c", f"cp {written} {report}; sleep 60"]
    )
    start = time.monotonic()
    summary = suite.run(report, tmp_path / "log", 1.0)
    assert time.monotonic() - start < 30
    assert summary["parts"] == 1  # the other has not begun
    assert summary["stopped"] and (summary["passed"], summary["skipped"], summary["not_run"]) == (1, 1, 3)
    assert summary["unfinished"] == ["g.py::hangs"]


def test_tests_that_could_not_run_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "command", lambda expression, part, processes: ["sh", "-c", "echo no pytest; exit 4"])
    assert suite.run(tmp_path / "report", tmp_path / "log", 60)["error"].startswith(
        "pytest's exit status is 4: no pytest"
    )
    monkeypatch.setattr(suite, "command", lambda expression, part, processes: [str(tmp_path / "missing")])
    assert "missing" in suite.run(tmp_path / "report", tmp_path / "log", 60)["error"]


@pytest.mark.thorough
def test_every_backend_for_gpus_is_selected() -> None:
    """``-m gpu`` finds the tests of the table's GPU backends by themselves."""
    assert suite.PARTS[0] == ("tests/test_gpu.py",) and "--ignore=tests/test_gpu.py" in suite.PARTS[1]
    command = suite.command("gpu", ("tests",), processes=1)
    assert command[command.index("gpu") - 1 : command.index("gpu") + 1] == ["-m", "gpu"]
    process = subprocess.run(
        [*command, "--collect-only"], cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True
    )
    for name in ("test_gpu.py", "ops/test_lambda_return.py", "ops/test_kl_balance.py", "ops/test_knn_bonus.py"):
        assert f"tests/{name}::" in process.stdout, process.stdout[-2000:]
    assert "tests/config/test_config.py::" not in process.stdout
