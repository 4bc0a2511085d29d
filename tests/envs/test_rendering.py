"""Rendering beside the compilers that torch brings."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

_SCRIPT = """
from apv_fast import envs
env = envs.make("dmc:cartpole-balance", seed=0, quality="fast")
env.reset()
import triton
env.step(env.action_space.sample())
env.close()
print("survived")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_can_be_imported_after_rendering() -> None:
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "survived", result.stderr


_TURNS = """
import numpy as np
from apv_fast import envs

ids = {"w": "dmc:walker-walk", "r": "metaworld:reach", "h": "gym:Hopper-v5"}
environments, first = {}, {}

def look(name):
    if name not in environments:
        environments[name] = envs.make(ids[name], seed=0, quality="fast")
    image = environments[name].reset(seed=1)[0]["image"]
    np.testing.assert_array_equal(image, first.setdefault(name, image), err_msg=name)
    assert image.std() > 10, name

# A small letter looks through an environment, made when it is first needed; a capital one closes it.
for letter in "rwh wrhr Wrh wrw Rwh hwHw rwhrw WrhrHr":
    if letter.isupper():
        environments.pop(letter.lower()).close()
    elif letter != " ":
        look(letter)
print("the same", len(first))
"""


@pytest.mark.thorough
def test_suites_render_beside_each_other_and_close_quietly() -> None:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", _TURNS], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "the same 3", result.stderr
    ours = [line for line in result.stderr.splitlines() if "apv_fast" in line or "SceneRenderer" in line]
    assert not ours, result.stderr
