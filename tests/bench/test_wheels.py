"""Wheels for a bare machine: what is trimmed off made-up ones, what stays, and what is unpacked."""

from __future__ import annotations

import base64
import csv
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench.gpu import wheels
from bench.gpu.checkout import ROOT
from bench.gpu.wheels import TAG, main, make, of_tasks, refuse, trim, unpack
from tests.support.wheels import INFORMATION, TOY, wheel


def test_what_is_refused_goes_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out = trim(wheel(tmp_path), tmp_path / "out", refuse(["*/tests/*", "toy/big/*", "*.dist-info/*"]))
    assert out.name == f"toy-1.0-{TAG}-py3-none-any.whl"
    with zipfile.ZipFile(out) as content:
        kept = {name: content.read(name) for name in content.namelist()}
        rows = list(csv.reader(content.read(f"{INFORMATION}/RECORD").decode().splitlines()))
    names = {"toy/__init__.py", f"{INFORMATION}/METADATA", f"{INFORMATION}/WHEEL", f"{INFORMATION}/RECORD"}
    assert kept.keys() == names, "what tells of the package stays, whatever is refused"
    assert kept["toy/__init__.py"] == b"VALUE = 3\n" and f"Build: {TAG}\n".encode() in kept[f"{INFORMATION}/WHEEL"]
    assert {row[0] for row in rows} == names
    for name, digest, size in rows:
        if not name.endswith("RECORD"):
            sha = base64.urlsafe_b64encode(hashlib.sha256(kept[name]).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={sha}", len(kept[name]))


def test_a_wheel_of_which_nothing_goes_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = wheel(tmp_path)
    out = trim(old, tmp_path / "out", refuse([]))
    assert out.name == old.name and out.read_bytes() == old.read_bytes()


def test_what_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "toy-1.0.whl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"toy-1\.0\.whl is not NAME-VERSION-"):
        trim(tmp_path / "toy-1.0.whl", tmp_path, refuse([]))
    with zipfile.ZipFile(tmp_path / "toy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy.py", "")
    with pytest.raises(ValueError, match=r"has no toy-1\.0\.dist-info/RECORD"):
        trim(tmp_path / "toy-1.0-py3-none-any.whl", tmp_path, refuse([]))


ASSETS = "metaworld/assets"
META = {
    "metaworld/envs/sawyer_push_v3.py": 'return full_V3_path_for("sawyer_xyz/push.xml")\n',
    "metaworld/envs/sawyer_hammer_v3.py": 'return full_V3_path_for("sawyer_xyz/hammer.xml")\n',
    f"{ASSETS}/sawyer_xyz/push.xml": '<include file="../scene/scene.xml"/><mesh file="../meshes/puck.stl"/>',
    f"{ASSETS}/sawyer_xyz/hammer.xml": '<include file="../scene/scene.xml"/><mesh file="../meshes/hammer.stl"/>',
    f"{ASSETS}/scene/scene.xml": '<texture file="textures/floor.png"/>',
    **{f"{ASSETS}/{name}": "x" for name in ("scene/textures/floor.png", "meshes/puck.stl", "meshes/hammer.stl")},
    "metaworld-3.1.1.dist-info/WHEEL": "Wheel-Version: 1.0\n",
}


def test_pictures_and_meshes_of_other_tasks_go(tmp_path: Path) -> None:
    file = wheel(tmp_path, "metaworld-3.1.1-py3-none-any.whl", META)
    for tasks, gone in (
        (["push"], {"meshes/hammer.stl"}),
        (["hammer"], {"meshes/puck.stl"}),
        (["push", "hammer"], set()),
    ):
        keep = of_tasks(file, tasks)
        assert {name for name in META if not keep(name)} == {f"{ASSETS}/{name}" for name in gone}
    with pytest.raises(ValueError, match=r"task 'fly': .* has no such environment"):
        of_tasks(file, ["fly"])


def toys(names: Iterable[str], folder: Path) -> None:
    """In the place of pip."""
    wheel(folder)
    wheel(folder, "metaworld-3.1.1-py3-none-any.whl", META)


def test_a_folder_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = make(tmp_path / "wheels", ["toy"], ["push"], toys)
    names = sorted(path.name for path in (tmp_path / "wheels").iterdir())
    assert names == [f"metaworld-3.1.1-{TAG}-py3-none-any.whl", f"toy-1.0-{TAG}-py3-none-any.whl"]
    assert total == sum(path.stat().st_size for path in (tmp_path / "wheels").iterdir())
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    with pytest.raises(ValueError, match="is not empty"):
        make(tmp_path / "wheels", ["toy"], ["push"], toys)


def test_what_is_downloaded_is_for_that_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this one is: nothing is built, in the versions that we test with."""
    called: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: called.append(command))
    wheels.download(["mujoco", "scipy"], tmp_path, "3.12")
    ((python, *command),) = called
    options = " ".join(command)
    assert python == sys.executable and options.startswith("-m pip download ") and options.endswith(" mujoco scipy")
    for option in ("--no-deps", "--only-binary=:all:", "--python-version 3.12", "--implementation cp"):
        assert f" {option} " in options
    assert f"--dest {tmp_path} " in options and f"--constraint {ROOT / 'constraints.txt'} " in options
    assert "--platform=manylinux2014_x86_64" in command and "--platform=manylinux_2_28_x86_64" in command


def test_the_limit_and_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def download(names: Iterable[str], folder: Path, python: str) -> None:
        asked.extend(names)
        toys(names, folder)

    monkeypatch.setattr(wheels, "download", download)
    options = ["--tasks", "push", "--there", "SciPy,matplotlib"]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    assert set(wheels.WHEELS) - set(asked) == {"scipy", "matplotlib"}
    assert main([*options, "--out", str(tmp_path / "two"), "--limit", "0.0001"]) == 1
    assert "too much by 0.00 MiB: fewer --tasks" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--there", "nothing"])
    assert "--there: nothing: must be some of mujoco, " in capsys.readouterr().err


def test_unpacked_wheels_can_be_imported_from(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", files=TOY | {"toy-1.0.data/purelib/toy/more.py": "", "toy-1.0.data/scripts/toy": ""})
    site = unpack(tmp_path / "wheels", tmp_path / "site")
    assert (site / "toy" / "__init__.py").read_text() == "VALUE = 3\n" and (site / "toy" / "more.py").exists()
    assert not (site / "toy-1.0.data").exists() and (site / INFORMATION / "METADATA").exists()
    (site / "toy" / "__init__.py").write_text("changed")
    unpack(tmp_path / "wheels", site)
    assert (site / "toy" / "__init__.py").read_text() == "changed", "the same wheels are not unpacked again"
    wheel(tmp_path / "wheels", files=TOY | {"toy/__init__.py": "VALUE = 44\n"})
    unpack(tmp_path / "wheels", site)
    assert (site / "toy" / "__init__.py").read_text() == "VALUE = 44\n"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no wheels; make them with"):
        unpack(tmp_path / "empty", site)
