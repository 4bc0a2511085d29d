"""A checkout that is not installed, on a machine with few packages."""

from __future__ import annotations

import pytest

from tests.support.checkouts import run_python

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench.gpu.checkout import ROOT, environment

NOT_INSTALLED = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{f.__module__} {f}".lower()]
sys.path[:] = [p for p in sys.path if "editable" not in p]
"""


def test_kernels_are_found_without_an_installation() -> None:
    find = "\nimport importlib.util as u; print(u.find_spec('apv_fast.kernels'))"
    assert run_python(NOT_INSTALLED + find).strip() == "None"
    use = "\nimport bench.gpu.checkout; from apv_fast.kernels import aot; print(aot.__file__)"
    assert run_python(NOT_INSTALLED + use).strip() == str(ROOT / "kernels" / "aot.py")


def test_the_interpreter_is_off_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment()
    assert environment(A="b")["A"] == "b"


# What bench.device's docstring and the README name. A test blocks all other packages that are installed here.
NEEDED = ("torch", "triton", "numpy", "rich", "pillow")

FOR_TESTS = ("pytest", "hypothesis")

TRACE = """
import sys
from importlib import metadata
import re
closure, waiting = set(), list(ALLOWED)
while waiting:
    name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
    if name in closure:
        continue
    closure.add(name)
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    waiting += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra" not in need]
known = metadata.packages_distributions()
blocked = {top for top, owners in known.items() if not {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & closure}
blocked -= {"apv_fast", "bench", "tests"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    ("allowed", "code"),
    [
        ((), "import bench.device"),  # the parent, which never holds the device
        (NEEDED, "from bench.gpu import work; work.load()"),
        ((*NEEDED, *FOR_TESTS), "import bench.gpu.smoke, tests.test_gpu, bench.gpu.plugin"),
    ],
    ids=["parent", "child", "smoke and tests"],
)
def test_a_bare_machine_can_run_it(allowed: tuple[str, ...], code: str) -> None:
    """No package but those that we say is needed."""
    trace = NOT_INSTALLED + TRACE.replace("ALLOWED", repr(allowed)) + "import bench.gpu.checkout\n"
    assert run_python(trace + code + "\nprint('fine')").strip() == "fine"


def test_what_is_needed_is_what_we_say() -> None:
    from bench import device

    said = str(device.__doc__).lower() + (ROOT / "README.md").read_text().lower()
    assert all(said.count(name) >= 2 for name in (*NEEDED, *FOR_TESTS))
    for name in ("torch", "numpy", "rich", "PIL"):  # Triton is imported when a kernel first runs
        with pytest.raises(AssertionError, match=f"No module named '{name}"):
            trace = NOT_INSTALLED + TRACE.replace("ALLOWED", "()").replace(
                "blocked -=", f"blocked = {{{name!r}}}; blocked -="
            )
            run_python(trace + "import bench.gpu.checkout\nfrom bench.gpu import work; work.load()")
