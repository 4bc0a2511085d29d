"""The DeepMind Control Suite (dm_control), rendered by MuJoCo, and the Triped of :mod:`apv_fast.envs.triped`.

Limits: MuJoCo's physics and Mesa's software renderer repeat bit for bit on one machine; another CPU, driver or version
may differ in the last bits. ``lqr`` draws its springs when it is built, so there only ``make``'s seed fixes everything.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gymnasium import spaces

from apv_fast.envs.base import Info, PixelEnv, Rescale, View
from apv_fast.envs.rendering import APT_LINE, choose_renderer, close_at_exit

DEFAULT_CAMERA = {"quadruped": 2, "triped": 2}  # by domain, as in the paper; 0 elsewhere
ALIASES = {"cup": "ball_in_cup"}  # the official configurations' short name
TRIPED = ("walk", "run")


@functools.cache
def _suite() -> Any:
    renderer = choose_renderer()
    try:
        from dm_control import suite
    except ModuleNotFoundError as error:
        raise ImportError(f"dmc: environments need dm_control ({error}): pip install apv-fast") from error
    except Exception as error:  # a broken driver fails in PyOpenGL, in ctypes or in dm_control itself
        raise ImportError(
            f"cannot render with MUJOCO_GL={renderer} ({error}); on Debian or Ubuntu: {APT_LINE}"
        ) from error
    close_at_exit()
    return suite


def tasks() -> list[str]:
    """Every task as ``domain-task``; ``cup`` stands for ``ball_in_cup`` as well."""
    names = {f"{domain}-{task}" for domain, task in _suite().ALL_TASKS}
    names |= {f"{alias}-{task}" for alias, of in ALIASES.items() for domain, task in _suite().ALL_TASKS if domain == of}
    return sorted(names | {f"triped-{task}" for task in TRIPED})


def make(task: str, view: View) -> PixelEnv:
    """See :func:`apv_fast.envs.make`."""
    return DMC(task, view)


class DMC(PixelEnv):
    """One task of the suite."""

    def __init__(self, task: str, view: View) -> None:
        domain, _, name = task.partition("-")
        domain = ALIASES.get(domain, domain)
        self._env = _load(domain, name, np.random.RandomState(view.seed))
        self._size, self._flags = view.size, _set_quality(self._env.physics, view)
        self._cameras: dict[str | int, Any] = {}
        self._camera = DEFAULT_CAMERA.get(domain, 0) if view.camera is None else view.camera
        self._eye(self._camera)
        spec = self._env.action_spec()
        self._rescale = Rescale(spec.minimum, spec.maximum)
        super().__init__(view, spaces.Box(-1.0, 1.0, spec.shape, np.float32), 1 / self._env.control_timestep())

    def _begin(self, seed: int | None) -> None:
        if seed is not None:
            self._env.task.random.seed(seed)
        self._env.reset()

    def _advance(self, action: np.ndarray) -> tuple[float, bool, bool, Info]:
        time_step = self._env.step(self._rescale(action))
        terminated = bool(time_step.last() and time_step.discount == 0.0)
        return float(time_step.reward), terminated, bool(time_step.last()), {}

    def _image(self) -> np.ndarray:
        return self.render_camera(self._camera)

    @property
    def cameras(self) -> list[str]:
        """See :class:`PixelEnv`."""
        model = self._env.physics.model
        return [model.id2name(index, "camera") for index in range(int(model.ncam))]

    def render_camera(self, camera: str | int) -> np.ndarray:
        """See :class:`PixelEnv`."""
        eye = self._eye(camera)
        _make_current(self._env.physics.contexts)
        image: np.ndarray = eye.render(render_flag_overrides=self._flags).copy()
        return image

    def _eye(self, camera: str | int) -> Any:
        """A camera; it is kept, since one a frame, as ``physics.render`` makes, costs about 10 %."""
        from dm_control.mujoco import engine

        if camera not in self._cameras:
            names = self.cameras
            if camera not in names and not (isinstance(camera, int) and -1 <= camera < len(names)):
                known = ", ".join(names)
                raise ValueError(f"camera must be -1 (free), below {len(names)}, or one of {known}; not {camera!r}")
            self._cameras[camera] = engine.Camera(self._env.physics, self._size, self._size, camera_id=camera)
        return self._cameras[camera]

    def close(self) -> None:
        """Free the physics and its OpenGL context; the environment cannot be used afterwards."""
        _make_current(self._env.physics._contexts)  # None if nothing was rendered
        self._env.physics.free()  # dm_control's own close() does nothing


def _make_current(contexts: Any) -> None:
    """dm_control trusts that its context is still the current one; another library may have rendered since."""
    if contexts is not None:
        contexts.gl._platform_make_current()


def _load(domain: str, task: str, random: np.random.RandomState) -> Any:
    if domain == "triped":
        _suite()  # chooses the renderer before dm_control is imported
        from apv_fast.envs import triped

        return triped.load(task, random)
    return _suite().load(domain, task, task_kwargs={"random": random})


def _set_quality(physics: Any, view: View) -> dict[str, bool]:
    """Set up the OpenGL context, which is made at the first frame from what the model says then; the render flags."""
    visual = physics.model.vis
    visual.global_.offwidth = visual.global_.offheight = view.size
    if view.quality != "fast":
        return {}
    visual.quality.offsamples = 0
    return {"shadow": False, "reflection": False}
