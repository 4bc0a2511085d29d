"""The recurrent state-space model as modules: one RSSM, and two stacked as in APV (Seo et al. 2022, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apv_fast import ops
from apv_fast.mixed_precision import cast_layers
from apv_fast.nn.init import keras_init
from apv_fast.nn.saving import Savable
from apv_fast.reference.rssm_step import LAYER_NORM_EPS, feat
from apv_fast.types import Latent, Noise, RSSMParams, State


class RSSM(Savable):
    """A recurrent state-space model; parameters are float32, products run in ``dtype``.

    Args:
        embed_dim: E, width of the observations' embedding.
        action_dim: A, or 0 for an action-free model, which ignores actions.
        deter: D, size of the GRU's state.
        hidden: H, width of the hidden layers.
        stoch: S, number of latent variables.
        discrete: C, classes of each; 0 for Gaussian latents.
        action_pad: width that actions are padded to, so that one weight file fits every task.
        act: activation; only "elu" exists.
        min_std: least standard deviation of Gaussian latents.
        std_act: how they are made positive; only "sigmoid2" exists.
        backend: see :mod:`apv_fast.backend`.
        dtype: of the matrix products; bfloat16 keeps float32 weights, states and statistics.

    Raises:
        ValueError: a size is not positive, an action does not fit the pad, or an option does not exist.
    """

    def __init__(
        self,
        embed_dim: int,
        action_dim: int = 0,
        *,
        deter: int = 1024,
        hidden: int = 1024,
        stoch: int = 32,
        discrete: int = 32,
        action_pad: int = 50,
        act: str = "elu",
        min_std: float = 0.1,
        std_act: str = "sigmoid2",
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("deter", deter), ("hidden", hidden), ("stoch", stoch)):
            if size < 1:
                raise ValueError(f"RSSM: {name} is {size}; it must be at least 1")
        if discrete < 0:
            raise ValueError(f"RSSM: discrete is {discrete}; it must be at least 0 (0: Gaussian latents)")
        if not 0 <= action_dim <= action_pad:
            raise ValueError(f"RSSM: action_dim is {action_dim}; it must be between 0 and action_pad = {action_pad}")
        if act != "elu":
            raise ValueError(f"RSSM: act is {act!r}; it must be 'elu'")
        if std_act != "sigmoid2":
            raise ValueError(f"RSSM: std_act is {std_act!r}; it must be 'sigmoid2'")
        self.latent = Latent(stoch, discrete, min_std)
        self.embed_dim, self.action_dim, self.deter, self.hidden = embed_dim, action_dim, deter, hidden
        self.backend, self.dtype = backend, dtype
        stoch_size, statistics = stoch * (discrete or 1), stoch * (discrete or 2)
        self.feat_dim = stoch_size + deter
        self.img_in = nn.Linear(stoch_size + action_pad, hidden)
        self.gru = nn.Linear(hidden + deter, 3 * deter)
        self.gru_norm = nn.LayerNorm(3 * deter, eps=LAYER_NORM_EPS)
        self.img_out = nn.Linear(deter, hidden)
        self.img_dist = nn.Linear(hidden, statistics)
        self.obs_out = nn.Linear(deter + embed_dim, hidden)
        self.obs_dist = nn.Linear(hidden, statistics)
        keras_init(self)

    def params(self) -> RSSMParams:
        """The weights as the ops take them, in the dtype of the products."""
        layers = (self.img_in, self.gru, self.gru_norm, self.img_out, self.img_dist, self.obs_out, self.obs_dist)
        return RSSMParams(*cast_layers(layers, self.dtype))

    def initial(self, batch_size: int) -> State:
        """The state of zeros, ``[B, ...]``."""
        return ops.initial_state(self.params(), self.latent, batch_size)

    def observe(
        self,
        embed: Tensor,
        is_first: Tensor,
        action: Tensor | None = None,
        state: State | None = None,
        *,
        sample: bool = True,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> tuple[State, State]:
        """Filter ``embed [B, T, E]``: ``(post, prior)``, see :func:`apv_fast.ops.rssm_observe`."""
        return ops.rssm_observe(
            self.params(),
            embed,
            is_first,
            self._action(action),
            state,
            latent=self.latent,
            sample=sample,
            noise=noise,
            generator=generator,
            backend=self.backend,
        )

    def imagine(
        self,
        state: State,
        action: Tensor | None = None,
        horizon: int | None = None,
        *,
        sample: bool = True,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> State:
        """Roll the prior out from ``state`` along ``action [B, T, A]``, see :func:`apv_fast.ops.rssm_imagine`."""
        if action is not None and horizon is None and action.dim() == 3:
            horizon = action.shape[1]
        return ops.rssm_imagine(
            self.params(),
            state,
            self._action(action),
            horizon,
            latent=self.latent,
            sample=sample,
            noise=noise,
            generator=generator,
            backend=self.backend,
        )

    def obs_step(
        self,
        state: State,
        action: Tensor | None,
        embed: Tensor,
        is_first: Tensor,
        *,
        sample: bool = True,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> tuple[State, State]:
        """One step with an observation ``embed [B, E]``: ``(post, prior)``."""
        return ops.rssm_step(
            self.params(),
            state,
            self._action(action),
            embed,
            is_first,
            latent=self.latent,
            sample=sample,
            noise=noise,
            generator=generator,
            backend=self.backend,
        )

    def img_step(
        self,
        state: State,
        action: Tensor | None,
        *,
        sample: bool = True,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> State:
        """One step without looking: the prior."""
        _, prior = ops.rssm_step(
            self.params(),
            state,
            self._action(action),
            latent=self.latent,
            sample=sample,
            noise=noise,
            generator=generator,
            backend=self.backend,
        )
        return prior

    def feat(self, state: State) -> Tensor:
        """What heads read: ``concat(flatten(stoch), deter)``, ``[..., S*C + D]``."""
        return feat(state)

    get_feat = feat  # DreamerV2's name

    def kl_loss(
        self,
        post: State,
        prior: State,
        *,
        balance: float = 0.8,
        free: float = 0.0,
        free_avg: bool = True,
        forward: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``(loss, value [B, T])``, see :func:`apv_fast.ops.kl_balance`."""
        statistics = [state[name] for state in (post, prior) for name in self.latent.statistics]
        op = ops.kl_balance if self.latent.discrete else ops.kl_balance_normal
        result = op(*statistics, balance=balance, free=free, free_avg=free_avg, forward=forward, backend=self.backend)
        return result

    def _action(self, action: Tensor | None) -> Tensor | None:
        """The action, or None for an action-free model."""
        if self.action_dim == 0:
            return None
        if action is None:
            raise ValueError(f"RSSM: action is None; this model was made with action_dim = {self.action_dim}")
        if action.shape[-1] != self.action_dim:
            raise ValueError(f"RSSM: action has shape {tuple(action.shape)}; its last size must be {self.action_dim}")
        return action


