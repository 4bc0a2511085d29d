"""Faults, planted one at a time, and which test notices each: ``python -m tests.faults [NAME ...]``.

    python -m tests.faults             every fault but those in C++
    python -m tests.faults --cpp       those too; each rebuilds apv_fast._C in a copy of the tree, minutes
    python -m tests.faults --list      the table
    python -m tests.faults kl lambda   those whose name contains one of these words

A fault is one text in the place of another, in a copy of the tree. The tests that are named beside it must pass before
and fail after. The exit status is 1 if a fault goes unnoticed, if its text is not there exactly once, or if its tests
do not run. The list has one op a kind, not every line that could be wrong: it shows that each kind of test still bites.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

FOLDERS = ("apv_fast", "bench", "csrc", "kernels", "tests")  # what a copy of the tree has
FILES = ("pyproject.toml", "CMakeLists.txt")
LIMIT = 600  # seconds of pytest
PASSED, FAILED, ERROR = 0, 1, 3  # exit statuses of pytest; the last is not its own, which says 1 of an error as well


@dataclass(frozen=True)
class Fault:
    """``wrong`` in the place of ``right`` in ``file``; pytest's arguments ``tests`` must then fail."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    @property
    def cpp(self) -> bool:
        """Whether apv_fast._C must be built again. (The sources of csrc/cuda/ are compiled by the tests.)"""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")

    def problem(self, root: Path = ROOT) -> str:
        """Why it cannot be planted, or an empty string."""
        path = root / self.file
        if not path.is_file():
            return f"there is no {self.file}"
        count = path.read_text().count(self.right)
        return "" if count == 1 else f"{self.file} has {count} times {self.right!r}, not once"


