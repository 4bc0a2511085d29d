"""``python -m tests.triton_versions VERSION ...``: the Triton kernels under other versions of Triton. Downloads them.

Each version goes into a folder of its own, without its dependencies, which is put before this environment's packages;
torch stays what it is. Then, a line each: the tests that take each kernel through the interpreter at least once, and
every kernel compiled for each ``--arch`` (sm_90 by default). 1 if something fails under a version. For by hand: nothing
else calls it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPS = (
    *("lambda_return", "kl_balance", "image_loss", "keras_adam", "knn_bonus", "video_bonus"),
    *("rssm_rollout", "rssm_imagine", "rssm_step", "rssm_observe", "stacked_observe"),
)
TESTS = ("kernels/test_probe.py", "kernels/test_persistent.py", *(f"ops/test_{op}.py" for op in OPS))
# Of these files: all that is about Triton alone; and of the tests of all backends, those that show most.
SOME = (
    "test_probe or test_persistent or triton and (keras_adam and test_ or layouts or queue_moves or same_numbers or"
    " any_strides or many or seed or"
    " values_and_gradients and (odd or gaussian or rollout) and not float64 and not mode)"
)


def install(version: str, folder: Path) -> Path:
    """Put ``triton==version`` into a folder below ``folder``, unless it is there already."""
    target = folder / f"triton-{version}"
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return target


def run(name: str, command: list[str], env: dict[str, str], log: Path) -> bool:
    """Run a check, with its output in a file; print a line about it."""
    start = time.perf_counter()
    with log.open("wb") as output:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, check=False)
    verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
    print(f"{name}: {verdict}, {time.perf_counter() - start:.0f} s, {log}", flush=True)
    return done.returncode == 0


def check(version: str, folder: Path, architectures: Sequence[int], interpret: bool = True) -> bool:
    """Whether the kernels pass (unless not ``interpret``) and compile for ``architectures`` under ``version``."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(install(version, folder)), *([before] if before else [])])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / f"cache-{version}")}
    show = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    actual = subprocess.run(show, env=env, capture_output=True, text=True, check=True).stdout.strip()
    if actual != version:
        raise RuntimeError(f"asked for Triton {version}, and {actual} is imported")
    tests = [f"tests/{name}" for name in TESTS]
    interpreted = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SOME, *tests]
    checks = {"interpreted": interpreted} if interpret else {}
    for arch in architectures:
        checks[f"compiled-sm_{arch}"] = [sys.executable, "-m", "apv_fast.kernels.aot", "--arch", str(arch)]
    results = [
        run(f"triton {version} {what}", command, env, folder / f"{what}-{version}.log")
        for what, command in checks.items()
    ]
    return all(results)


def main() -> int:
    """Check the versions that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.triton_versions", description=__doc__.split("\n\n")[0])
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="as on PyPI: 3.6.0")
    parser.add_argument("--folder", type=Path, help="keep versions, caches and logs here (default: a temporary one)")
    parser.add_argument("--arch", type=int, action="append", help="compute capability; may be repeated (default: 90)")
    parser.add_argument("--only-compile", action="store_true", help="leave the tests in the interpreter out")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    architectures, interpret = options.arch or [90], not options.only_compile
    results = [check(version, folder.resolve(), architectures, interpret) for version in options.versions]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
