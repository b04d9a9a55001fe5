"""What a step cache holds is freed at the end of a section."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from blissful_tuner.step_cache import StepCaches
from protocols.requests import Request
from protocols.rules import MagCache, StepCaching, TeaCache
from protocols.steps import Overrides
from runtime.run_blocks import get_spec
from runtime.step_cache import PassState
from tests.preparing import prepare
from tests.runtime.step_cache.test_runner import turn
from tests.tiny.dits import ONE_OF_EACH, TinyDit


def branches() -> list[PassState]:
    return [each for each in gc.get_objects() if isinstance(each, PassState)]


CACHES = [MagCache((1.0,), 0.0, 1.0, 6), TeaCache(1.0, (1.0, 0.0))]


@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda each: each.name)
@pytest.mark.parametrize("cache", CACHES, ids=["magcache", "teacache"])
def test_nothing_is_kept_behind_a_section_by_those_who_still_hold_its_networks(
    tiny: TinyDit, cache: StepCaching
) -> None:
    prepared = prepare(Request("p", 0, steps=4))
    prepared = replace(prepared, request=replace(prepared.request, step_cache=cache))
    dit = tiny.make(2).eval()
    others = branches()
    inside = StepCaches(prepared, get_spec(dit)).section(lambda _: dit)
    with inside as dit_at, torch.no_grad():
        dit_at(0.0)(**tiny.inputs((2, 4, 4, 6), 1), overrides=Overrides(step_position=turn(0, 4)))
        kept = [weakref.ref(each) for each in branches() if each not in others]

    gc.collect()
    assert kept
    assert [each() for each in kept] == [None] * len(kept)
    assert dit_at(0.0) is dit  # still held here