FAULTS: tuple[Fault, ...] = (
    # The reference's scan
    Fault(
        "reference scan: PyTorch's epsilon in LayerNorm",
        "apv_fast/reference/rssm_step.py",
        "LAYER_NORM_EPS = 1e-3",
        "LAYER_NORM_EPS = 1e-5",
        ("tests/ops/test_rssm_observe.py", "-k", "definition and reference and odd"),
    ),
    Fault(
        "reference scan: the action of the episode before",
        "apv_fast/reference/rssm_step.py",
        "action = None if action is None else torch.where(keep[:, None], action, 0)",
        "",
        ("tests/ops/test_rssm_observe.py", "-k", "definition and reference and odd"),
    ),
    # The scan in C++
    Fault(
        "C++ scan: the gradient of h crosses the beginning of an episode",
        "csrc/cpu/rssm_observe/backward.cpp",
        "store_some(to + j, keep ? grad : Vector<Real>{}, count - j);",
        "store_some(to + j, grad, count - j);",
        ("tests/ops/test_rssm_observe.py", "-k", "values_and_gradients and cpu and odd and float64"),
    ),
    Fault(
        "C++ scan: the candidate's part of the update gate's gradient",
        "csrc/cpu/rssm_observe/backward.cpp",
        "dh_row * (g.proposal - before) * g.update * (1 - g.update)",
        "dh_row * g.proposal * g.update * (1 - g.update)",
        ("tests/ops/test_rssm_observe.py", "-k", "values_and_gradients and cpu and odd and float64"),
    ),
    # The scan in Triton, interpreted
    Fault(
        "Triton scan: the state of the episode before",
        "kernels/parts/rssm_forward.py",
        "earlier, only_if(t > 0, before_mask)",
        "earlier, only_if(t > 0, mask)",
        ("tests/ops/test_rssm_observe.py", "-k", "values_and_gradients and triton and odd and float64 and sample"),
    ),
    Fault(
        "Triton scan: samples of the episode before have a gradient",
        "kernels/parts/rssm_backward.py",
        "later = later & (tl.load(g.keep + at + 1, later, 0) != 0)",
        "later = later & (tl.load(g.keep + at + 1, later, 0) != 2)",
        ("tests/ops/test_rssm_observe.py", "-k", "values_and_gradients and triton and odd and float64 and sample"),
    ),
    # The scan in CUDA C++, in the emulator
    Fault(
        "CUDA scan: the state of the episode before",
        "csrc/cuda/forward.h",
        "hidden[gate * X::kItems + item] = keep(t)[row] != 0 ? total<X, 3>(partial, gate, item) : 0;",
        "hidden[gate * X::kItems + item] = keep(t)[row] != 2 ? total<X, 3>(partial, gate, item) : 0;",
        ("tests/cuda/test_host.py", "-k", "values_and_gradients and odd and sample"),
    ),
    # Losses
    Fault(
        "KL, reference: the balance trains the posterior",
        "apv_fast/reference/kl_balance.py",
        "mix = balance if forward else 1 - balance",
        "mix = 1 - balance if forward else balance",
        ("tests/ops/test_kl_balance.py", "-k", "against_torch_distributions and reference"),
    ),
    Fault(
        "KL, Triton: free nats count for the gradient",
        "kernels/kl_balance.py",
        "return tl.where(reached >= FREE, share, 0.0)",
        "return share",
        ("tests/ops/test_kl_balance.py", "-k", "free_nats and triton"),
    ),
    Fault(
        "λ-return, reference: λ in the place of 1 − λ",
        "apv_fast/reference/lambda_return.py",
        "discount.to(dtype) * (1 - lambda_) * following",
        "discount.to(dtype) * lambda_ * following",
        ("tests/ops/test_lambda_return.py", "-k", "values_and_gradients and reference and 3x7"),
    ),
    Fault(
        "λ-return, Triton: the last row's gradient of the discount",
        "kernels/lambda_return.py",
        "c += (tl.where(inner, (1 - LAMBDA) * next_value + LAMBDA * next_return, b),)",
        "c += ((1 - LAMBDA) * next_value + LAMBDA * next_return,)",
        ("tests/ops/test_lambda_return.py", "-k", "values_and_gradients and triton and 3x7"),
    ),
    # The bonus
    Fault(
        "kNN, reference: the k − 1 nearest",
        "apv_fast/reference/knn_bonus.py",
        "distance.topk(min(k, len(keys))",
        "distance.topk(min(k, len(keys) - 1)",
        ("tests/ops/test_knn_bonus.py", "-k", "definition and reference"),
    ),
    Fault(
        "queue of the bonus: new rows go to the end",
        "apv_fast/reference/video_bonus.py",
        "torch.cat([rows, queue])[: len(queue)]",
        "torch.cat([queue, rows])[-len(queue) :]",
        ("tests/ops/test_video_bonus.py", "-k", "successive_calls and reference"),
    ),
    Fault(
        "queue of the bonus: a row that nobody wrote is a neighbour",
        "apv_fast/reference/video_bonus.py",
        "absent = (key >= filled)",
        "absent = (key > filled)",
        ("tests/ops/test_video_bonus.py", "-k", "successive_calls and reference"),
    ),
    # The optimiser
    Fault(
        "Adam, reference: a clip that only stretches",
        "apv_fast/reference/keras_adam.py",
        "(settings.clip / norm).clamp(max=1)",
        "(settings.clip / norm).clamp(min=1)",
        ("tests/ops/test_keras_adam.py", "-k", "formula and reference"),
    ),
    Fault(
        "Adam, reference: uncorrected second moment",
        "apv_fast/reference/keras_adam.py",
        "rate * (1 - beta2**t).sqrt() / (1 - beta1**t)",
        "rate / (1 - beta1**t)",
        ("tests/ops/test_keras_adam.py", "-k", "formula and reference"),
    ),
    # Data
    Fault(
        "replay: the last start as often as the others",
        "apv_fast/data/replay.py",
        "extra = self._chunk_length if self._prioritize_ends else 0",
        "extra = 0",
        ("tests/data/test_replay.py", "-k", "distribution"),
    ),
    Fault(
        "videos: the last start of a sequence is never drawn",
        "apv_fast/data/sequence_sampler.py",
        "generator.integers(last + 1 + self._extra)",
        "generator.integers(np.maximum(last + self._extra, 1))",
        ("tests/data/test_video_dataset.py", "-k", "distribution"),
    ),
    # Runs
    Fault(
        "checkpoints: the oldest are kept",
        "apv_fast/run/checkpoint.py",
        "sorted(directory.glob(_PATTERN))[:-keep]",
        "sorted(directory.glob(_PATTERN))[keep:]",
        ("tests/run/test_checkpoint.py", "-k", "old_ones_go"),
    ),
    Fault(
        "resuming: random numbers begin anew",
        "apv_fast/run/checkpoint.py",
        'torch.set_rng_state(state["torch"].cpu())',
        "",
        ("tests/run/test_checkpoint.py", "-k", "random_generators"),
    ),
    Fault(
        "configuration: zero counts as positive",
        "apv_fast/config/validation.py",
        "if (value := getattr(config, name)) < least:",
        "if (value := getattr(config, name)) < least - 1:",
        ("tests/config",),
    ),
)


