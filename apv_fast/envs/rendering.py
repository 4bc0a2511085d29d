"""Chooses how MuJoCo renders without a display, before anything imports it.

``MUJOCO_GL`` decides if it is set; else EGL where a device answers, else OSMesa. One process keeps its choice: MuJoCo
and PyOpenGL read it once. A process that has rendered must not be forked: start children with ``spawn``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import weakref
from typing import Any

APT_LINE = "apt-get install -y libegl1 libgl1 libgl1-mesa-dri libosmesa6"

renderers: weakref.WeakSet[Any] = weakref.WeakSet()  # those of ours that exist


def choose_renderer() -> str:
    """Set ``MUJOCO_GL`` unless it is set already, and return it.

    Raises:
        ImportError: neither EGL nor OSMesa can be loaded.
    """
    _import_triton_first()
    if "MUJOCO_GL" not in os.environ:
        if _egl_devices() > 0:
            os.environ["MUJOCO_GL"] = "egl"
        elif _loads("libOSMesa.so.8") or _loads("libOSMesa.so.6"):
            os.environ["MUJOCO_GL"] = "osmesa"
        else:
            raise ImportError(
                f"cannot render: neither EGL nor OSMesa was found on this machine; on Debian or Ubuntu: {APT_LINE}"
            )
    return os.environ["MUJOCO_GL"]


def close_at_exit() -> None:
    """Close our renderers before anything else that is done at exit.

    Call it again whenever a library was imported that ends OpenGL when the process does: what is registered last is
    done first.
    """
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    for renderer in list(renderers):
        renderer.close()


def _import_triton_first() -> None:
    """Import Triton, if it is installed, before Mesa's driver is loaded.

    Both bring LLVM. With Mesa's loaded first, importing Triton later (torch does: its optimisers and ``torch.compile``)
    crashes the process; seen with Triton 3.7.1 and Mesa 22.3.6.
    """
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _egl_devices() -> int:
    """Devices that EGL can render on; 0 also where the loader is there but no driver (a common state in containers)."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return 0
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return 0
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    count = ctypes.c_int(0)
    return count.value if query(0, None, ctypes.byref(count)) else 0
