"""Arguments of the RSSM ops: weights, actions, states and noise are checked here, and made where they may be absent."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.backend import choose, probe
from apv_fast.ops.check import Arguments
from apv_fast.types import Latent, RSSMParams, State, state_dtype

# Of posterior and prior alike, of each, or to be drawn. A tensor is the noise itself or, as an int64 scalar, a seed.
Noise = Tensor | tuple[Tensor, Tensor] | None


def initial_state(params: RSSMParams, latent: Latent, batch_size: int) -> State:
    """All zeros: ``deter [B, D]``, ``stoch`` and the statistics ``[B, S, C]`` or ``[B, S]``."""
    dtype, device = state_dtype(params.gru_weight.dtype), params.gru_weight.device
    shape = (latent.stoch, latent.discrete) if latent.discrete else (latent.stoch,)
    deter_size = params.gru_weight.shape[0] // 3
    state = {"deter": torch.zeros(batch_size, deter_size, dtype=dtype, device=device)}
    return state | {
        name: torch.zeros(batch_size, *shape, dtype=dtype, device=device) for name in ("stoch", *latent.statistics)
    }


def seeded(latent: Latent, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`sample_noise` takes one number from the generator and makes all of the noise of it, in C++."""
    plain = latent.discrete > 0 and device.type == "cpu" and dtype == torch.float32
    return plain and not torch.compiler.is_compiling() and probe("cpu").available


