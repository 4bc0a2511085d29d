"""Experiments: their plans hold the paper's numbers, and their smallest size runs from videos to curves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from apv_fast import config as configs
from apv_fast.cli import main, parse
from apv_fast.config import CollectConfig, FinetuneConfig, PretrainConfig
from apv_fast.experiments.plan import Plan, PlanError, Step, load_plan
from apv_fast.experiments.setups import ARMS, EXPERIMENTS, make_plan
from apv_fast.experiments.sizes import Size

OUT = Path("runs/x")


def _plan(name: str, size: Size, out: Path = OUT, seeds: Sequence[int] = ()) -> Plan:
    one = EXPERIMENTS[name]
    scale = one.sizes[size]
    return make_plan(name, size, out, tasks=one.tasks[: scale.targets], arms=one.arms, seeds=seeds or scale.seeds)


def _parsed(plan: Plan, step: Step) -> object:
    command, *arguments = plan.command(step)
    return parse(command, arguments)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, one in EXPERIMENTS.items() for size in one.sizes])
def test_every_command_is_valid_and_waits_for_what_it_reads(name: str, size: Size) -> None:
    plan = _plan(name, size, seeds=(4,))
    written: dict[str, str] = {}  # folder -> the step that makes it
    for step in plan.steps:
        config = _parsed(plan, step)
        read: list[str] = []
        if isinstance(config, PretrainConfig | FinetuneConfig):
            configs.check(config)
            assert config.out == OUT / step.writes
        if isinstance(config, PretrainConfig):
            read = [str(path) for path in config.data]
        if isinstance(config, FinetuneConfig) and config.pretrained:
            read = [str(config.pretrained)]
        if isinstance(config, CollectConfig):
            assert config.out == OUT / step.writes
        if step.name != "plot":
            assert {written[path] for path in read} == set(step.needs)
        assert step.name not in written.values()
        written[str(OUT / step.writes)] = step.name
    assert set(plan.steps[-1].needs) == {step.name for step in plan.steps if step.curve}


@pytest.mark.parametrize("name", ["manipulation", "locomotion-in-domain", "locomotion-from-manipulation"])
def test_the_plans_have_the_papers_numbers(name: str) -> None:
    plan = _plan(name, "paper")
    seeds = Counter((curve.task, curve.arm) for curve, _ in plan.runs())
    assert set(seeds.values()) == {8} and {curve.seed for curve, _ in plan.runs()} == set(range(1, 9))
    parsed = {step.name: _parsed(plan, step) for step in plan.steps if not step.curve or step.curve.seed == 8}
    manipulation = name == "manipulation"
    pretrain = parsed["pretrain"]
    assert isinstance(pretrain, PretrainConfig)
    assert (pretrain.steps, pretrain.batch) == (600_000, 16)
    triped = name == "locomotion-in-domain"
    assert (pretrain.length, pretrain.kl.free, pretrain.kl_scale) == ((50, 1.0, 1.0) if triped else (25, 0.0, 0.1))
    targets = (
        {"lever-pull", "drawer-open", "door-lock", "button-press-topdown-wall", "reach", "dial-turn"}
        if manipulation
        else {"quadruped-walk", "quadruped-run", "hopper-hop"}
    )
    runs = [one for one in parsed.values() if isinstance(one, FinetuneConfig) and one.env != "dmc:triped-walk"]
    suite = "metaworld:" if manipulation else "dmc:"
    assert Counter(run.env for run in runs) == {suite + task: 5 for task in targets}
    assert {run.seed for run in runs} == {8}
    for run in runs:
        assert run.steps == (256_000 if manipulation else 502_000)
        assert run.prefill == (5000 if manipulation else 1000)
        assert (run.batch, run.length) == ((50, 50) if manipulation else (16, 50))
        assert run.world.action_repeat == (1 if manipulation else 2)
        assert run.video_bonus.beta == (1.0 if manipulation else 0.1)
        assert run.model == pretrain.model and run.world.quality == "paper"
    videos = [one for one in parsed.values() if isinstance(one, CollectConfig)]
    if triped:
        agent = parsed["videos/triped-walk"]
        assert isinstance(agent, FinetuneConfig)
        assert (agent.env, agent.steps, agent.bonus, agent.pretrained) == ("dmc:triped-walk", 502_000, False, None)
    else:
        assert len({one.env for one in videos}) == len(videos) == 44
        assert not {one.env.removeprefix("metaworld:") for one in videos} & set(EXPERIMENTS["manipulation"].tasks)
        assert {one.policy for one in videos} == {"scripted"}
        count = sum(one.episodes * len(one.cameras) for one in videos)
        assert abs(count - 4950) < 200, "about as many videos as the paper"


def test_arms_differ_in_what_their_names_say() -> None:
    plan = _plan("locomotion-in-domain", "paper", seeds=(3,))
    runs = {}
    for step in plan.steps:
        if step.curve and step.curve.task == "dmc:hopper-hop":
            config = _parsed(plan, step)
            assert isinstance(config, FinetuneConfig)
            runs[step.curve.arm] = config.pretrained is not None, config.stacked, config.bonus
    assert runs == {
        "apv": (True, True, True),
        "dreamerv2": (False, False, False),
        "no-stacking": (True, False, True),
        "no-bonus": (True, True, False),
        "no-pretraining": (False, True, True),
    }


def test_selection_and_a_pretrained_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment", "locomotion-in-domain", "--dry-run", "--tasks", "hopper-hop", "--seeds", "5", "7"]
    arguments += ["--arms", "apv", "dreamerv2", "--pretrained", "models/v1", "--precision", "bf16", "--out", "x"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    apv-fast")]
    assert [line.split()[1] for line in lines] == ["finetune"] * 4 + ["plot"], "the model is there already"
    assert lines[0].startswith(
        "apv-fast finetune --preset dmc --env dmc:hopper-hop --out x/finetune/hopper-hop/apv/seed-5"
    )
    assert [line.count("--pretrained models/v1") for line in lines] == [1, 0, 1, 0, 0]
    assert all("--model.precision bf16" in line for line in lines[:4])
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name: give one experiment, of manipulation, "),
        (["jumping"], "name is 'jumping'; the experiments are: manipulation, "),
        (["walker", "--size", "paper"], "size is 'paper'; walker has: laptop, quick"),
        (["walker", "--arms", "apvv"], "arms has 'apvv'; it must be of: apv, dreamerv2, "),
        (["walker", "--tasks", "hopper-hop"], "tasks has 'hopper-hop'; it must be of: walker-stand"),
        (["walker", "--seeds", "-1"], "seeds has -1; it must be "),
        (["walker", "--parallel", "0"], "parallel is 0; it must be at least 1"),
    ],
)
def test_bad_selections(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*EXPERIMENTS, *ARMS):
        assert f"  {name}" in printed
    assert "paper (8 seeds), laptop (3 seeds), quick (1 seed)" in printed


# plan.json


def _saved(tmp_path: Path) -> Plan:
    plan = _plan("walker", "quick", tmp_path)
    plan["videos/walker-walk"].state = plan["pretrain"].state = "done"
    (tmp_path / "pretrain").mkdir()
    plan.save()
    return plan


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    plan = _saved(tmp_path)
    assert load_plan(tmp_path) == plan
    assert load_plan(tmp_path / "pretrain") is None
    saved = json.loads((tmp_path / "plan.json").read_text())
    step = saved["steps"][1]
    assert step["command"].startswith(
        f"apv-fast pretrain --preset small --data {tmp_path}/videos/walker-walk --out {tmp_path}"
    )
    assert (step["needs"], step["writes"], step["state"]) == (["videos/walker-walk"], "pretrain", "done")


def test_going_on_keeps_what_is_done_and_there(tmp_path: Path) -> None:
    before = _saved(tmp_path)
    plan = _plan("walker", "quick", tmp_path)
    plan.go_on_from(before)
    states = {step.name: step.state for step in plan.steps}
    assert states["pretrain"] == "done"
    assert states["videos/walker-walk"] == "waiting", "somebody deleted the videos"


def test_a_folder_may_be_moved(tmp_path: Path) -> None:
    _saved(tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    before = load_plan(moved)
    assert before is not None
    plan = _plan("walker", "quick", moved)
    plan.go_on_from(before)
    assert plan["pretrain"].state == "done"


def test_finished_runs_that_are_not_selected_stay_in_the_plan(tmp_path: Path) -> None:
    before = _plan("walker", "quick", tmp_path)
    for step in before.steps:
        step.state = "done"
        (tmp_path / step.writes).mkdir(parents=True, exist_ok=True)
    plan = make_plan("walker", "quick", tmp_path, tasks=["walker-stand"], arms=["apv"], seeds=[2])
    plan.go_on_from(before)
    assert {(curve.arm, curve.seed) for curve, _ in plan.runs()} == {
        ("apv", 1),
        ("dreamerv2", 1),
        ("no-pretraining", 1),
        ("apv", 2),
    }
    assert plan.steps[-1].name == "plot" and plan.steps[-1].state == "waiting", "there is a new curve to draw"


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    before = _saved(tmp_path)
    plan = make_plan("walker", "quick", tmp_path, tasks=["walker-stand"], arms=["apv"], seeds=[1], precision="bf16")
    with pytest.raises(
        PlanError, match=r"pretrain was started there as\n.* fp32 .*\nand would now be\n.* bf16 .*\nchoose"
    ):
        plan.go_on_from(before)
    with pytest.raises(
        PlanError, match="is of walker at size quick, not of walker at size laptop; choose another --out"
    ):
        _plan("walker", "laptop", tmp_path).go_on_from(before)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 1, "steps": [{"name": 3}]}'])
def test_a_damaged_plan(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match=r"plan\.json is damaged .* delete it"):
        load_plan(tmp_path)
    (tmp_path / "plan.json").write_text('{"format": 9}')
    with pytest.raises(PlanError, match="format is 9, not 1"):
        load_plan(tmp_path)
