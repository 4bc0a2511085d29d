"""What the RSSM's ops check alike: weights, actions, states; and the states that they start from."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.types import Latent, RSSMParams, State, state_dtype


def initial_state(params: RSSMParams, latent: Latent, batch_size: int) -> State:
    """All zeros: ``deter [B, D]``, ``stoch`` and the statistics ``[B, S, C]`` or ``[B, S]``."""
    dtype, device = state_dtype(params.gru_weight.dtype), params.gru_weight.device
    shape = (latent.stoch, latent.discrete) if latent.discrete else (latent.stoch,)
    deter_size = params.gru_weight.shape[0] // 3
    state = {"deter": torch.zeros(batch_size, deter_size, dtype=dtype, device=device)}
    return state | {
        name: torch.zeros(batch_size, *shape, dtype=dtype, device=device) for name in ("stoch", *latent.statistics)
    }


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
    width = latent.stoch * (latent.discrete or 1)
    arguments.sizes["P"] = arguments.sizes["IN"] - width
    arguments.require(hidden > 0, "params.img_in_weight has no rows; H must be at least 1")
    arguments.require(deter > 0, "params.img_out_weight has no columns; D must be at least 1")
    for name, key, least, seen in (("img_in", "IN", width, "stoch"), ("obs_out", "D+E", deter, "deter")):
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
