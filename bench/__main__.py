"""``python -m bench``: time every case, contestants interleaved; tables, and with ``--json`` a file and plots."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from apv_fast.cpu.memory import keep_freed_memory
from bench import breakdown, ceilings, report
from bench.measure import measure
from bench.registry import Case, select

UPDATES = ("pretrain_update", "finetune_update")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time ops and updates against the reference.")
    add = parser.add_argument
    add("--only", default="", metavar="PATTERN", help="only cases whose name contains this; * matches all")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write rows and the parts of updates here, a .txt and plots beside it",
    )
    add("--slow", action="store_true", help="also what takes minutes: the paper's batch, compiled scans")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--threads", type=int, help="CPU threads for all contestants; default: torch's")
    add("--seconds", type=float, default=0.5, help="time for the rounds of a pass of a case")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every case ran, 1 if one failed, 2 if nothing matches, 130 if interrupted."""
    options = parse(arguments)
    console = Console()
    cases = select(options.only, slow=options.slow)
    if not cases:
        console.print(f"no case matches {options.only!r}; --list prints their names, --slow adds more", style="red")
        return 2
    if options.list:
        for case in cases:
            print(case.name)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(kind)
    facts = report.environment(device)
    kept = keep_freed_memory()  # as the commands do; for all contestants alike
    facts["memory"] = "freed memory is kept" if kept else "freed memory is kept or returned as the C library does"
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False, markup=False)
    if os.getloadavg()[0] > 0.5:
        console.print("this machine is busy: medians will be noisy, ratios less so", style="yellow")
    rows, reasons, status = run(cases, device, options, console)
    for reason, ops in reasons.items():
        console.print(f"no row for {reason} ({', '.join(ops)})", highlight=False, markup=False)
    facts["load at the end"] = f"{os.getloadavg()[0]:.2f} (this run itself makes about one a thread)"
    if options.json:
        results = report.Results(facts, rows, *extras(cases, rows, device, console))
        for path in report.write(options.json, results):
            console.print(f"wrote {path}", highlight=False)
    return status


def extras(
    cases: list[Case], rows: list[report.Row], device: torch.device, console: Console
) -> tuple[dict[str, float], list[report.Row]]:
    """What the plots want beside the rows: the ceilings of a CPU, and the parts of the updates among the cases."""
    if device.type != "cpu":
        return {}, []
    contestants: dict[str, list[str]] = {}
    for row in rows:
        contestants.setdefault(report.case_name(row), []).append(row["backend"])
    parts, missing = breakdown.rows([case for case in cases if case.op in UPDATES], contestants)
    for reason in missing:
        console.print(f"no parts of {reason}", highlight=False, markup=False)
    return ceilings.measure(), parts


def run(
    cases: list[Case], device: torch.device, options: argparse.Namespace, console: Console
) -> tuple[list[report.Row], dict[str, list[str]], int]:
    """Rows of all cases, the reasons for missing ones with their ops, the exit status; Ctrl-C keeps what is done."""
    rows: list[report.Row] = []
    reasons: dict[str, list[str]] = {}
    status = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            try:
                case_rows, left_out = measure(case, device, options.seconds, slow=options.slow)
            except KeyboardInterrupt:
                console.print(f"interrupted in {case.name}; rows before it are kept", style="yellow")
                return rows, reasons, 130
            except Exception as error:  # one broken case must not cost the others' minutes
                console.print(f"{case.name} failed: {type(error).__name__}: {error}", style="red", markup=False)
                status = 1
                continue
            rows += case_rows
            console.print(f"[bold]{case.name}[/bold]", report.table(case_rows), "", sep="\n", highlight=False)
            for backend, reason in left_out.items():
                ops = reasons.setdefault(f"{backend}: {reason}", [])
                ops += [case.op] if case.op not in ops else []
            progress.advance(task)
    return rows, reasons, status


if __name__ == "__main__":
    sys.exit(main())
