"""TorchRL's own DreamerV3 learner (0.14.1 or newer), built of its public parts.

An update is ``DreamerV3OptimizationStepper.step``: with ``compile`` "auto", the stepper's own default, forward and
backward are compiled around a scan and captured as one CUDA graph on a GPU and run eagerly on a CPU; its optimiser and
its slow critic follow eagerly, as it has them.

Options: ``compile``, "auto", "on" (compiled on a CPU too, which takes minutes), "off"; ``recurrent``, "block_gru" is
the core of DreamerV3 and has an eighth of a dense GRU's weights, "gru" is dense and runs in float32.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import importing
from bench.peers.setup import DISCRETE, STOCH, Peer, PeerError, Setup, trained

DIFFERS = (
    "DreamerV3: RMS norms, two-hot heads, a critic on replayed states too, its own optimiser (LaProp, eager)",
    "one RSSM, not two; no video bonus",
    "convolutions of width 5 with cnn_depth times 1, 2, 4 and 8 channels; APV's have width 4 to 6",
    "a graph of forward and backward only",
)
CORES = {
    "block_gru": "8 blocks in the GRU: an eighth of the recurrent weights of ours, which favours it",
    "gru": "its dense GRU, which it runs in float32",
}
LEAST = (0, 14, 1)
MULTIPLIERS = (1, 2, 4, 8)  # of cnn_depth, a layer: APV's
KERNEL = 5  # it must be odd; APV's encoder has 4
BINS, UNITS, LAYERS = 255, 400, 4  # heads: the width and depth of our preset's
BATCHES = 2  # that take turns


def make(setup: Setup, path: Path) -> Peer:
    """Build the learner; ``path`` is a folder with the package ``torchrl`` in it, beside it what it needs.

    Raises:
        PeerError: there is none, it is too old, or pre-training was asked for, which it has not.
    """
    setup.only("compile", "recurrent")
    if setup.op != "finetune_update":
        raise PeerError("TorchRL has no pre-training on videos; --update finetune_update")
    if setup.dtype == "float16":
        raise PeerError("dtype is float16; TorchRL's mixed precision is bfloat16")
    importing.use(path, "torchrl")
    warnings.filterwarnings("ignore")
    version = str(importing.module("torchrl").__version__)
    if _numbers(version) < LEAST:
        raise PeerError(f"path is {path}: TorchRL {version}; it must be {'.'.join(map(str, LEAST))} or newer")
    if setup.dtype == "bfloat16" and setup.device.type != "cuda":
        raise PeerError("dtype is bfloat16; TorchRL's learner has it on CUDA only, here --dtype float32")
    torch.set_float32_matmul_precision("high" if setup.dtype == "tf32" else "highest")
    torch.manual_seed(setup.seed)
    parts = _library()
    loss, updater = _losses(parts, setup)
    compiled = {"auto": None, "on": True, "off": False}[setup.option("compile", ("auto", "on", "off"))]
    stepper = parts.DreamerV3OptimizationStepper(
        loss,
        parts.DreamerV3Optimizer(trained(loss.parameters()), warmup_steps=0),
        updater,
        compile_train_step=compiled,
        mixed_precision=setup.dtype == "bfloat16",
    )
    batches = _batches(parts, setup)
    stepper.warmup(batches[0].clone())
    calls = 0

    def update() -> dict[str, object]:
        nonlocal calls
        metrics = stepper.step(None, batches[calls % len(batches)].clone(recurse=False))
        calls += 1
        return {name: value for name, value in metrics.items() if str(name).startswith("loss_")}

    core = CORES[setup.option("recurrent", tuple(CORES))]
    resolved = "compile {}, graph {}".format(*stepper.resolve(setup.device))
    return Peer("TorchRL", update, trained(loss.parameters()), (*DIFFERS, core, resolved), version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _library() -> SimpleNamespace:
    """Everything that is used of TorchRL and tensordict, under its own name."""
    names = {
        "tensordict": ("TensorDict",),
        "tensordict.nn": (
            "ProbabilisticTensorDictModule", "ProbabilisticTensorDictSequential", "TensorDictModule",
            "TensorDictSequential", "NormalParamExtractor",
        ),
        "torchrl.data": ("Bounded", "Composite", "Unbounded"),
        "torchrl.envs.model_based": ("DreamerEnv",),
        "torchrl.modules": (
            "DreamerV3ImageDecoder", "DreamerV3ImageEncoder", "DreamerV3MLP", "RSSMPosteriorV3", "RSSMPriorV3",
            "RSSMRolloutV3", "SymExpTwoHot", "TanhNormal", "WorldModelWrapper",
        ),
        "torchrl.objectives": (
            "DreamerV3ActorLoss", "DreamerV3Loss", "DreamerV3ModelLoss", "DreamerV3ValueLoss", "SoftUpdate",
        ),
        "torchrl.trainers.algorithms": ("DreamerV3OptimizationStepper", "DreamerV3Optimizer"),
    }  # fmt: skip
    parts = {}
    for where, wanted in names.items():
        module = importing.module(where)
        for name in wanted:
            if not hasattr(module, name):
                raise PeerError(f"{where} has no {name}; this driver does not know such a version of TorchRL")
            parts[name] = getattr(module, name)
    return SimpleNamespace(**parts)


class _Networks:
    """The networks of our sizes; those of the world model are shared with imagination."""

    def __init__(self, parts: SimpleNamespace, setup: Setup) -> None:
        self.latent = STOCH * DISCRETE
        width = self.latent + setup.deter
        recurrent = setup.option("recurrent", tuple(CORES))
        rssm = {"num_categoricals": STOCH, "num_classes": DISCRETE, "unimix": 0.01, "hidden_dim": setup.hidden}
        self.prior = parts.RSSMPriorV3(
            action_shape=(setup.actions,), action_dim=setup.actions, rnn_hidden_dim=setup.deter,
            recurrent_model=recurrent, **rssm,
        )  # fmt: skip
        images = {"depth": setup.cnn_depth, "mults": MULTIPLIERS, "kernel_size": KERNEL}
        self.encoder = parts.DreamerV3ImageEncoder(**images)
        self.decoder = parts.DreamerV3ImageDecoder(width, image_shape=(3, 64, 64), **images)
        embed = self.encoder.output_features((3, 64, 64))
        self.posterior = parts.RSSMPosteriorV3(
            rnn_hidden_dim=setup.deter, obs_embed_dim=embed, use_rms_norm=True, **rssm
        )

        def head(outputs: int) -> Any:
            return parts.DreamerV3MLP(width, outputs, depth=LAYERS, num_cells=UNITS)

        self.reward, self.value, self.discount, self.actor = head(BINS), head(BINS), head(1), head(2 * setup.actions)
        self.two_hot = parts.SymExpTwoHot(BINS)


def _losses(parts: SimpleNamespace, setup: Setup) -> tuple[Any, Any]:
    """The whole objective and what moves the slow critic."""
    nets = _Networks(parts, setup)
    sequence, module = parts.TensorDictSequential, parts.TensorDictModule
    env = _imagination(parts, setup, nets)
    actor = parts.ProbabilisticTensorDictSequential(
        module(nets.actor, in_keys=["state", "belief"], out_keys=["params"]),
        module(parts.NormalParamExtractor(), in_keys=["params"], out_keys=["loc", "scale"]),
        parts.ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=parts.TanhNormal, return_log_prob=True
        ),
    ).to(setup.device)
    value = sequence(
        module(nets.value, in_keys=["state", "belief"], out_keys=["state_value_logits"]),
        module(nets.two_hot, in_keys=["state_value_logits"], out_keys=["state_value"]),
    ).to(setup.device)
    goes_on = sequence(
        module(nets.discount, in_keys=["state", "belief"], out_keys=["continue_logits"]),
        module(nn.Sigmoid(), in_keys=["continue_logits"], out_keys=["continuation"]),
    ).to(setup.device)
    model = parts.DreamerV3ModelLoss(
        _world_model(parts, nets).to(setup.device), num_reward_bins=BINS, kl_mode="separate", unimix=0.01,
        lambda_continue=1.0, reco_symlog=False, detach_output=False,
    )  # fmt: skip
    model.set_keys(pixels="pixels")
    actor_loss = parts.DreamerV3ActorLoss(
        actor, value, env, continuation_model=goes_on, imagination_horizon=setup.horizon
    )
    value_loss = parts.DreamerV3ValueLoss(
        value, value_loss="two_hot", num_value_bins=BINS, actor_loss=actor_loss, slow_critic_regularization=1.0
    )
    updater = parts.SoftUpdate(value_loss, tau=0.02)
    return parts.DreamerV3Loss(model, actor_loss, value_loss).to(setup.device), updater


def _world_model(parts: SimpleNamespace, nets: _Networks) -> Any:
    module, features = parts.TensorDictModule, [("next", "state"), ("next", "belief")]
    prior = module(
        nets.prior,
        in_keys=["state", "belief", "action"],
        out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
    )
    posterior = module(
        nets.posterior,
        in_keys=[("next", "belief"), ("next", "encoded_latents")],
        out_keys=[("next", "posterior_logits"), ("next", "state")],
    )
    return parts.TensorDictSequential(
        module(nets.encoder, in_keys=[("next", "pixels")], out_keys=[("next", "encoded_latents")]),
        parts.RSSMRolloutV3(prior, posterior),
        module(nets.decoder, in_keys=features, out_keys=[("next", "reco_pixels")]),
        module(nets.reward, in_keys=features, out_keys=[("next", "reward_logits")]),
        module(nets.two_hot, in_keys=[("next", "reward_logits")], out_keys=[("next", "reward")]),
        module(nets.discount, in_keys=features, out_keys=[("next", "continue_pred")]),
    )


def _imagination(parts: SimpleNamespace, setup: Setup, nets: _Networks) -> Any:
    module = parts.TensorDictModule
    model = parts.WorldModelWrapper(
        module(nets.prior, in_keys=["state", "belief", "action"], out_keys=["_", "state", "belief"]),
        parts.TensorDictSequential(
            module(nets.reward, in_keys=["state", "belief"], out_keys=["reward_logits"]),
            module(nets.two_hot, in_keys=["reward_logits"], out_keys=["reward"]),
        ),
    ).to(setup.device)
    env = parts.DreamerEnv(model, prior_shape=(nets.latent,), belief_shape=(setup.deter,), device=setup.device)
    unbounded = parts.Unbounded
    env.observation_spec = parts.Composite(
        state=unbounded(nets.latent, device=setup.device), belief=unbounded(setup.deter, device=setup.device)
    ).to(setup.device)
    env.state_spec = env.observation_spec.clone()
    env.action_spec = parts.Bounded(-1, 1, (setup.actions,), device=setup.device)
    env.reward_spec = unbounded((1,), device=setup.device)
    return env


def _batches(parts: SimpleNamespace, setup: Setup) -> list[Any]:
    """Random transitions, with the state before each sequence; images as uint8 ``[B, T, 3, 64, 64]``."""
    generator = torch.Generator().manual_seed(setup.seed)
    shape = (setup.batch, setup.length)
    batches = []
    for _ in range(BATCHES):
        first, done, terminated = (torch.zeros(*shape, 1, dtype=torch.bool) for _ in range(3))
        first[:, 0] = True
        following: dict[str, Tensor] = {
            "pixels": torch.randint(256, (*shape, 3, 64, 64), generator=generator, dtype=torch.uint8),
            "reward": torch.rand(*shape, 1, generator=generator),
            "done": done,
            "terminated": terminated,
        }
        batch = {
            "state": torch.zeros(*shape, STOCH * DISCRETE),
            "belief": torch.zeros(*shape, setup.deter),
            "action": torch.rand(*shape, setup.actions, generator=generator) * 2 - 1,
            "is_init": first,
            "next": following,
        }
        batches.append(parts.TensorDict(batch, shape).to(setup.device))
    return batches
