"""Curves of whole experiments: the numbers, the picture, the published ones beside them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apv_fast.cli import main
from apv_fast.experiments.setups import make_plan
from apv_fast.run import Metrics, curves
from apv_fast.run.curves import common_steps, published_curves, published_source, summarize
from apv_fast.run.plot import COLORS, MARKERS, _style

pytest.importorskip("rliable")


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bootstrap in no time."""
    monkeypatch.setattr(curves, "REPETITIONS", 30)


def test_the_mean_is_rliables_interquartile_mean_and_the_interval_is_around_it() -> None:
    from rliable.metrics import aggregate_iqm

    scores = np.random.default_rng(0).normal(size=(8, 3, 4)) ** 3
    curve = summarize(np.arange(4.0), scores)
    np.testing.assert_allclose(curve.iqm, [aggregate_iqm(scores[..., index]) for index in range(4)], rtol=1e-12)
    assert np.all(curve.low < curve.iqm) and np.all(curve.iqm < curve.high)
    np.random.seed(5)
    before = str(np.random.get_state())
    same = summarize(np.arange(4.0), scores)
    assert str(np.random.get_state()) == before, "others' random numbers are left alone"
    np.testing.assert_array_equal(same.low, curve.low)
    # 8 seeds of one task: the two best and the two worst do not count.
    column = np.array([5.0, 100, 1, 2, -100, 4, 3, 50])[:, None, None]
    assert summarize(np.zeros(1), column).iqm[0] == np.mean([5, 2, 4, 3])
    one = summarize(np.zeros(1), column[:1])
    assert one.low[0] == one.iqm[0] == one.high[0] == 5


@pytest.mark.usefixtures("_few")
def test_the_published_final_scores_are_those_of_the_paper() -> None:
    def final(method: str, *tasks: str) -> float:
        scores = np.stack([published_curves(task)[method][1] for task in tasks], axis=1)
        return float(summarize(np.zeros(scores.shape[-1]), scores).iqm[-1])

    dmc = ("dmc_quadruped_walk", "dmc_quadruped_run", "dmc_hopper_hop")
    assert final("DreamerV2", *dmc) == pytest.approx(701, abs=1)
    assert final("APV (Locomotion)", *dmc) == pytest.approx(797, abs=1)
    assert final("APV (Manipulation)", *dmc) == pytest.approx(782, abs=1)
    names = ("lever_pull", "drawer_open", "door_lock", "button_press_topdown_wall", "reach", "dial_turn")
    metaworld = [f"metaworld_{name}" for name in names]
    assert final("DreamerV2", *metaworld) == pytest.approx(0.679, abs=1e-3)
    assert final("APV", *metaworld) == pytest.approx(0.954, abs=1e-3)
    assert "younggyoseo/apv" in published_source()


def test_seeds_are_compared_where_all_of_them_were_evaluated() -> None:
    long = np.array([10.0, 20, 30, 40]), np.array([1.0, 2, 3, 4])
    short = np.array([20.0, 40]), np.array([5.0, 6])
    steps, scores = common_steps([long, short])
    np.testing.assert_array_equal(steps, [20, 40])
    np.testing.assert_array_equal(scores, [[2, 4], [5, 6]])


TASKS = ("quadruped-walk", "hopper-hop")


def _experiment(out: Path) -> None:
    """Two arms, three seeds, two tasks; the score is 100 × seed + evaluation, DreamerV2's half of it."""
    plan = make_plan("locomotion-in-domain", "paper", out, tasks=TASKS, arms=("apv", "dreamerv2"), seeds=(1, 2, 3))
    out.mkdir()
    plan.save()
    for curve, run in plan.runs():
        run.mkdir(parents=True)
        with Metrics(run, tensorboard=False) as metrics:
            for index in range(4):
                score = (100 * curve.seed + index) / (1 if curve.arm == "apv" else 2)
                metrics.scalars(index, {"eval_return": score, "env_step": 20_000 * index, "other": -score})


