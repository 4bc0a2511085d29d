"""Modules apart from the RSSM: encoder, decoder, heads, distributions, the bonus."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apv_fast.nn import (
    RSSM,
    Actor,
    Critic,
    Decoder,
    Encoder,
    MLPHead,
    OneHot,
    StreamNorm,
    TruncatedNormal,
    VideoBonus,
    normalize,
)

ODD_LEADING: list[tuple[int, ...]] = [(), (1,), (3,), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("leading", ODD_LEADING, ids=str)
def test_images_there_and_back(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    encoder, decoder = Encoder(2, channels=1, dtype=dtype), Decoder(7, 2, channels=1, dtype=dtype)
    image = torch.randint(256, (*leading, 64, 64, 1), dtype=torch.uint8)
    embed = encoder(image)
    assert (embed.shape, embed.dtype, encoder.embed_dim) == ((*leading, 64), torch.float32, 64)
    assert torch.equal(embed, encoder(normalize(image)))
    recon = decoder(torch.randn(*leading, 7))
    assert (recon.shape, recon.dtype) == ((*leading, 64, 64, 1), torch.float32)
    (embed.sum() + recon.sum()).backward()
    for p in [*encoder.parameters(), *decoder.parameters()]:
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all()


def test_bfloat16_is_near_float32() -> None:
    torch.manual_seed(0)
    exact, rounded = Encoder(4), Encoder(4, dtype=torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    image = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    error = torch.dist(rounded(image), exact(image)) / exact(image).norm()
    assert 1e-5 < error < 2e-2


def test_normalize() -> None:
    assert normalize(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([-0.5, -0.3, 0.5])


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"Encoder: image has shape \(2, 64, 64, 1\); it must end in \(64, 64, 3\)"):
        Encoder(1)(torch.zeros(2, 64, 64, 1))
    with pytest.raises(TypeError, match=r"Encoder: image has dtype torch\.int32; it must be torch\.uint8 or floating"):
        Encoder(1)(torch.zeros(2, 64, 64, 3, dtype=torch.int32))
    for module in (Decoder(7, 1), MLPHead(7), Actor(7, 2), Critic(7)):
        with pytest.raises(ValueError, match=r"the features have shape \(2, 6\); their last size must be 7"):
            module(torch.zeros(2, 6))


@pytest.mark.parametrize(
    "module",
    [Encoder(3), Decoder(9, 3), MLPHead(9), Actor(9, 2), RSSM(9, 2, deter=20, hidden=30, stoch=3, discrete=5)],
    ids=lambda module: type(module).__name__,
)
def test_initialisation_is_glorot_uniform_with_zero_biases(module: nn.Module) -> None:
    layers = [x for x in module.modules() if isinstance(x, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert layers
    for layer in layers:
        area = math.prod(layer.kernel_size) if not isinstance(layer, nn.Linear) else 1
        limit = math.sqrt(6 / (area * sum(layer.weight.shape[:2])))
        assert layer.bias is not None and not layer.bias.any()
        assert layer.weight.abs().max() <= limit * 1.0001
        if layer.weight.numel() > 300:
            assert layer.weight.abs().max() > 0.97 * limit
            assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.15)


def test_normal_head() -> None:
    head = MLPHead(5, layers=2, units=6)
    feat, target = torch.randn(2, 3, 5), torch.randn(2, 3)
    dist = head(feat)
    expected = -0.5 * (target - dist.mean) ** 2 - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(dist.log_prob(target), expected)
    assert len(head.trunk.layers) == 2


def test_bernoulli_head_takes_soft_targets() -> None:
    dist = MLPHead(5, dist="bernoulli", units=6)(torch.randn(4, 5))
    expected = 0.99 * dist.mean.log() + 0.01 * (1 - dist.mean).log()
    torch.testing.assert_close(dist.log_prob(torch.full((4,), 0.99)), expected)


def test_heads_in_bfloat16_give_float32() -> None:
    feat = torch.randn(4, 5)
    assert MLPHead(5, dtype=torch.bfloat16)(feat).mean.dtype == torch.float32
    policy = Actor(5, 2, dtype=torch.bfloat16)(feat)
    assert policy.entropy().dtype == policy.rsample().dtype == torch.float32


def test_head_errors() -> None:
    with pytest.raises(ValueError, match="MLPHead: dist is 'poisson'; it must be 'normal' or 'bernoulli'"):
        MLPHead(5, dist="poisson")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Actor: action_dim is 0; it must be at least 1"):
        Actor(5, 0)


def test_actors() -> None:
    feat = torch.randn(3, 5)
    continuous, discrete = Actor(5, 2)(feat), Actor(5, 4, discrete=True)(feat)
    assert isinstance(continuous, TruncatedNormal) and isinstance(discrete, OneHot)
    assert (continuous.scale > 0.1).all() and (continuous.scale < 2.1).all() and (continuous.loc.abs() < 1).all()
    assert continuous.mode.shape == (3, 2) and continuous.entropy().shape == (3,)
    assert discrete.mode.shape == (3, 4)


CENTRES = torch.tensor([0.0, 0.5, -0.9, 0.999], dtype=torch.float64)
SCALES = torch.tensor([0.1, 0.7, 2.1, 0.1], dtype=torch.float64)


def test_truncated_normal_by_quadrature() -> None:
    """The density integrates to 1 over [−1, 1], and −∫ p log p is the entropy."""
    dist = TruncatedNormal(CENTRES[:, None], SCALES[:, None])
    n = 200_000
    x = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1
    log_density = TruncatedNormal(CENTRES[:, None, None], SCALES[:, None, None]).log_prob(x[None, :, None])
    density = log_density.exp()
    torch.testing.assert_close(density.mean(-1) * 2, torch.ones(4, dtype=torch.float64), rtol=1e-8, atol=0)
    torch.testing.assert_close(-(density * log_density).mean(-1) * 2, dist.entropy(), rtol=1e-7, atol=1e-7)


def test_truncated_normal_samples_invert_the_distribution_function() -> None:
    dist = TruncatedNormal(CENTRES, SCALES)
    for u in (0.1, 0.5, 0.9):
        x = dist.rsample(torch.full_like(CENTRES, u))
        low, at, high = (torch.special.ndtr((bound - CENTRES) / SCALES) for bound in (-1, x, 1))
        torch.testing.assert_close((at - low) / (high - low), torch.full_like(CENTRES, u))


def test_truncated_normal_gradient() -> None:
    def sample(loc: Tensor, scale: Tensor) -> Tensor:
        return TruncatedNormal(loc, scale).rsample(torch.tensor([0.2, 0.5, 0.7, 0.4], dtype=torch.float64))

    assert torch.autograd.gradcheck(sample, (CENTRES.clone().requires_grad_(), SCALES.clone().requires_grad_()))


@pytest.mark.parametrize("u", [0.0, 1e-30, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("loc", [-1.0, -0.999, 0.0, 0.999, 1.0])
def test_extreme_uniforms_stay_inside_and_finite(loc: float, u: float) -> None:
    leaves = [torch.tensor([loc]).requires_grad_(), torch.tensor([0.1]).requires_grad_()]
    dist = TruncatedNormal(*leaves)
    x = dist.rsample(torch.tensor([u]))
    assert x.abs().item() <= 1 - 9e-7 and x.isfinite().all()
    gradients = torch.autograd.grad(x.sum() + dist.log_prob(x) + dist.entropy(), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients), gradients


def test_truncated_normal_generator() -> None:
    dist = TruncatedNormal(torch.zeros(5), torch.ones(5))
    one, same, other = (dist.rsample(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert dist.mode.tolist() == [0] * 5


def test_one_hot() -> None:
    logit = torch.randn(3, 4, requires_grad=True)
    dist, other = OneHot(logit), torch.distributions.OneHotCategorical(logits=logit)
    sample = dist.rsample()
    assert ((sample == 0) | (sample == 1)).all() and (sample.sum(-1) == 1).all()
    torch.testing.assert_close(dist.entropy(), other.entropy())
    torch.testing.assert_close(dist.log_prob(sample), other.log_prob(sample.detach()))
    assert torch.equal(dist.mode.argmax(-1), logit.argmax(-1)) and not dist.mode.requires_grad
    cotangent = torch.randn(3, 4)
    (got,) = torch.autograd.grad((sample * cotangent).sum(), logit)
    (expected,) = torch.autograd.grad((logit.softmax(-1) * cotangent).sum(), logit)
    torch.testing.assert_close(got, expected)
    forced = dist.rsample(torch.tensor([[0.0, 0, 99, 0]] * 3))
    assert forced.argmax(-1).tolist() == [2, 2, 2]


def test_stream_norm() -> None:
    norm = StreamNorm(0.9, scale=2.0)
    x = torch.tensor([3.0, -1.0])
    torch.testing.assert_close(norm(x), 2 * x / 1.1)  # 0.9·1 + 0.1·2
    torch.testing.assert_close(norm(x), 2 * x / 1.19)
    off = StreamNorm(1.0)
    torch.testing.assert_close(off(x), x)


def test_a_compiled_stream_norm_keeps_its_magnitude() -> None:
    """torch.compile loses what is written to a float64 scalar on the CPU (torch 2.13)."""
    norm, x = StreamNorm(0.9), torch.tensor([3.0, -1.0])
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for mag in (1.1, 1.19):
        torch.testing.assert_close(compiled(x), x / mag)
        assert norm.mag.item() == pytest.approx(mag)
    torch.compiler.reset()


def naive_bonus(
    feats: list[Tensor], projection: Tensor, size: int, k: int, window: int, reduce: str, exclude_self: bool
) -> list[np.ndarray]:
    """With a Python list as the queue, newest first."""
    queue: list[np.ndarray] = []
    results = []
    for feat in feats:
        rows = [
            feat[b, t : t + window].double().numpy().mean(0) @ projection.double().numpy()
            for b in range(len(feat))
            for t in range(feat.shape[1] - window + 1)
        ]
        queue = (rows + queue)[:size]
        bonus = []
        for i, row in enumerate(rows):
            others = [key for j, key in enumerate(queue) if not (exclude_self and j == i)]
            nearest = sorted(float(np.linalg.norm(row - key)) for key in others)[:k]
            bonus.append((np.mean(nearest) if reduce == "mean" else nearest[-1]) if nearest else 0.0)
        results.append(np.array(bonus).reshape(len(feat), -1))
    return results


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("reduce", ["mean", "kth"])
@pytest.mark.parametrize(("size", "k"), [(40, 3), (7, 3), (5, 16), (1, 1)], ids=["filling", "overfull", "few", "one"])
def test_bonus_is_what_a_plain_queue_gives(
    size: int, k: int, reduce: Literal["mean", "kth"], exclude_self: bool
) -> None:
    """Three batches of nine windows: fewer than the queue holds, more than it holds, fewer than k."""
    torch.manual_seed(0)
    bonus = VideoBonus(6, queue_size=size, projection_dim=4, k=k, window=3, reduce=reduce, exclude_self=exclude_self)
    feats = [torch.randn(3, 5, 6) for _ in range(3)]
    expected = naive_bonus(feats, bonus.projection, size, k, 3, reduce, exclude_self)
    for i, (feat, want) in enumerate(zip(feats, expected, strict=True)):
        result = bonus(feat.requires_grad_())
        assert result.shape == (3, 3) and not result.requires_grad
        np.testing.assert_allclose(result.numpy(), want, rtol=1e-4, atol=1e-8)
        assert bonus.filled.item() == min(size, 9 * (i + 1))


def test_bonus_queue_is_newest_first() -> None:
    bonus = VideoBonus(2, queue_size=5, projection_dim=2, window=1, k=1)
    bonus.projection.copy_(torch.eye(2))
    bonus(torch.tensor([[[1.0, 1], [2, 2]]]))
    bonus(torch.tensor([[[3.0, 3], [4, 4]]]))
    assert bonus.queue[:, 0].tolist() == [3, 4, 1, 2, 0]
    bonus(torch.arange(10.0, 17.0)[None, :, None].expand(1, 7, 2))
    assert bonus.queue[:, 0].tolist() == [10, 11, 12, 13, 14]


def test_bonus_survives_a_checkpoint() -> None:
    one, other = (VideoBonus(6, queue_size=8, projection_dim=4, window=2) for _ in range(2))
    one(torch.randn(2, 4, 6))
    other.load_state_dict(one.state_dict())
    feat = torch.randn(2, 4, 6)
    assert torch.equal(one(feat), other(feat))


def test_bonus_projection_has_a_deviation_of_a_128th() -> None:
    assert VideoBonus(100, projection_dim=50).projection.std().item() == pytest.approx(1 / 128, rel=0.05)


@pytest.mark.parametrize("name", ["queue_size", "projection_dim", "k", "window"])
def test_bonus_sizes_must_be_positive(name: str) -> None:
    changed: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"VideoBonus: {name} is 0; it must be at least 1"):
        VideoBonus(6, **changed)


def test_bonus_errors() -> None:
    with pytest.raises(ValueError, match="reduce is 'max'; it must be 'mean' or 'kth'"):
        VideoBonus(6, reduce="max")  # type: ignore[arg-type]
    bonus = VideoBonus(6, window=3)
    with pytest.raises(ValueError, match=r"af_feat has shape \(2, 4, 5\); it must be \[B, T, 6\]"):
        bonus(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="af_feat has 2 steps; it must have at least 3"):
        bonus(torch.zeros(2, 2, 6))
    assert not bonus.filled
