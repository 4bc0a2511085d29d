"""Pictures of a MuJoCo model, beside other libraries that render in the same process.

An OpenGL context is current in a thread until another is made current, and libraries remember which one was theirs
without asking. So a context is made current before every frame and before its objects are freed: objects freed in
another context's name are that one's, and its pictures turn black.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from apv_fast.envs.rendering import APT_LINE, close_at_exit, renderers

_MAX_GEOMS = 10_000


class SceneRenderer:
    """One camera's pictures of a model, or several cameras' in turn.

    Args:
        model: a ``mujoco.MjModel``; its visual settings are changed.
        size: height and width in pixels.
        quality: ``"paper"`` or ``"fast"``, see :func:`apv_fast.envs.make`.

    Raises:
        ImportError: there is no OpenGL to render with.
    """

    def __init__(self, model: Any, size: int, quality: str) -> None:
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        if quality == "fast":
            model.vis.quality.offsamples = 0
        self._model, self._rect = model, mujoco.MjrRect(0, 0, size, size)
        self._camera, self._option = mujoco.MjvCamera(), mujoco.MjvOption()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        if quality == "fast":
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._scene.flags[flag] = False
        try:
            self._gl = mujoco.GLContext(size, size)
        except Exception as error:  # a broken driver fails in PyOpenGL or in ctypes
            raise ImportError(f"cannot render ({error}); on Debian or Ubuntu: {APT_LINE}") from error
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._open = True
        renderers.add(self)
        close_at_exit()

    def render(self, data: Any, camera: int) -> np.ndarray:
        """What the model's camera sees, uint8 ``[size, size, 3]``, row 0 at the top of the camera."""
        self._gl.make_current()
        self._camera.fixedcamid = camera
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        image = np.empty((self._rect.height, self._rect.width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self._rect, self._context)
        return image[::-1]  # OpenGL begins with the lowest row

    def close(self) -> None:
        """Free the context and what it holds; nothing can be rendered afterwards."""
        if self._open:
            self._open = False
            self._gl.make_current()
            self._context.free()
            self._gl.free()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()
