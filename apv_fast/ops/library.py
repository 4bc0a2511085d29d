"""Registration of the ops with ``torch.library``.

Every op is *composite*: under autograd, ``torch.compile`` and fake tensors it is what the implementation that the table
picks does. The reference is plain PyTorch and is traced through; a compiled kernel is an opaque op of its own, with its
own fake and backward. So the reference keeps PyTorch's autograd and the fast path costs one op call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from apv_fast.profile import annotated

_LIBRARY = torch.library.Library("apv_fast", "DEF")


def define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as ``torch.ops.apv_fast.<name of the schema>``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, annotated(name)(function), "CompositeImplicitAutograd")
        return function

    return register
