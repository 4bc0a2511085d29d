"""``python -m tests.support.fake_gpu [NAME ...]``: launch all as if on an H100; a line a case, 1 if one raises."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from apv_fast.backend import use_backend
from tests.support import fake_gpu
from tests.support.rssm_cases import CASES, SIZES, make_case


def pretend(names: tuple[str, ...] = ("triton",), auto: tuple[str, ...] = ("triton",)) -> None:
    """``names`` take the tensors in the CPU's memory for a GPU's, "auto" takes ``auto``, the scan is cooperative."""
    from apv_fast.kernels.parts import grid

    from apv_fast import backend

    real_probe = backend.probe

    def probe(name: str) -> backend.Status:
        status = real_probe(name)
        return dataclasses.replace(status, devices=("cpu", "cuda")) if name in names else status

    backend.probe = probe  # type: ignore[assignment]
    backend.AUTO_ORDER["cpu"] = (*auto, "reference")
    grid._obstacle = lambda device: ""


def scan(case: str, dtype: torch.dtype, *, size: str = "odd", sample: bool = True, seed: bool = False) -> None:
    """Values and gradients of one of the RSSM's ops."""
    sizes = SIZES[size]
    tensors = make_case(case, sizes, dtype)
    if seed:
        noises = [name for name in tensors if "noise" in name]
        tensors |= {name: torch.tensor(number) for number, name in enumerate(noises)}
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if x.is_floating_point() and "noise" not in n}
    outputs = CASES[case][1](tensors | leaves, sizes, "triton", sample)
    total: Tensor = sum((x.float().sum() for x in outputs.values()), torch.zeros(()))
    total.backward()


def updates(precision: str, backend: str = "auto") -> None:
    """A pre-training and a fine-tuning update, everything on the engines that are asked for, by name or by "auto"."""
    with use_backend(backend):
        _updates(precision)


def _updates(precision: str) -> None:
    from apv_fast.agent import Agent, Pretrainer
    from apv_fast.config import PRESETS, ModelConfig

    model = ModelConfig(deter=16, hidden=16, stoch=4, discrete=4, cnn_depth=2, precision=precision)  # type: ignore[arg-type]
    device = torch.device("cpu")
    batch: dict[str, Tensor] = {
        "image": torch.randint(256, (2, 6, 64, 64, 3), dtype=torch.uint8),
        "is_first": torch.zeros(2, 6, dtype=torch.bool),
    }
    trainer = Pretrainer(replace(PRESETS["metaworld"].pretrain, batch=2, length=6, model=model), device)
    trainer.update(batch)
    batch |= {"action": torch.zeros(2, 6, 4), "reward": torch.zeros(2, 6)}
    batch["is_terminal"] = batch["is_first"]
    config = replace(PRESETS["metaworld"].finetune, batch=2, length=6, model=model)
    agent = Agent(config, 4, discrete=False, device=device)
    agent.update(batch)


CASES_BY_NAME: dict[str, Callable[[], None]] = {
    "observe": lambda: scan("observe", torch.bfloat16, seed=True),
    "observe gaussian": lambda: scan("observe", torch.float32, size="gaussian", sample=False),
    "observe phases": lambda: scan("observe", torch.float32),
    "stacked": lambda: scan("stacked", torch.bfloat16, seed=True),
    "imagine": lambda: scan("imagine", torch.bfloat16, seed=True),
    "step": lambda: scan("step", torch.float32),
    "updates": lambda: updates("bf16"),
    "updates cuda": lambda: updates("bf16", "cuda"),
}


def main(names: list[str]) -> int:
    """Run the named cases, or all."""
    folder = Path(tempfile.mkdtemp())
    library = fake_gpu.install(folder)
    names = names or list(CASES_BY_NAME)
    emulated = fake_gpu.emulate_cuda(folder) if any(name.endswith("cuda") for name in names) else []
    pretend(("triton", "cuda"), auto=("triton",))
    failed = 0
    for name in names:
        os.environ["APV_FAST_SCAN"] = "phases" if name.endswith("phases") else "persistent"
        before, start = (library.fake_launches(), library.fake_cooperative()), time.perf_counter()
        emulated.clear()
        try:
            CASES_BY_NAME[name]()
            verdict = "ok"
        except Exception:
            traceback.print_exc()
            verdict, failed = "FAILED", 1
        launches, cooperative = library.fake_launches() - before[0], library.fake_cooperative() - before[1]
        seconds = time.perf_counter() - start
        counts = f"{launches} launches, {cooperative} cooperative"
        if name.endswith("cuda"):
            counts += "".join(f", {emulated.count(way)} {way} in CUDA C++" for way in ("forward", "backward"))
        print(f"{verdict:6} {name}: {counts}, {seconds:.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
