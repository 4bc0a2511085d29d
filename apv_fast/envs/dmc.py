"""The DeepMind Control Suite (dm_control), rendered by MuJoCo.

Limits: MuJoCo's physics and Mesa's software renderer repeat bit for bit on one machine; another CPU, driver or version
may differ in the last bits. ``lqr`` draws its springs when it is built, so there only ``make``'s seed fixes everything.
"""

from __future__ import annotations

import functools
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from apv_fast.envs.rendering import APT_LINE, choose_renderer

Observation = dict[str, Any]  # {"image": uint8 [size, size, 3]}

DEFAULT_CAMERA = {"quadruped": 2}  # by domain, as in the paper; 0 elsewhere
ALIASES = {"cup": "ball_in_cup"}  # the official configurations' short name


@functools.cache
def _suite() -> Any:
    renderer = choose_renderer()
    try:
        from dm_control import suite
    except ModuleNotFoundError as error:
        raise ImportError(f"dmc: environments need dm_control ({error}): pip install 'apv-fast[envs]'") from error
    except Exception as error:  # a broken driver fails in PyOpenGL, in ctypes or in dm_control itself
        raise ImportError(
            f"cannot render with MUJOCO_GL={renderer} ({error}); on Debian or Ubuntu: {APT_LINE}"
        ) from error
    return suite


def tasks() -> list[str]:
    """Every task as ``domain-task``; ``cup`` stands for ``ball_in_cup`` as well."""
    names = {f"{domain}-{task}" for domain, task in _suite().ALL_TASKS}
    names |= {f"{alias}-{task}" for alias, of in ALIASES.items() for domain, task in _suite().ALL_TASKS if domain == of}
    return sorted(names)


def make(
    task: str,
    *,
    size: int,
    action_repeat: int,
    time_limit: int | None,
    camera: str | int | None,
    quality: str,
    seed: int,
) -> gymnasium.Env[Observation, np.ndarray]:
    """See :func:`apv_fast.envs.make`, which has checked the arguments."""
    return DMC(task, size, action_repeat, time_limit, camera, quality, seed)


class DMC(gymnasium.Env[Observation, np.ndarray]):
    """One task. ``info["repeats"]`` is how often the last action was applied: control steps for the clock."""

    render_mode = "rgb_array"

    def __init__(
        self,
        task: str,
        size: int,
        action_repeat: int,
        time_limit: int | None,
        camera: str | int | None,
        quality: str,
        seed: int,
    ) -> None:
        domain, _, name = task.partition("-")
        domain = ALIASES.get(domain, domain)
        self._env = _suite().load(domain, name, task_kwargs={"random": np.random.RandomState(seed)})
        self._action_repeat = action_repeat
        self._time_limit = time_limit
        fps = round(1 / (self._env.control_timestep() * action_repeat))
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": max(fps, 1)}
        self._steps: int | None = None  # control steps in this episode; None until the first reset
        self._first_seed: int | None = seed
        self._camera, self._render_flags = _make_camera(self._env.physics, domain, size, camera, quality)

        spec = self._env.action_spec()
        bounded = np.isfinite(spec.minimum) & np.isfinite(spec.maximum)
        self._low = np.where(bounded, spec.minimum, -1.0)
        self._high = np.where(bounded, spec.maximum, 1.0)
        self.action_space = spaces.Box(-1.0, 1.0, spec.shape, np.float32, seed=seed)
        self.observation_space = spaces.Dict({"image": spaces.Box(0, 255, (size, size, 3), np.uint8)})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; with ``seed``, the one that this seed always gives, whatever happened before."""
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        else:
            self._first_seed = None
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(int(self.np_random.integers(2**32)))
        self._env.reset()
        self._steps = 0
        return self._observe(), {"repeats": 0}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply ``action`` ``[A]`` in [-1, 1] (values outside are clipped) ``action_repeat`` times.

        Raises:
            RuntimeError: no episode is under way.
            ValueError: the action has the wrong shape or is not finite.
        """
        if self._steps is None:
            raise RuntimeError("step: call reset() first: no episode is under way")
        action = np.asarray(action, np.float64)
        if action.shape != self._low.shape or not np.isfinite(action).all():
            raise ValueError(f"action must be finite and have shape {self._low.shape}, not {action!r}")
        scaled = self._low + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (self._high - self._low)

        reward = 0.0
        terminated = truncated = False
        repeats = 0
        while repeats < self._action_repeat and not (terminated or truncated):
            time_step = self._env.step(scaled)
            repeats += 1
            self._steps += 1
            reward += float(time_step.reward)
            terminated = bool(time_step.last() and time_step.discount == 0.0)
            out_of_time = self._time_limit is not None and self._steps >= self._time_limit
            truncated = not terminated and bool(time_step.last() or out_of_time)
        if terminated or truncated:
            self._steps = None  # dm_control would begin a new episode silently
        return self._observe(), reward, terminated, truncated, {"repeats": repeats}

    def render(self) -> np.ndarray:
        """The current frame, uint8 ``[size, size, 3]``."""
        frame: np.ndarray = self._observe()["image"]
        return frame

    def close(self) -> None:
        """Free the physics and its OpenGL context; the environment cannot be used afterwards."""
        self._env.physics.free()  # dm_control's own close() does nothing

    def _observe(self) -> Observation:
        return {"image": self._camera.render(render_flag_overrides=self._render_flags).copy()}


def _make_camera(
    physics: Any, domain: str, size: int, camera: str | int | None, quality: str
) -> tuple[Any, dict[str, bool]]:
    """A camera that is kept (one a frame, as ``physics.render`` makes, costs about 10 %), and its render flags."""
    from dm_control.mujoco import engine

    camera = DEFAULT_CAMERA.get(domain, 0) if camera is None else camera
    count = int(physics.model.ncam)
    names = [physics.model.id2name(index, "camera") for index in range(count)]
    if camera not in names and not (isinstance(camera, int) and -1 <= camera < count):
        raise ValueError(f"camera must be -1 (free), below {count}, or one of {', '.join(names)}; not {camera!r}")
    # The OpenGL context is made at the first frame from what the model says then.
    visual = physics.model.vis
    visual.global_.offwidth = visual.global_.offheight = size
    flags = {}
    if quality == "fast":
        visual.quality.offsamples = 0
        flags = {"shadow": False, "reflection": False}
    return engine.Camera(physics, size, size, camera_id=camera), flags
