"""r2dreamer (NM512/r2dreamer): DreamerV3 in PyTorch, world model and behaviour in one compiled pass.

An update is the peer's own ``agent.update`` with a replay that hands over batches which are on the device already.
tensordict is used where it is installed and stood in for by a small class where not; TensorBoard likewise.

Options: ``rep_loss``, "dreamer" decodes images as APV does, "r2dreamer" is the peer's faster loss without a decoder,
"infonce"; ``compile``, "auto" is the peer's own choice (on a GPU torch.compile with CUDA graphs, minutes to compile),
"on", "off"; ``size`` and ``env``, names of files in its configs.
"""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers import importing
from bench.peers.setup import Peer, PeerError, Setup, trained

DIFFERS = (
    "DreamerV3: block-wise GRU, RMS norms, two-hot heads, a critic on replayed states too, its own optimiser (LaProp)",
    "one RSSM, not two; no video bonus",
    "encoder and decoder of DreamerV3, whose first layer has cnn_depth channels times its multiplier",
)
BATCHES = 2  # that take turns


def make(setup: Setup, path: Path) -> Peer:
    """Build the peer's agent; ``path`` is a checkout with ``dreamer.py`` and ``configs/``.

    Raises:
        PeerError: it is no such checkout, an option is unknown, or pre-training was asked for, which it has not.
    """
    setup.only("rep_loss", "compile", "size", "env")
    if setup.op != "finetune_update":
        raise PeerError("r2dreamer has no pre-training on videos; --update finetune_update")
    importing.use(path, "dreamer.py", "configs")
    warnings.filterwarnings("ignore")
    importing.stand_in("tensordict", TensorDict=Batch)
    importing.stand_in("torch.utils.tensorboard", SummaryWriter=object)
    torch.set_float32_matmul_precision("highest" if setup.dtype == "float32" else "high")  # "high" is its train.py's
    torch.manual_seed(setup.seed)
    dreamer, tensordict = importing.module("dreamer"), importing.module("tensordict")
    _set_precision(dreamer, setup)
    config = _config(setup, path)
    spaces = {"image": _space(64, 64, 3)}
    spaces |= {name: _space(1) for name in ("is_first", "is_last", "is_terminal", "reward")}
    observations = types.SimpleNamespace(spaces=spaces)
    agent = dreamer.Dreamer(config, observations, _space(setup.actions)).to(setup.device)
    replay = Replay(setup, agent.rssm, tensordict.TensorDict)

    def update() -> dict[str, object]:
        return {name: value for name, value in agent.update(replay).items() if name.startswith("loss/")}

    differs: tuple[str, ...] = (*DIFFERS, f"rep_loss {config.rep_loss}, compile {config.compile}")
    if setup.dtype == "bfloat16":
        differs += ("its float16 autocast with a loss scale is replaced by bfloat16 without one",)
    weights = trained(agent._named_params.values())
    return Peer("r2dreamer", update, weights, differs, importing.commit(path))


class Node(dict[str, Any]):
    """A config node with attributes, in place of OmegaConf's."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


def resolve(value: Any, root: Mapping[str, Any]) -> Any:
    """Replace ``${a.b}`` by what stands at that path."""
    if isinstance(value, dict):
        return Node({key: resolve(inner, root) for key, inner in value.items()})
    if isinstance(value, list):
        return [resolve(inner, root) for inner in value]
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        target: Any = root
        for key in match[1].split("."):
            target = target[key]
        return resolve(target, root)
    return value


def _config(setup: Setup, path: Path) -> Any:
    configs = path / "configs"
    size = importing.load_yaml(configs / "model" / f"{setup.options.get('size', 'size25M')}.yaml")
    size.pop("defaults", None)
    model = {**importing.load_yaml(configs / "model" / "_base_.yaml"), **size}
    model |= {"deter": setup.deter, "hidden": setup.hidden, "depth": setup.cnn_depth, "imag_horizon": setup.horizon}
    compiled = setup.option("compile", ("auto", "on", "off"))
    model["compile"] = compiled == "on" or (compiled == "auto" and setup.device.type == "cuda")
    model["rep_loss"] = setup.option("rep_loss", ("dreamer", "r2dreamer", "infonce"))
    env = importing.load_yaml(configs / "env" / f"{setup.options.get('env', 'dmc_vision')}.yaml")
    return resolve(model, {"model": model, "env": env, "device": str(setup.device)})


def _set_precision(dreamer: Any, setup: Setup) -> None:
    if setup.dtype == "float16":
        return  # as the peer has it
    half, kind = setup.dtype == "bfloat16", setup.device.type
    dreamer.autocast = lambda device_type, dtype: torch.autocast(device_type, dtype=torch.bfloat16, enabled=half)
    dreamer.GradScaler = lambda: torch.amp.GradScaler(kind, enabled=False)


def _space(*shape: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(shape=shape)


class Batch(dict[str, Any]):
    """The few things of a TensorDict that one update uses."""

    def __init__(self, source: Mapping[str, Any], batch_size: tuple[int, ...] = ()) -> None:
        super().__init__(source)
        self.shape = self.batch_size = torch.Size(batch_size)


class Replay:
    """Hands over random batches in the peer's layout and drops the latents that it writes back."""

    def __init__(self, setup: Setup, rssm: Any, tensor_dict: Any) -> None:
        generator = torch.Generator().manual_seed(setup.seed)
        self.shape, self.tensor_dict, self.calls = (setup.batch, setup.length), tensor_dict, 0
        self.items: list[tuple[dict[str, Tensor], Any]] = []
        for _ in range(BATCHES):
            first, last, terminal = (torch.zeros(*self.shape, 1, dtype=torch.bool) for _ in range(3))
            first[:, 0] = True
            data = {
                "image": torch.randint(256, (*self.shape, 64, 64, 3), generator=generator, dtype=torch.uint8),
                "action": torch.rand(*self.shape, setup.actions, generator=generator) * 2 - 1,
                "reward": torch.rand(*self.shape, 1, generator=generator),
                "is_first": first,
                "is_last": last,
                "is_terminal": terminal,
            }
            on_device = {name: value.to(setup.device) for name, value in data.items()}
            self.items.append((on_device, rssm.initial(setup.batch)))

    def sample(self) -> tuple[Any, None, Any]:
        """A batch, no index, the latents before it."""
        data, initial = self.items[self.calls % len(self.items)]
        self.calls += 1
        return self.tensor_dict(dict(data), batch_size=self.shape), None, initial

    def update(self, index: None, stoch: Tensor, deter: Tensor) -> None:
        """Nothing to remember."""
