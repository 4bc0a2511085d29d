"""Learners whose updates are graphs: CUDA's on a GPU, recorded operations elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apv_fast.agent import Agent, Pretrainer
from apv_fast.agent.cuda_graph import CudaRecorder, GraphedUpdate, Recorder
from tests.support.learners import CPU, FINETUNE, PRETRAIN, VARIANTS, make_batch
from tests.support.recording_graph import RecordingGraph

GPU = torch.cuda.is_available()

DEVICE = torch.device("cuda") if GPU else CPU

KINDS: dict[str, Any] = {
    "video": PRETRAIN,
    **VARIANTS,
    "discrete": FINETUNE,
    # The video model's rate is switched on before the update of index 5, so between two replays.
    "frozen": replace(FINETUNE, pretrained=Path("x"), freeze_updates=5),
    "self": replace(FINETUNE, video_bonus=replace(FINETUNE.video_bonus, exclude_self=True, reduce="kth")),
}


def learner(kind: str, device: torch.device = DEVICE, *, graph: str = "off", backend: str | None = None) -> Any:
    torch.manual_seed(0)
    backend = backend or ("auto" if GPU else "reference")  # the kernels for the CPU may read their arguments' values
    config: Any = replace(KINDS[kind], graph=graph, backend=backend)
    if kind == "video":
        return Pretrainer(config, device)
    return Agent(config, 2, discrete=kind == "discrete", device=device)


def recorded(one: Any, recorder: Recorder | None = None, mode: Any = "on") -> Any:
    """The learner with its updates as a graph."""
    recorder = recorder or (CudaRecorder(DEVICE) if GPU else RecordingGraph(one.tensors))
    one.run = GraphedUpdate(one.learn, one.tensors, DEVICE, mode, recorder, ready=one.run._ready)
    return one


def train(one: Any, seeds: range, **shape: int) -> list[dict[str, Tensor]]:
    """The metrics of updates from seeded batches."""
    return [{name: value.clone() for name, value in one.update(make_batch(seed, **shape)).items()} for seed in seeds]