class StackedRSSM(Savable):
    """An action-free RSSM and an action-conditional one that sees the features of its posterior.

    Args:
        action_free: sees the observations' embedding.
        action_conditional: sees the features, with ``concat_embed`` the embedding and then the features.
        concat_embed: see above.

    Raises:
        ValueError: ``action_free`` takes actions, ``action_conditional`` takes none or another embedding.
    """

    def __init__(self, action_free: RSSM, action_conditional: RSSM, *, concat_embed: bool = False) -> None:
        super().__init__()
        if action_free.action_dim != 0:
            raise ValueError(f"StackedRSSM: action_free has action_dim {action_free.action_dim}; it must be 0")
        if action_conditional.action_dim == 0:
            raise ValueError("StackedRSSM: action_conditional has action_dim 0; it must be at least 1")
        width = action_free.feat_dim + concat_embed * action_free.embed_dim
        if action_conditional.embed_dim != width:
            raise ValueError(
                f"StackedRSSM: action_conditional has embed_dim {action_conditional.embed_dim}; it must be {width}, "
                "the width of the action-free features" + (" and the embedding" if concat_embed else "")
            )
        self.action_free, self.action_conditional = action_free, action_conditional
        self.concat_embed = concat_embed

    def observe(
        self,
        embed: Tensor,
        is_first: Tensor,
        action: Tensor,
        af_state: State | None = None,
        state: State | None = None,
        *,
        sample: bool = True,
        af_noise: Noise = None,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, State]:
        """Filter with both: "af_post", "af_prior", "post", "prior"; see :func:`apv_fast.ops.stacked_observe`."""
        checked = self.action_conditional._action(action)
        assert checked is not None  # the constructor sees to it
        return ops.stacked_observe(
            self.action_free.params(),
            self.action_conditional.params(),
            embed,
            is_first,
            checked,
            af_state,
            state,
            af_latent=self.action_free.latent,
            latent=self.action_conditional.latent,
            concat_embed=self.concat_embed,
            sample=sample,
            af_noise=af_noise,
            noise=noise,
            generator=generator,
            backend=self.action_conditional.backend,
        )

    def obs_step(
        self,
        af_state: State,
        state: State,
        action: Tensor,
        embed: Tensor,
        is_first: Tensor,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[State, State]:
        """One filtering step for acting: the posteriors of both, ``[B, ...]``."""
        af_post, _ = self.action_free.obs_step(af_state, None, embed, is_first, sample=sample, generator=generator)
        upper = self.upper_embed(embed, af_post)
        post, _ = self.action_conditional.obs_step(state, action, upper, is_first, sample=sample, generator=generator)
        return af_post, post

    def upper_embed(self, embed: Tensor, af_post: State) -> Tensor:
        """What the action-conditional model sees, ``[..., E']``."""
        features = feat(af_post)
        return torch.cat([embed.to(features.dtype), features], -1) if self.concat_embed else features
