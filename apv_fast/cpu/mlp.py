"""``mlp`` with products, bias and ELU in C++ where that is faster: see :mod:`apv_fast.cpu.parts.product`.

A bfloat16 network takes a float32 input: the first layer rounds it on the way, and its gradient comes as float32.
"""

from __future__ import annotations

from torch import Tensor

from apv_fast.cpu.parts.product import dense, elu_backward, product
from apv_fast.ops.mlp import Mlp
from apv_fast.ops.op import Gradients, Kernel


def _forward(call: Mlp, keep: bool) -> list[Tensor]:
    """The last layer's output and, with ``keep``, those before it, the last one first."""
    x, out = call.x, []
    for weight, bias in zip(call.layers[::2], call.layers[1::2], strict=True):
        x = dense(x, weight, bias, elu=True)
        out.append(x)
    return out[::-1] if keep else [x]


def _fake(call: Mlp, keep: bool) -> list[Tensor]:
    out = [bias.new_empty(call.x.shape[0], bias.shape[0]) for bias in call.layers[:0:-2]]
    return out if keep else out[:1]


def _backward(call: Mlp, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    (grad,), outputs = grads, results[::-1]
    assert grad is not None
    before, of_layers = [call.x, *outputs[:-1]], [call.x.new_empty(0) for _ in call.layers]
    for i in reversed(range(len(outputs))):
        grad, total = elu_backward(grad, outputs[i])
        if "layers" in needs:
            of_layers[2 * i : 2 * i + 2] = [product(grad.T, before[i].to(grad.dtype)), total]
        if i > 0 or "x" in needs:
            grad = product(grad, call.layers[2 * i], before[i].dtype)
    return {"x": grad, "layers": of_layers}


_layers = Kernel("mlp_cpu", Mlp, outputs=1, forward=_forward, backward=_backward, fake=_fake)


def mlp(x: Tensor, layers: list[Tensor]) -> Tensor:
    """See :func:`apv_fast.reference.mlp.mlp`."""
    return _layers(x, layers)[0]