@pytest.mark.usefixtures("_few")
def test_an_experiment_becomes_a_picture_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _experiment(tmp_path / "x")
    png = tmp_path / "pictures" / "x.png"
    assert main(["plot", str(tmp_path / "x"), "--out", str(png)]) == 0
    printed = capsys.readouterr()
    assert re.search(
        r"^dmc:hopper-hop apv: 203 \[\d.*, \d.*\] after 60000 environment steps, seeds: 3$", printed.out, re.M
    )
    assert printed.err == ""
    numbers = json.loads(png.with_suffix(".json").read_text())
    assert (numbers["experiment"], numbers["size"], numbers["metric"]) == (
        "locomotion-in-domain",
        "paper",
        "eval_return",
    )
    assert set(numbers["tasks"]) == {"dmc:quadruped-walk", "dmc:hopper-hop", "all tasks"}
    apv = numbers["tasks"]["dmc:hopper-hop"]["apv"]
    assert apv["steps"] == [0, 20_000, 40_000, 60_000]
    assert apv["iqm"] == [200, 201, 202, 203], "the mean: of three nothing is trimmed"
    assert apv["scores"] == [[[100 * seed + index for index in range(4)]] for seed in (1, 2, 3)]
    together = numbers["tasks"]["all tasks"]["dreamerv2"]
    assert np.shape(together["scores"]) == (3, 2, 4) and together["iqm"][0] == 100
    with Image.open(png) as picture:
        assert picture.format == "PNG" and picture.size[0] > 2000, "three panels"
        ink = {color for _, color in picture.convert("RGB").getcolors(2**24) or ()}
    for color in COLORS[:3]:  # apv, dreamerv2 and the published APV (Manipulation), which is ours of another arm
        assert (tuple(bytes.fromhex(color[1:])) in ink) == (color != COLORS[2])


@pytest.mark.usefixtures("_few")
def test_unfinished_runs_and_other_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _experiment(tmp_path / "x")
    runs = tmp_path / "x" / "finetune"
    for task in TASKS:
        (runs / task / "dreamerv2" / "seed-3" / "metrics.jsonl").unlink()
    behind = runs / "hopper-hop" / "apv" / "seed-2" / "metrics.jsonl"
    behind.write_text("".join(line + "\n" for line in behind.read_text().splitlines()[:2]))
    arguments = ["plot", str(tmp_path / "x"), "--out", str(tmp_path / "x.png"), "--metric", "other"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "dmc:hopper-hop dreamerv2: -76.5 " in printed.out and "seeds: 2" in printed.out
    assert "left out: " in printed.err and "dreamerv2/seed-3/metrics.jsonl does not exist" in printed.err
    assert "apv: seed 2 is behind, the curve ends where it does" in printed.err
    assert len(json.loads((tmp_path / "x.json").read_text())["tasks"]["dmc:hopper-hop"]["apv"]["steps"]) == 2
    assert main(["plot", str(tmp_path / "x"), "--metric", "none", "--out", str(tmp_path / "y.png")]) == 1
    assert "no run has a 'none' yet" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "x"), str(runs)]) == 1
    assert "plot each experiment by itself" in capsys.readouterr().err


def test_styles_tell_arms_apart_without_colours_and_published_from_ours() -> None:
    names = ["apv", "dreamerv2", "no-bonus", "paper: DreamerV2", "paper: APV (Locomotion)", "paper: Other"]
    styles = [_style(name, names) for name in names]
    assert [style["marker"] for style in styles] == [*MARKERS[:3], "", "", ""]
    assert all((style["linestyle"] == "-") == (index < 3) for index, style in enumerate(styles))
    assert len({style["linestyle"] for style in styles[3:]}) == 3
    assert [style["color"] for style in styles] == [*COLORS[:3], COLORS[1], COLORS[0], COLORS[5]]


def test_without_rliable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _experiment(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "rliable.library", None)
    assert main(["plot", str(tmp_path / "x"), "--out", str(tmp_path / "x.png")]) == 1
    assert "interquartile means over seeds need rliable: pip install 'apv-fast[plots]'" in capsys.readouterr().err
    run = tmp_path / "x" / "finetune" / "hopper-hop" / "apv" / "seed-1"
    assert main(["plot", str(run), "--out", str(tmp_path / "run.png")]) == 0, "curves of single runs do without"