def sample_seeds(count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` seeds, int64, as many draws of one would give."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def sample_noise(
    latent: Latent, *leading: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Noise for ``leading`` states: Gumbel ``[..., S, C]`` or standard normal ``[..., S]``.

    The same for every backend. Gumbel noise on a CPU is made of a seed by the C++ extension, if that is there: PyTorch
    draws it on one thread, number by number. Not while ``torch.compile`` traces: then PyTorch draws all.
    """
    if not latent.discrete:
        return torch.randn(*leading, latent.stoch, dtype=dtype, device=device, generator=generator)
    shape = (*leading, latent.stoch, latent.discrete)
    if seeded(latent, dtype, device):
        from apv_fast.cpu.parts.noise import gumbel  # the extension may be missing

        return gumbel(sample_seeds(1, generator)[0], shape)
    return -torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator).log()


def check_params(arguments: Arguments, params: RSSMParams, latent: Latent) -> None:
    """Check the weights against each other; binds H, D, M, and E and IN by the widths that are left."""
    arguments.require(len(params) == len(RSSMParams._fields), f"params has {len(params)} tensors; see RSSMParams")
    arguments.require(latent.stoch >= 1, f"stoch is {latent.stoch}; it must be at least 1")
    arguments.require(latent.discrete >= 0, f"discrete is {latent.discrete}; it must be at least 0 (0: Gaussian)")
    statistics = latent.stoch * (latent.discrete or 2)
    arguments.sizes.update({"M": statistics, "S": latent.stoch, "C": latent.discrete})
    dtype = params.img_in_weight.dtype
    arguments.tensor("params.img_in_weight", params.img_in_weight, "H IN")
    arguments.tensor("params.img_out_weight", params.img_out_weight, "H D", dtype)
    hidden, deter = arguments.sizes["H"], arguments.sizes["D"]
    arguments.sizes.update({"3*D": 3 * deter, "H+D": hidden + deter})
    arguments.tensor("params.gru_weight", params.gru_weight, "3*D H+D", dtype)
    for name, dims in (("img_dist_weight", "M H"), ("obs_dist_weight", "M H"), ("obs_out_weight", "H D+E")):
        arguments.tensor(f"params.{name}", getattr(params, name), dims, dtype)
    for name in ("img_in_bias", "img_out_bias", "obs_out_bias"):
        arguments.tensor(f"params.{name}", getattr(params, name), "H", dtype)
    for name in ("gru_bias", "gru_norm_weight", "gru_norm_bias"):
        arguments.tensor(f"params.{name}", getattr(params, name), "3*D", dtype)
    for name in ("img_dist_bias", "obs_dist_bias"):
        arguments.tensor(f"params.{name}", getattr(params, name), "M", dtype)
    arguments.sizes["E"] = arguments.sizes["D+E"] - deter
    mixed = latent.stoch * (latent.discrete or 1)
    arguments.sizes["P"] = arguments.sizes["IN"] - mixed
    arguments.require(hidden > 0, "params.img_in_weight has no rows; H must be at least 1")
    arguments.require(deter > 0, "params.img_out_weight has no columns; D must be at least 1")
    for name, key, least, seen in (("img_in", "IN", mixed, "stoch"), ("obs_out", "D+E", deter, "deter")):
        have = arguments.sizes[key]
        arguments.require(have >= least, f"params.{name}_weight has {have} columns; {seen} alone takes {least}")


def check_action(arguments: Arguments, action: Tensor | None, dims: str) -> None:
    """Check that an action, if there is one, has the dimensions ``dims`` and fits the padding."""
    arguments.sizes.pop("A", None)
    if action is None:
        return
    arguments.tensor("action", action, dims, None)
    width, pad = action.shape[-1], arguments.sizes["P"]
    arguments.require(width <= pad, f"action has {width} numbers; the model pads actions to {pad}, so at most {pad}")


def stoch_dims(latent: Latent, leading: str) -> str:
    """The dimensions of a latent sample behind ``leading`` ones."""
    return f"{leading} S C" if latent.discrete else f"{leading} S"


def check_state(arguments: Arguments, params: RSSMParams, state: State | None, latent: Latent, batch: int) -> State:
    """The state, zeros if None, in the states' dtype."""
    if state is None:
        return initial_state(params, latent, batch)
    for key in ("deter", "stoch"):
        arguments.require(key in state, f"state has the keys {sorted(state)}; it must have 'deter' and 'stoch'")
    arguments.tensor("state['deter']", state["deter"], "B D")
    arguments.tensor("state['stoch']", state["stoch"], stoch_dims(latent, "B"))
    dtype = state_dtype(params.gru_weight.dtype)
    return {"deter": state["deter"].to(dtype), "stoch": state["stoch"].to(dtype)}


def noise_pair(
    arguments: Arguments,
    params: RSSMParams,
    latent: Latent,
    noise: Noise,
    sample: bool,
    leading: tuple[int, ...],
    generator: torch.Generator | None,
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Noise of posterior and prior: as given, else drawn, else (None, None) for modes.

    For a fast engine on a GPU only two seeds are drawn: its kernels make the noise where they use it.
    """
    if not sample:
        return None, None
    if noise is None:
        dtype, device = state_dtype(params.gru_weight.dtype), params.gru_weight.device
        if device.type == "cuda" and choose(arguments.op.partition(":")[0], params.gru_weight, backend) != "reference":
            seeds = torch.randint(-(2**63), 2**63 - 1, (2,), device=device, generator=generator)
            return seeds[0], seeds[1]
        first = sample_noise(latent, *leading, dtype=dtype, device=device, generator=generator)
        return first, sample_noise(latent, *leading, dtype=dtype, device=device, generator=generator)
    pair = (noise, noise) if isinstance(noise, Tensor) else noise
    arguments.require(len(pair) == 2, f"noise has {len(pair)} tensors; it must be one, or a pair (posterior, prior)")
    dims = stoch_dims(latent, "B T"[: 2 * len(leading) - 1])
    dtype = state_dtype(params.gru_weight.dtype)
    for name, x in zip(("noise of the posterior", "noise of the prior"), pair, strict=True):
        seed = isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.int64
        arguments.tensor(name, x, "" if seed else dims, torch.int64 if seed else None)
    post, prior = (x if x.dtype == torch.int64 else x.to(dtype) for x in pair)
    return post, prior
