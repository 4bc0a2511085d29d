"""Meta-world's 50 manipulation tasks (version 3), rendered by MuJoCo.

A new goal at every reset; the state, goal included, is hidden from the agent and known to the scripted expert. An
episode never terminates; the suite's own limit is 500 control steps.

Limits: as in the official code, the rows of a camera that hangs upside down (``corner`` does) are put in reverse order,
which makes the image upright and leaves it mirrored.
It repeats bit for bit on one machine, like the suite in :mod:`apv_fast.envs.dmc`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
from gymnasium import spaces

from apv_fast.envs.base import Info, PixelEnv, View
from apv_fast.envs.rendering import choose_renderer

PAPER_TASKS = ("lever-pull", "drawer-open", "door-lock", "button-press-topdown-wall", "reach", "dial-turn")
DEFAULT_CAMERA = "corner"
_VERSION = "-v3"


@functools.cache
def _suite() -> Any:
    choose_renderer()
    try:
        import metaworld.env_dict
        import metaworld.policies
    except ModuleNotFoundError as error:
        raise ImportError(f"metaworld: environments need metaworld ({error}): pip install apv-fast") from error
    return metaworld


def tasks() -> list[str]:
    """Every task, without the package's version: ``drawer-open``."""
    return sorted(name.removesuffix(_VERSION) for name in _suite().env_dict.ALL_V3_ENVIRONMENTS)


def make(task: str, view: View) -> PixelEnv:
    """See :func:`apv_fast.envs.make`."""
    return MetaWorld(task, view)


class MetaWorld(PixelEnv):
    """One task. ``info["success"]`` says whether the goal was reached in this step."""

    def __init__(self, task: str, view: View) -> None:
        suite = _suite()
        self._env = suite.env_dict.ALL_V3_ENVIRONMENTS[task + _VERSION]()
        self._expert = suite.policies.ENV_POLICY_MAP[task + _VERSION]()
        self._env._set_task_called = True  # else it asks for one of the 50 goals of a benchmark
        self._env._freeze_rand_vec = False  # a new goal at every reset, ...
        self._env.seeded_rand_vec = True  # drawn from its own generator, not from NumPy's global one
        self._env._partially_observable = False  # the expert sees the goal
        self._env.__dict__.pop("sawyer_observation_space", None)  # cached, with the goal's bounds at zero
        self._state = np.zeros(0)  # what the expert sees, [39]
        self._camera = _camera(self._env.model, view.camera)
        self._renderer = _renderer(self._env.model, view)
        super().__init__(view, spaces.Box(-1.0, 1.0, (4,), np.float32), 1 / self._env.dt)

    def expert_action(self) -> np.ndarray:
        """What the task's scripted policy does now, float32 ``[4]`` in [-1, 1].

        Raises:
            RuntimeError: no episode was begun.
        """
        if not self._state.size:
            raise RuntimeError("expert_action: call reset() first: no episode is under way")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Constant")  # it is clipped here
            action = self._expert.get_action(self._state)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _begin(self, seed: int | None) -> None:
        import mujoco

        if seed is not None:
            self._env.seed(seed)
        self._state, _ = self._env.reset()
        # Else the first frame shows some bodies, and the goal, where they were before.
        mujoco.mj_kinematics(self._env.model, self._env.data)
        for site in self._env._target_site_config:
            self._env._set_pos_site(*site)

    def _advance(self, action: np.ndarray) -> tuple[float, bool, bool, Info]:
        self._state, reward, _, truncated, info = self._env.step(action)
        return float(reward), False, truncated, {"success": bool(info["success"])}

    def _image(self) -> np.ndarray:
        return self._render(self._camera)

    @property
    def cameras(self) -> list[str]:
        """See :class:`PixelEnv`."""
        return _cameras(self._env.model)

    def render_camera(self, camera: str | int) -> np.ndarray:
        """See :class:`PixelEnv`."""
        return self._render(_camera(self._env.model, camera))

    def _render(self, camera: int) -> np.ndarray:
        image: np.ndarray = self._renderer.render(self._env.data, camera)
        up = self._env.data.cam_xmat[camera].reshape(3, 3)[2, 1]  # how far the camera's own up points upwards
        return np.ascontiguousarray(image[::-1] if up < 0 else image)

    def close(self) -> None:
        """Free the OpenGL context; the environment cannot be used afterwards."""
        self._renderer.close()
        self._env.close()


def _cameras(model: Any) -> list[str]:
    return [model.camera(index).name for index in range(model.ncam)]


def _camera(model: Any, camera: str | int | None) -> int:
    names = _cameras(model)
    camera = DEFAULT_CAMERA if camera is None else camera
    if camera in names:
        return names.index(camera)
    if not (isinstance(camera, int) and 0 <= camera < len(names)):
        raise ValueError(f"camera must be below {len(names)}, or one of {', '.join(names)}; not {camera!r}")
    return camera


def _renderer(model: Any, view: View) -> Any:
    from apv_fast.envs.scene import SceneRenderer  # imports mujoco, which reads the choice of the renderer

    return SceneRenderer(model, view.size, view.quality)
