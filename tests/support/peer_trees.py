"""Miniature checkouts of the peers: just enough of each for its driver, with a learner of a few weights."""

from __future__ import annotations

from pathlib import Path

WMLIB = """
ENABLE_FP16 = True

class CarryOverState:
    def __init__(self, fn):
        self.fn, self.state = fn, None
    def __call__(self, *arguments):
        self.state, out = self.fn(*arguments, self.state)
        return out
"""
UTILS = """
class Counter:
    def __init__(self, start):
        self.value = start

class Config(dict):
    def update(self, values):
        unknown = set(values) - set(self)
        assert not unknown, unknown
        return Config({**self, **values})
"""
AGENTS = """
import os
import kornia, torchtyping
import torch
import torchvision.transforms
from torch.optim.lr_scheduler import _LRScheduler

assert torchtyping.TensorType["batch"] is torchtyping.TensorType
FAULT = {fault!r}

class Learner(torch.nn.Module):
    def __init__(self, config, observations, actions, counter):
        super().__init__()
        assert observations["image"].shape == (64, 64, 3)
        print("peers print")  # which must not get into the JSON
        self.config, self.actions = config, actions["action"].shape[0]
        self.wm = torch.nn.Module()
        self.wm.intr_bonus = torch.nn.Module()
        self.wm.intr_bonus.queue, self.wm.intr_bonus.tf_queue_size = torch.zeros(4, 2), 4
        self.weight = torch.nn.Parameter(torch.ones(config["rssm.deter"]))
        self.steps = 0
    def init_optimizers(self):
        class Warmup(_LRScheduler):
            def get_lr(self):
                return [0.1]
        self.optimizer = torch.optim.SGD(self.parameters(), 0.1)
        Warmup(self.optimizer, verbose=False)
    def train(self, data=True, state=None):
        if isinstance(data, bool):
            return super().train(data)
        self.steps += 1
        assert (state is None) == (self.steps == 1), "the state is carried over"
        batch, length = data["reward"].shape
        assert data["image"].shape == (batch, length, 3, 64, 64) and data["action"].shape[2] == self.width()
        assert data["is_first"][:, 0].all() and data["image"].dtype == torch.float32
        loss = (self.weight * data["reward"].mean()).square().sum() * (float("nan") if FAULT == "nan" else 1)
        self.optimizer.zero_grad()
        loss.backward()
        if FAULT != "idle":
            self.optimizer.step()
        if FAULT == "dies" and self.steps > 2:
            os._exit(3)
        return self.steps, {"model_loss": loss.detach(), "other": 1.0}

class APV_Pretrain(Learner):
    def width(self):
        return 1

class APV_Finetune(Learner):
    def width(self):
        assert self.wm.intr_bonus.queue.std() > 0 and self.wm.intr_bonus.tf_queue_step == 4
        assert self.config["imag_horizon"] == 3
        return self.actions
"""
KEYS = ["encoder_type", "decoder_type", "encoder.cnn_depth", "decoder.cnn_depth", "imag_horizon"]
KEYS += [f"{rssm}.{size}" for rssm in ("rssm", "af_rssm") for size in ("deter", "hidden", "stoch", "discrete")]

DREAMER = """
import torch
from tensordict import TensorDict
from torch import autocast
from torch.amp import GradScaler

class Rssm:
    def initial(self, batch):
        return torch.zeros(batch, 4), torch.zeros(batch, 8)

class Dreamer(torch.nn.Module):
    def __init__(self, config, observations, actions):
        super().__init__()
        assert observations.spaces["image"].shape == (64, 64, 3) and actions.shape == (4,)
        assert config.rssm.deter == config.deter == 8 and config.lr == 1e-4 and config.compile is False
        self.rssm, self.weight, self.scaler = Rssm(), torch.nn.Parameter(torch.ones(3)), GradScaler()
        self._named_params = dict(self.named_parameters())
        assert not self.scaler.is_enabled()
    def update(self, replay):
        data, index, (stoch, deter) = replay.sample()
        assert data["image"].shape[2:] == (64, 64, 3) and data["is_first"].dtype == torch.bool
        with autocast("cpu", torch.float16):
            assert (self.weight @ self.weight).dtype == torch.float32
        loss = self.weight.square().sum() * data["reward"].mean()
        (gradient,) = torch.autograd.grad(loss, self.weight)
        with torch.no_grad():
            self.weight -= 0.1 * gradient
        replay.update(index, stoch, deter)
        return {"loss/image": loss.detach(), "opt/lr": 1.0}
"""


def contextwm(folder: Path, fault: str = "") -> Path:
    """``fault``: "idle" trains nothing, "nan" has no finite loss, "dies" ends the process at its third update."""
    package = folder / "wmlib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(WMLIB)
    (package / "utils.py").write_text(UTILS)
    (package / "agents.py").write_text(AGENTS.replace("{fault!r}", repr(fault)))
    configs = folder / "configs"
    configs.mkdir()
    defaults = "defaults:\n" + "".join(f"  {key}: 1\n" for key in KEYS)
    (configs / "apv_pretraining.yaml").write_text(defaults + "metaworld_pretrain: {}\n")
    (configs / "apv_finetuning.yaml").write_text(defaults + "metaworld: {}\n")
    return folder


def r2dreamer(folder: Path) -> Path:
    (folder / "configs" / "model").mkdir(parents=True)
    (folder / "configs" / "env").mkdir()
    (folder / "dreamer.py").write_text(DREAMER)
    base = "lr: 1e-4\nrssm:\n  deter: ${model.deter}\n"
    (folder / "configs" / "model" / "_base_.yaml").write_text(base)
    (folder / "configs" / "model" / "size25M.yaml").write_text("defaults: [_base_]\ndeter: 99\n")
    (folder / "configs" / "env" / "dmc_vision.yaml").write_text("encoder: {}\n")
    return folder


def torchrl(folder: Path, version: str) -> Path:
    """A package of this version without anything in it."""
    package = folder / "torchrl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (folder / "tensordict.py").write_text("")
    return folder
