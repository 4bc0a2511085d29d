"""``python -m bench.peers NAME --path CHECKOUT``: time another project's update; JSON with a row like our own.

``--serve`` is for :mod:`bench.peers.remote`: nothing is timed here, an update is done for every line of the input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from bench import report
from bench.gpu.worker import message
from bench.peers.setup import DTYPES, UPDATES, WARM_UP, Peer, PeerError, Setup
from bench.registry import FORWARD_BACKWARD
from bench.timing import interleaved

NAMES = ("contextwm", "r2dreamer", "torchrl")
SIZES = ("batch", "length", "deter", "hidden", "cnn_depth", "horizon", "actions")
MEGABYTE = 1e6


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Time another project's update.")
    add = parser.add_argument
    add("name", choices=NAMES)
    add("--path", type=Path, required=True, help="a checkout of the peer, or the folder that its wheel is in")
    add("--update", choices=UPDATES, default="finetune_update")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="float32", help="of the products (default: float32)")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(Setup, name), help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--set", action="append", default=[], metavar="OPTION=VALUE", help="the peer's own option; see its module")
    add("--seconds", type=float, default=4.0, help="of timing (default: 4)")
    add("--threads", type=int, help="default: torch's; ContextWM sets 1 on CUDA")
    add("--json", type=Path, metavar="FILE", help="where the JSON goes (default: the output)")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if wrong := [one for one in options.set if "=" not in one]:
        parser.error(f"--set is {wrong[0]!r}; it must be OPTION=VALUE")
    return options


def prepare(options: argparse.Namespace) -> tuple[Setup, Peer, dict[str, Any]]:
    """Build the peer, warm it up, see that it trains.

    Returns:
        Its setup, the peer, and what a row says of it beside its times.

    Raises:
        PeerError: it cannot be timed.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise PeerError("device is cuda; PyTorch finds no GPU here")
    if not options.path.is_dir():
        raise PeerError(f"path is {options.path}; it must be a folder")
    sizes = {name: getattr(options, name) for name in SIZES}
    peer_options = dict(one.split("=", 1) for one in options.set)
    setup = Setup(
        options.update, **sizes, dtype=options.dtype, device=torch.device(options.device), seed=options.seed,
        options=peer_options,
    )  # fmt: skip
    if options.threads:
        torch.set_num_threads(options.threads)
    peer: Peer = importlib.import_module(f"bench.peers.{options.name}").make(setup, options.path)
    losses = peer.warm_up(WARM_UP[options.device])
    facts: dict[str, Any] = {"version": peer.version, "parameters": peer.parameters, "differs": list(peer.differs)}
    return setup, peer, facts | {"losses": losses, "peak_mb": peak(peer, setup.device)}


def peak(peer: Peer, device: torch.device) -> float | None:
    """Megabytes that the process reserves on a GPU for an update, its state included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    peer.update()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_reserved() / MEGABYTE, 1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The machine and one row."""
    setup, peer, facts = prepare(options)
    times = interleaved({peer.name: peer.update}, setup.device, options.seconds)[peer.name]
    row: report.Row = {"op": setup.op, "backend": peer.name, "device": setup.device.type, "dtype": setup.dtype}
    row |= {"shape": setup.shape, "pass": FORWARD_BACKWARD} | report.summarize(times, None) | facts
    return {"machine": report.environment(setup.device), "rows": [row]}


def serve(options: argparse.Namespace, output: TextIO) -> None:
    """Say that the peer is ready; then do an update for every line, and say when the device has done it."""

    def answer(**event: Any) -> None:
        print(json.dumps(event), file=output, flush=True)

    try:
        setup, peer, facts = prepare(options)
        answer(event="ready", facts=facts)
        for _ in sys.stdin:
            peer.update()
            if setup.device.type == "cuda":
                torch.cuda.synchronize()
            answer(event="done")
    except Exception as error:  # whatever a peer raises is the reason why it has no row
        answer(event="failed", error=str(error) if isinstance(error, PeerError) else message(error))
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if the peer cannot be timed."""
    options = parse(arguments)
    output = os.fdopen(os.dup(1), "w")
    sys.stdout.flush()
    os.dup2(2, 1)  # what peers print is not for whoever reads the JSON
    try:
        if options.serve:
            serve(options, output)
            return 0
        text = json.dumps(measure(options), indent=1)
    except PeerError as error:
        print(f"{options.name}: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text, file=output, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
