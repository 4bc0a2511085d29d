"""ContextWM (thuml/ContextWM): the one PyTorch port of APV that we know, plain APV without its context model.

An update is the peer's own ``agent.train`` with the state that it carries over from batch to batch. Its files are of
2022 and torch 1.12: packages that an update does not use get stand-ins, and an argument that torch has dropped is put
back. Its half precision is float16 with a loss scale; for bfloat16 its autocast is replaced.

Options: ``queue`` of the bonus, "full" as in all but the first updates of a run, or "empty"; ``preset``.
"""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers import importing
from bench.peers.setup import DISCRETE, STOCH, Peer, PeerError, Setup, trained

DIFFERS = (
    "the peer's own PyTorch, eager: no compilation, no graph",
    "the RSSM's state is carried over from batch to batch",
    "deterministic cuDNN, as its training scripts set it",
)
OURS = "its float16 autocast with a loss scale is replaced by bfloat16 without one"
FILES = {"pretrain_update": "apv_pretraining.yaml", "finetune_update": "apv_finetuning.yaml"}
LOSSES = ("model_loss", "image_loss", "kl_loss", "actor_loss", "critic_loss")
BATCHES = 2  # that take turns


def make(setup: Setup, path: Path) -> Peer:
    """Build the peer's agent; ``path`` is a checkout with ``wmlib/`` and ``configs/``.

    Raises:
        PeerError: it is no such checkout, or an option is unknown.
    """
    setup.only("queue", "preset")
    importing.use(path, "wmlib", "configs")
    _patch(setup)
    wmlib, agents, utils = (importing.module(name) for name in ("wmlib", "wmlib.agents", "wmlib.utils"))
    if setup.device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = setup.dtype == "tf32"
        torch.set_num_threads(1)
    wmlib.ENABLE_FP16 = setup.dtype == "float16"
    torch.manual_seed(setup.seed)
    agent = _agent(setup, path, agents, utils)
    batches = _batches(setup)
    train = wmlib.CarryOverState(agent.train)
    calls = 0

    def update() -> dict[str, object]:
        nonlocal calls
        metrics = train(batches[calls % len(batches)])
        calls += 1
        return {name: metrics[name] for name in LOSSES if name in metrics}

    differs = (*DIFFERS, OURS) if setup.dtype == "bfloat16" else DIFFERS
    return Peer("ContextWM", update, trained(agent.parameters()), differs, importing.commit(path))


class _Subscriptable:
    """``TensorType["batch", "seq"]`` in an annotation."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


def _patch(setup: Setup) -> None:
    """Make the peer importable on a current torch, without touching its files."""
    warnings.filterwarnings("ignore")
    importing.stand_in("torchtyping", TensorType=_Subscriptable, patch_typeguard=lambda: None)
    importing.stand_in("typeguard", typechecked=lambda function: function)
    importing.stand_in("kornia")
    importing.stand_in("torchvision.transforms")

    class Scheduler(torch.optim.lr_scheduler.LRScheduler):
        """With the argument ``verbose``, which is gone."""

        def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int = -1, verbose: bool = False) -> None:
            super().__init__(optimizer, last_epoch)

    torch.optim.lr_scheduler._LRScheduler = Scheduler  # type: ignore[misc, assignment]
    if setup.dtype == "bfloat16":
        kind, amp = setup.device.type, torch.cuda.amp
        amp.autocast = lambda enabled=True: torch.autocast(kind, dtype=torch.bfloat16)  # type: ignore[assignment,misc]


def _agent(setup: Setup, path: Path, agents: Any, utils: Any) -> Any:
    finetune = setup.op == "finetune_update"
    preset = setup.option("preset", ("metaworld", "dmc_vision"))
    configs = importing.load_yaml(path / "configs" / FILES[setup.op])
    config = utils.Config(configs["defaults"]).update(configs[preset if finetune else f"{preset}_pretrain"])
    sizes: dict[str, object] = {"encoder_type": "plaincnn", "decoder_type": "plaincnn"}
    sizes |= {"encoder.cnn_depth": setup.cnn_depth, "decoder.cnn_depth": setup.cnn_depth}
    for rssm in ("rssm", "af_rssm") if finetune else ("rssm",):
        sizes |= {f"{rssm}.deter": setup.deter, f"{rssm}.hidden": setup.hidden}
        sizes |= {f"{rssm}.stoch": STOCH, f"{rssm}.discrete": DISCRETE}
    if finetune:
        sizes["imag_horizon"] = setup.horizon
    config = config.update(sizes)
    observations = {"image": _space(64, 64, 3)}
    observations |= {name: _space() for name in ("reward", "is_first", "is_last", "is_terminal")}
    kind = agents.APV_Finetune if finetune else agents.APV_Pretrain
    agent = kind(config, observations, {"action": _space(setup.actions)}, utils.Counter(0)).to(setup.device)
    agent.init_optimizers()
    if finetune and setup.option("queue", ("full", "empty")) == "full":
        bonus = getattr(agent.wm, "intr_bonus", None)
        if bonus is None:
            raise PeerError("ContextWM: its world model has no intr_bonus; this driver does not know such a version")
        bonus.queue.normal_(std=0.1)
        bonus.tf_queue_step = bonus.tf_queue_size
    return agent


def _space(*shape: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(shape=shape)


def _batches(setup: Setup) -> list[dict[str, Tensor]]:
    """As the peer's loop hands them over: everything in the compute dtype, images 0..255 as ``[B, T, 3, 64, 64]``."""
    generator = torch.Generator().manual_seed(setup.seed)
    shape = (setup.batch, setup.length)
    dtype = torch.float16 if setup.dtype == "float16" else torch.float32
    batches = []
    for _ in range(BATCHES):
        first = torch.zeros(shape)
        first[:, 0] = 1
        actions = setup.actions if setup.op == "finetune_update" else 1
        batch = {
            "image": torch.randint(256, (*shape, 3, 64, 64), generator=generator, dtype=torch.uint8),
            "action": torch.rand(*shape, actions, generator=generator) * 2 - 1,
            "reward": torch.rand(shape, generator=generator),
            "is_first": first,
            "is_last": torch.zeros(shape),
            "is_terminal": torch.zeros(shape),
        }
        batches.append({name: value.to(setup.device, dtype) for name, value in batch.items()})
    return batches
