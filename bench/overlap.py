"""``python -m bench.overlap``: what updates beside the environments gain, by runs with and without in turn.

Real fine-tuning at preset ``small``; steps of all environments a second, after the first updates. The machine should
be quiet: environments, acting and updates share its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from apv_fast.config import PRESETS, FinetuneConfig, WorldConfig
from bench.gpu.train import rehearse

CASES = {
    "metaworld, paper's look": ("metaworld:drawer-open", WorldConfig(time_limit=50, camera="corner")),
    "walker, fast look": ("dmc:walker-walk", WorldConfig(action_repeat=2, time_limit=100, quality="fast")),
}


def configuration(case: str, envs: int, overlap: bool) -> FinetuneConfig:
    """Short episodes, so that training begins soon; the sizes of a preset."""
    env, world = CASES[case]
    small = replace(PRESETS["small"].finetune, env=env, world=world, envs=envs, overlap=overlap)
    return replace(small, prefill=50 * envs, first_updates=3, device="cpu")


def machine() -> str:
    """The processor's name, threads in use and the load before."""
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    (model,) = [line.partition(":")[2].strip() for line in listed.splitlines() if line.startswith("Model name")]
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) of torch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and perhaps write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of runs with and without (default: 3)")
    parser.add_argument("--seconds", type=float, default=40.0, help="a run, its start included (default: 40)")
    parser.add_argument("--envs", type=int, default=2, help="environments (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes too")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "command": " ".join(["python -m bench.overlap", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": machine(),
        "load_before": round(os.getloadavg()[0], 1),
        "envs": options.envs,
        "cases": {},
    }
    for case in CASES:
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.rounds):
            for overlap, values in rates.items():
                one = rehearse(configuration(case, options.envs, overlap), options.seconds, lambda figures: None)
                values.append(one.get("env_steps_per_s", float("nan")))
        ratios = [after / before for before, after in zip(rates[False], rates[True], strict=True)]
        report["cases"][case] = {
            "env_steps_per_s": rates[False],
            "env_steps_per_s_overlap": rates[True],
            "gain_of_each_round": [round(ratio, 3) for ratio in ratios],
            "median_gain": round(statistics.median(ratios), 3),
        }
        print(f"{case}: {report['cases'][case]}", flush=True)
    report["load_after"] = round(os.getloadavg()[0], 1)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
