"""The C interface of ``csrc/cuda/`` (``scan.h``, ``api.h``) through ctypes: tensors go as addresses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from torch import Tensor

_ADDRESS, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Matrix(ctypes.Structure):
    """``ApvMatrix``."""

    _fields_ = (("data", _ADDRESS), ("row", _INT), ("column", _INT))

    @classmethod
    def of(cls, x: Tensor) -> Matrix:
        """A bfloat16 matrix of any strides."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


_SIZES = ("batch", "length", "deter", "hidden", "stoch", "discrete", "first_row")
_PLAN = ("blocks", "shared_bytes", "workspace_bytes")
_MATRICES = ("stoch_weight", "gru_weight", "obs_weight", "dist_weight")
_VECTORS = ("gru_bias", "norm_weight", "norm_bias", "dist_bias")
_INPUTS = ("input_x", "input_obs", "keep", "start", "noise", "seed")
_TRACE = ("deter_trace", "stoch_trace", "stats_trace", "x_trace", "parts_trace", "norm_trace", "y_trace")
_GRADS_OUT = ("grad_deter", "grad_stoch", "grad_stats")
_GRADS = ("dx", "dparts", "dy", "dstats", "dstart", "dnorm_weight", "dnorm_bias")


class Scan(ctypes.Structure):
    """``ApvScan``; what is not set is zero."""

    _fields_ = (
        *((name, _INT) for name in _SIZES),
        ("min_std", _DOUBLE),
        *((name, _INT) for name in _PLAN),
        *((name, Matrix) for name in _MATRICES),
        *((name, _ADDRESS) for name in (*_VECTORS, *_INPUTS, *_TRACE, *_GRADS_OUT, *_GRADS)),
        ("accumulate", _INT),
        ("workspace", _ADDRESS),
    )


class Sample(ctypes.Structure):
    """``ApvSample``; what is not set is zero."""

    _fields_ = (
        *((name, _INT) for name in ("rows", "stoch", "discrete")),
        ("min_std", _DOUBLE),
        *((name, _ADDRESS) for name in ("stats", "noise", "seed", "sample", "grad", "dstats")),
    )


class Library:
    """A build of the kernels: the one for GPUs, or the tests' emulation of it.

    Raises:
        OSError: it is not there, cannot be loaded, or is of another version of apv-fast.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        arguments: dict[str, tuple[Any, ...]] = {"probe": (), "architectures": ()}
        arguments["sample"] = (_ADDRESS, ctypes.c_int, _ADDRESS)
        for direction in ("forward", "backward"):
            arguments |= {direction: (_ADDRESS, _ADDRESS), f"plan_{direction}": (_ADDRESS,)}
        try:
            self.c.apv_scan_bytes.restype = ctypes.c_int64
            same = self.c.apv_scan_bytes() == ctypes.sizeof(Scan)
            for name, types in arguments.items():
                function = getattr(self.c, f"apv_{name}")
                function.restype, function.argtypes = ctypes.c_char_p, types
        except AttributeError:
            same = False
        if not same:
            raise OSError(f"{path} was built from other sources than this version of apv-fast: install it again")

    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities that it has code for, times 10: 80, 90, ..."""
        return tuple(int(each) // 10 for each in _text(self.c.apv_architectures()).split(","))

    def probe(self) -> str:
        """Why the current device cannot run the kernels; empty if it can."""
        return _text(self.c.apv_probe())

    def plan(self, direction: str, scan: Scan) -> str:
        """Set what a launch needs for the sizes in ``scan``; why they do not fit, empty if they do."""
        return _text(getattr(self.c, f"apv_plan_{direction}")(ctypes.byref(scan)))

    def launch(self, direction: str, scan: Scan, stream: int) -> str:
        """Launch on a stream of the current device; why that failed, empty if it did not."""
        return _text(getattr(self.c, f"apv_{direction}")(ctypes.byref(scan), stream))

    def sample(self, sample: Sample, backward: bool, stream: int) -> str:
        """Launch the sampling of many latents, or its backward; why that failed, empty if it did not."""
        return _text(self.c.apv_sample(ctypes.byref(sample), backward, stream))


def _text(reason: bytes | None) -> str:
    return reason.decode() if reason else ""
