"""World models, behaviour and their updates at toy sizes: determinism, what trains what, acting."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apv_fast.agent import Pretrainer
from apv_fast.agent.open_loop import open_loop, open_loop_video
from apv_fast.config import (
    FinetuneConfig,
    PretrainConfig,
)
from apv_fast.run import CheckpointError
from tests.support.learners import (
    CPU,
    FILE,
    FINETUNE,
    MODEL,
    PLAIN,
    PRETRAIN,
    VARIANTS,
    differing,
    make,
    make_agent,
    make_batch,
)


@pytest.mark.parametrize("kind", ["video", "stacked", "plain", "discount"])
def test_same_seed_same_weights(kind: str) -> None:
    """Bit for bit after 20 updates, moments, queue and all."""
    states = []
    for _ in range(2):
        learner = make(kind)
        start = copy.deepcopy(learner.model.state_dict())
        for seed in range(20):
            learner.update(make_batch(seed))
        states.append(learner.state_dict())
    assert differing(*states) == []
    assert states[0]["updates"] == 20
    moved = differing(start, states[0]["model"])
    assert len(moved) > len(start) - 4  # all but the projection and what the stack does not use


@pytest.mark.parametrize("kind", ["video", "stacked", "plain"])
def test_a_restored_learner_goes_on_bit_for_bit(kind: str) -> None:
    learner = make(kind)
    for seed in range(4):
        learner.update(make_batch(seed))
    saved, rng = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    for seed in range(4, 8):
        learner.update(make_batch(seed))
    other = make(kind)
    other.update(make_batch(99))
    other.restore(saved, FILE)
    torch.set_rng_state(rng)
    for seed in range(4, 8):
        other.update(make_batch(seed))
    assert differing(learner.state_dict(), other.state_dict()) == []


def test_restoring_another_configuration_is_an_error() -> None:
    state = make_agent().state_dict()
    with pytest.raises(CheckpointError, match=r"step-1\.pt: model\..*"):
        make_agent(PLAIN).restore(state, FILE)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
def test_updates_are_finite_and_change_every_weight(kind: str, discrete: bool) -> None:
    agent = make_agent(VARIANTS[kind], discrete=discrete)
    before = {name: copy.deepcopy(getattr(agent, name).state_dict()) for name in ("model", "behavior")}
    for seed in range(2):
        metrics = agent.update(make_batch(seed))
        assert all(bool(x.isfinite().all()) for x in metrics.values()), metrics
    # With af_kl_scale = 0 nothing trains the action-free prior's head, whose biases are 0; the projection is fixed.
    idle = ("af_rssm.img_out.bias", "af_rssm.img_dist.bias", "bonus.projection")
    for module, state in before.items():
        changed = differing(state, getattr(agent, module).state_dict())
        expected = {f".{name}" for name in state if "slow" not in name}
        if VARIANTS[kind].af_kl_scale == 0:
            expected -= {f".{name}" for name in idle}
        assert expected - {".bonus.projection"} <= set(changed)


def test_behaviour_learning_leaves_no_gradient_in_the_world_model() -> None:
    agent, batch = make_agent(replace(FINETUNE, discount_head=True)), make_batch()
    result = agent.model.loss(batch)
    actor_loss, critic_loss, _ = agent.behavior.losses(agent.model, result.post, batch["is_terminal"])
    (actor_loss + critic_loss).backward()
    assert all(p.grad is None for p in agent.model.parameters())
    assert all(p.requires_grad for p in agent.model.parameters())
    assert all(p.grad is not None for p in agent.behavior.actor.parameters())
    assert all(p.grad is not None for p in agent.behavior.critic.parameters())
    assert all(p.grad is None for p in agent.behavior.slow_critic.parameters())


@pytest.mark.parametrize("discount_grad", [False, True])
def test_the_discount_loss_trains_the_world_model_only_if_asked_to(discount_grad: bool) -> None:
    model = make_agent(replace(FINETUNE, discount_head=True, discount_grad=discount_grad)).model
    seen = []
    assert model.discount is not None
    model.discount.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    model.loss(make_batch()).loss.backward()
    assert seen == [discount_grad]
    assert all(p.grad is not None and p.grad.any() for p in model.discount.parameters())


def pretrained(config: PretrainConfig = PRETRAIN) -> dict[str, Any]:
    torch.manual_seed(5)
    return Pretrainer(config, CPU).state_dict()


@pytest.mark.parametrize("config", [FINETUNE, PLAIN], ids=["stacked", "plain"])
def test_pretrained_weights_go_to_encoder_decoder_and_rssm(config: FinetuneConfig) -> None:
    agent = make_agent(config)
    before = copy.deepcopy(agent.model.state_dict())
    state = pretrained()
    agent.load_pretrained(state, FILE)
    target = "af_rssm" if config.stacked else "rssm"
    wanted = {
        name.replace("rssm.", f"{target}.", 1) if name.startswith("rssm.") else name: x
        for name, x in state["model"].items()
    }
    after = agent.model.state_dict()
    for name, x in after.items():
        assert torch.equal(x, wanted[name] if name in wanted else before[name]), name
    assert set(wanted) <= set(after)


def test_pretrained_weights_of_other_sizes_are_an_error() -> None:
    other_sizes = {
        "model.rssm.img_in.weight": replace(MODEL, hidden=7),
        "model.encoder.convs.0.weight": replace(MODEL, cnn_depth=2),
        "model.decoder.dense.weight": replace(MODEL, discrete=0),
    }
    for field, model in other_sizes.items():
        state = pretrained(replace(PRETRAIN, model=model))
        with pytest.raises(CheckpointError, match=rf"step-1\.pt: {field}: must be a tensor"):
            make_agent().load_pretrained(state, FILE)


def test_weights_that_are_not_of_pretraining_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="is not part of a pre-trained model"):
        make_agent().load_pretrained(make_agent().state_dict(), FILE)


def test_the_video_model_is_frozen_at_first() -> None:
    """Learning rate 0 for ``freeze_updates`` updates: nothing but decay; only with a pre-trained model."""
    config = replace(FINETUNE, pretrained=Path("x"), freeze_updates=2)
    agent = make_agent(config)
    af_rssm = agent.model.af_rssm
    assert af_rssm is not None

    def weights() -> list[Tensor]:
        return [p.detach().clone() for part in (agent.model.encoder, af_rssm) for p in part.parameters()]

    for seed in range(2):
        before = weights()
        agent.update(make_batch(seed))
        for old, new in zip(before, weights(), strict=True):
            torch.testing.assert_close(new, old * (1 - 1e-6), rtol=1e-7, atol=0)
    kernel = weights()[0]
    agent.update(make_batch(2))
    assert (weights()[0] - kernel).abs().max() > 1e-5  # a step of 3e-4, against a decay of 1e-6
    free = make_agent(replace(config, pretrained=None))
    start = copy.deepcopy(free.model.encoder.state_dict())
    free.update(make_batch())
    assert (free.model.encoder.convs[0].weight - start["convs.0.weight"]).abs().max() > 1e-5


def test_slow_critic_is_copied_every_third_update() -> None:
    agent = make_agent()
    with torch.no_grad():
        agent.behavior.slow_critic.out.bias.add_(1.0)  # so that the very first copy shows
    copied = []
    for seed in range(7):
        agent.update(make_batch(seed))
        copied.append(differing(agent.behavior.critic.state_dict(), agent.behavior.slow_critic.state_dict()) == [])
    assert copied == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("discount_head", [False, True])
def test_imagined_sequences(discount_head: bool) -> None:
    """First row: start states, zero action, known discount; weight is the product of the discounts before."""
    agent, batch = make_agent(replace(FINETUNE, discount_head=discount_head)), make_batch()
    post = agent.model.loss(batch).post
    with torch.no_grad():
        seq = agent.behavior.imagine(agent.model, post, batch["is_terminal"])
    assert seq["feat"].shape == (4, 8, 18) and seq["action"].shape == (4, 8, 2)
    assert not seq["action"][0].any() and seq["action"][1:].abs().min() > 0
    torch.testing.assert_close(seq["feat"][0], agent.model.rssm.feat(post).flatten(0, 1).detach())
    if discount_head:
        head = agent.model.discount
        assert head is not None
        expected = head(seq["feat"]).mean.detach()
        expected[0] = 0.99 * (~batch["is_terminal"]).flatten().float()
    else:
        expected = torch.full((4, 8), 0.99)
    torch.testing.assert_close(seq["discount"], expected)
    weight = torch.ones(8)
    for t in range(4):
        torch.testing.assert_close(seq["weight"][t], weight)
        weight = weight * expected[t]
    torch.testing.assert_close(seq["reward"], agent.model.reward(seq["feat"]).mean.detach())


@pytest.mark.parametrize("config", [FINETUNE, PLAIN], ids=["stacked", "plain"])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
def test_acting(config: FinetuneConfig, discrete: bool) -> None:
    agent = make_agent(config, discrete=discrete)
    images = make_batch(batch=3)["image"]
    first = torch.tensor([True, True, True])

    def play(seed: int, explore: bool) -> list[Tensor]:
        generator, memory, actions = torch.Generator().manual_seed(seed), None, []
        for t in range(3):
            action, memory = agent.act(images[:, t], first & (t == 0), memory, explore=explore, generator=generator)
            actions.append(action)
            assert action.shape == (3, 2) and not action.requires_grad
            assert torch.equal(memory.action, action) and memory.state["deter"].shape == (3, 6)
        return actions

    assert all(torch.equal(a, b) for a, b in zip(play(1, False), play(1, False), strict=True))
    exploring = play(1, True)
    assert all(torch.equal(a, b) for a, b in zip(exploring, play(1, True), strict=True))
    if discrete:
        assert all(bool(((a == 0) | (a == 1)).all() and (a.sum(-1) == 1).all()) for a in exploring)
    else:
        assert all(bool((a.abs() < 1).all()) for a in exploring)
        assert not torch.equal(exploring[2], play(2, True)[2])


def test_is_first_forgets() -> None:
    """A row that starts again acts as in a fresh memory; its neighbour goes on."""
    agent, image = make_agent(), make_batch(batch=2)["image"]
    generator = torch.Generator()
    begin = torch.tensor([True, True])
    _, memory = agent.act(image[:, 0], begin, None, explore=True)

    def deter(first: list[bool], start: Any) -> Tensor:
        generator.manual_seed(0)
        return agent.act(image[:, 1], torch.tensor(first), start, explore=False, generator=generator)[1].state["deter"]

    fresh, partly, later = deter([True, True], None), deter([True, False], memory), deter([False, False], memory)
    torch.testing.assert_close(partly[0], fresh[0])
    torch.testing.assert_close(partly[1], later[1])
    assert not torch.allclose(later[0], fresh[0])


@pytest.mark.parametrize("kind", ["video", "stacked", "plain"])
def test_open_loop(kind: str) -> None:
    model, batch = make(kind).model, make_batch(batch=7, length=8)
    frames = open_loop(model, batch)
    assert (frames.dtype, frames.shape) == (torch.uint8, (7, 8, 64, 64, 3))
    assert open_loop_video(model, batch).shape == (8, 3 * 64, 6 * 64, 3)
    with pytest.raises(ValueError, match="the sequences have 5 steps; they must have more than context = 5"):
        open_loop(model, make_batch(length=5))


def test_reward_target_is_reward_plus_normalised_bonus() -> None:
    """On the steps that begin a whole window; without the bonus the rewards themselves."""
    model, reward = make_agent().model, make_batch()["reward"]
    feat = torch.randn(2, 4, 18)
    twin = copy.deepcopy(model)
    target, metrics = model._reward_target(reward, feat)
    assert twin.bonus is not None
    bonus = twin.bonus(feat)
    torch.testing.assert_close(target, reward[:, :3] + bonus / (0.99 + 0.01 * bonus.abs().mean() + 1e-8))
    torch.testing.assert_close(metrics["intr_mean"], bonus.mean())
    assert make_agent(PLAIN).model._reward_target(reward, feat)[0] is reward
