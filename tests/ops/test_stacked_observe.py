"""``stacked_observe`` on every backend: two models, the upper one on features of the lower one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apv_fast.backend import probe
from tests.support.rssm_cases import (
    SIZES,
    EqualSizes,
    backends_of,
    make_case,
    observe,
    stacked,
    stacked_concat,
    upper_sizes,
)
from tests.support.rssm_contract import RSSMOp
from tests.support.rssm_errors import assert_exact, relative_errors, taken

# Backends that implement the op, and those of them that take float64.
BACKENDS = backends_of("stacked")
EXACT = [name for name in BACKENDS if torch.float64 in probe(name).dtypes]


class TestStacked(RSSMOp):
    cases = ("stacked", "stacked_concat")


@pytest.mark.parametrize(("case", "backend"), [(case, name) for case in TestStacked.cases for name in BACKENDS])
def test_two_equal_models(case: str, backend: str) -> None:
    """As in production, and of sizes that fill their tiles."""
    sizes = EqualSizes(2, 3, 8, 4, 4, 16, 16, 4, 4)
    assert upper_sizes(sizes, False).deter == sizes.deter and upper_sizes(sizes, False).latent == sizes.latent
    assert_exact(case, backend, sizes, taken(backend, torch.float32), True)


@pytest.mark.parametrize("concat_embed", [False, True])
@pytest.mark.parametrize("backend", EXACT)
def test_a_stack_is_two_models(backend: str, concat_embed: bool) -> None:
    sizes = SIZES["odd"]
    case = "stacked_concat" if concat_embed else "stacked"
    tensors = make_case(case, sizes, torch.float64, device=probe(backend).devices[-1])
    both = (stacked_concat if concat_embed else stacked)(tensors, sizes, backend)
    lower = {name.removeprefix("af."): x for name, x in tensors.items() if name.startswith("af.")}
    af = observe(lower | {"embed": tensors["embed"], "is_first": tensors["is_first"]}, replace(sizes, action=0))
    feat = torch.cat([af["post.stoch"].flatten(2), af["post.deter"]], -1)  # stoch first
    feat = torch.cat([tensors["embed"], feat], -1) if concat_embed else feat
    upper = observe(tensors | {"embed": feat}, upper_sizes(sizes, concat_embed))
    expected = {f"af_{name}": x for name, x in af.items()} | upper
    assert max(relative_errors(both, expected).values()) < 1e-12