def copy_tree(target: Path) -> None:
    """The working tree's files that the tests need, the built extension included."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "results")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, target / file)
    (target / "apv_fast" / "kernels").symlink_to(target / "kernels")  # before an installation, which maps it elsewhere


def rebuild(tree: Path) -> None:
    """``apv_fast._C`` of a tree, in the tree."""
    import pybind11

    build = tree / "build"
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["cmake", "-S", str(tree), "-B", str(build), "-DAPV_FAST_CUDA=OFF", *options], **quiet)  # type: ignore[call-overload]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], **quiet)  # type: ignore[call-overload]
    (module,) = build.glob("_C.*.so")
    shutil.copy(module, tree / "apv_fast" / module.name)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Pytest's exit status in a tree and the first test that failed, or pytest's last line if none did.

    A fixture that fails (a compiler, say, that refuses the source) is no test that notices.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rf", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=LIMIT, check=False)
    failed = re.search(r"^FAILED (.*?)(?: - |$)", done.stdout, re.MULTILINE)
    if failed:
        return FAILED, failed[1]
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return (ERROR if done.returncode == FAILED else done.returncode), " ".join(last)


def write(path: Path, text: str) -> None:
    """Put a text into a file. Python sees that by the second and the size alone, so what it compiled is deleted."""
    path.write_text(text)
    if path.suffix == ".py":
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)


def judge(fault: Fault, tree: Path, passed: set[tuple[str, ...]]) -> tuple[bool, str]:
    """Whether a fault is noticed in a tree, and by which test or why not. The tree is then as it was before.

    Tests in ``passed`` are known to pass without a fault; it gets those that do.
    """
    if problem := fault.problem(tree):
        return False, f"NOT PLANTED: {problem}"
    path = tree / fault.file
    before = path.read_text()
    try:
        if fault.cpp and fault.tests not in passed:
            rebuild(tree)  # what another fault may have left
        status, said = (PASSED, "") if fault.tests in passed else run_tests(tree, fault.tests)
        if status:
            return False, f"NOT JUDGED: pytest's exit status is {status} without the fault: {said}"
        passed.add(fault.tests)
        write(path, before.replace(fault.right, fault.wrong))
        if fault.cpp:
            rebuild(tree)
        status, said = run_tests(tree, fault.tests)
    except subprocess.SubprocessError as error:
        return False, f"NOT JUDGED: {error}"
    finally:
        write(path, before)
    if status not in (PASSED, FAILED):
        return False, f"NOT JUDGED: pytest's exit status is {status}: {said}"
    return status == FAILED, said if status == FAILED else "NOT NOTICED"


def choose(words: Iterable[str], *, cpp: bool) -> list[Fault]:
    """The faults whose name contains one of ``words``, or all; those of the C++ extension on request."""
    words = [word.lower() for word in words]
    named = [fault for fault in FAULTS if not words or any(word in fault.name.lower() for word in words)]
    return [fault for fault in named if cpp or not fault.cpp]


def main(arguments: list[str] | None = None) -> int:
    """Plant what was chosen; 1 if one goes unnoticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Plant faults, see tests fail.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only faults whose name contains one of these")
    parser.add_argument("--cpp", action="store_true", help="also those that need a new build of apv_fast._C")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    options = parser.parse_args(arguments)
    chosen = choose(options.names, cpp=options.cpp or options.list)
    if not chosen:
        parser.error("no fault has such a name; see --list")
    if options.list:
        for fault in chosen:
            print(f"{fault.name} ({fault.file}): pytest {' '.join(fault.tests)}")
        return 0
    missed, passed = 0, set[tuple[str, ...]]()
    with tempfile.TemporaryDirectory(prefix="apv-fast-faults-") as folder:
        copy_tree(Path(folder))
        for fault in sorted(chosen, key=lambda fault: fault.cpp):  # what those build stays
            start = time.monotonic()
            noticed, said = judge(fault, Path(folder), passed)
            missed += not noticed
            print(f"{fault.name}: {'noticed by ' * noticed}{said} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} faults noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
