"""What ``python -m bench.device`` builds: the library of CUDA C++, and the cache of compiled kernels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast import cuda
from bench.gpu import build, cache
from bench.gpu.checkout import CACHE, ROOT, environment


def nvcc(folder: Path, script: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo release 13.0 && exit\n{script}\n')
    path.chmod(0o755)
    return path.parent


def test_a_library_that_loads_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it came here; no compiler is needed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_cuda.so")
    (tmp_path / "_cuda.so").write_text("carried")
    result = build.build(build.Probe("GPU", library=True), tmp_path / "log", 60)
    assert result["library"].startswith("found, sha256 ") and "error" not in result
    result = build.build(build.Probe("GPU", why="cannot be loaded"), tmp_path / "log", 60)
    assert result["error"] == "the CUDA C++ library: nvcc is not on the path" and "library" not in result


def test_a_library_that_does_not_load_is_built_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, library = tmp_path / "calls", tmp_path / "apv" / "_cuda.so"
    script = f'echo "$@" >> {calls}\nwhile [ "$1" != -o ]; do shift; done\necho new > "$2"'
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path, script)}:/usr/bin:/bin")
    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    library.parent.mkdir()
    library.write_text("of another machine")
    result = build.build(build.Probe("GPU", (9, 0), why="it is cut off"), tmp_path / "log", 60)
    assert "error" not in result and "built for sm_90a (it is cut off)" in result["library"]
    assert library.read_text() == "new\n" and [path.name for path in library.parent.iterdir()] == ["_cuda.so"]
    lines = calls.read_text().splitlines()
    assert len(lines) == 4 and all("arch=compute_90a,code=sm_90a" in line and "sm_80" not in line for line in lines)


def test_a_gpu_has_the_name_that_its_generation_is_shipped_under() -> None:
    for major, shipped in cuda.ARCHITECTURES.items():
        assert f"sm_{build.architecture((major, 0))}" == shipped
    later = [(8, 6), (8, 9), (10, 3), (12, 1)]
    assert [build.architecture(capability) for capability in later] == ["86", "89", "103", "121"]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("number", [90, 100, 120])
@pytest.mark.parametrize(
    "source",
    [
        "bench/gpu/barrier.cu",
        pytest.param("csrc/cuda/scan_forward.cu", marks=pytest.mark.slow),
        pytest.param("csrc/cuda/scan_backward.cu", marks=pytest.mark.slow),
    ],
)
def test_no_kernel_needs_what_one_gpu_alone_has(source: str, number: int, tmp_path: Path) -> None:
    """nvcc makes the same of a source for the plain name and the one with an "a".

    That the plain names' assembler takes it: tests/test_cuda_compile.py.
    """

    def ptx(arch: str) -> list[str]:
        out = tmp_path / f"{arch}.ptx"
        command = ["nvcc", "-O3", "-std=c++17", f"-arch=compute_{arch}", f"-I{ROOT / 'csrc' / 'cuda'}", "-ptx"]
        subprocess.run([*command, str(ROOT / source), "-o", str(out)], check=True)
        lines = out.read_text().splitlines()
        assert f".target sm_{arch}" in lines
        return [line for line in lines if not line.startswith(".target")]

    assert ptx(str(number)) == ptx(f"{number}a")


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "_cuda.so"
    library.write_text("old")
    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path, 'echo fatal error: here; exit 3')}:/usr/bin:/bin")
    result = build.build(build.Probe("GPU", why="old"), tmp_path / "log", 60)
    assert "fatal error: here" in result["error"] and library.read_text() == "old"
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RuntimeError, match="was not done when the time was up"):
        build.compile_library("90a", tmp_path / "out", tmp_path / "log", 0.3)


def test_what_is_here() -> None:
    probe = build.look(300.0)
    assert probe.library == build.LIBRARY.exists() and bool(probe.why) != probe.library


def test_the_cache_of_kernels_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed in one checkout, found in another: Triton's lists then name the files there."""
    here, there = tmp_path / "here", tmp_path / "there"
    kernel = here / "triton" / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "k.cubin").write_bytes(b"code")
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": str(kernel / "k.cubin")}}))
    (kernel / "lock").write_text("")
    (kernel / "tmp.pid_7").mkdir()
    (kernel / "tmp.pid_7" / "half").write_text("half")
    (here / "inductor" / "fx").mkdir(parents=True)
    (here / "inductor" / "fx" / "graph").write_bytes(os.urandom(300_000))
    monkeypatch.setattr(cache, "CACHE", here)
    tar = tmp_path / cache.NAME
    assert cache.pack(tar).startswith("3 files of triton and inductor")
    monkeypatch.setattr(cache, "CACHE", there)
    assert cache.unpack(tmp_path / "none") == ""
    assert cache.unpack(tar) == f"3 files of {cache.NAME}"
    group = json.loads((there / "triton" / "KEY" / "__grp__k.json").read_text())
    assert Path(group["child_paths"]["k.cubin"]).read_bytes() == b"code"
    assert group["child_paths"]["k.cubin"].startswith(str(there))
    assert not list(there.rglob("half")) and not list(there.rglob("lock"))
    monkeypatch.setattr(cache, "CACHE", here)
    monkeypatch.setattr(cache, "LIMIT", 100_000)
    assert cache.pack(tar).startswith("2 files of triton,")
    tar.write_bytes(tar.read_bytes()[:50])
    monkeypatch.setattr(cache, "CACHE", there)
    assert "cannot be read" in cache.unpack(tar) and not there.exists()


def test_children_compile_into_the_cache() -> None:
    env = environment()
    assert env["TRITON_CACHE_DIR"] == str(CACHE / "triton") or "TRITON_CACHE_DIR" in os.environ
    assert str(cache.CARRIED.parent) == str(ROOT / "build")
