"""Networks are loaded when first needed, and freed or kept between their phases."""

import gc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from blissful_tuner.guidance_options import PLAIN_GUIDANCE
from generation.session import NO_ENCODERS, Session, encode_inputs, select_texts, wanted_texts
from modules.contract.loading import Placement
from modules.contract.requests import Prompt, Prompts, Request
from modules.contract.rules import HIGH_NOISE, LOW_NOISE, Expert, expert_at
from modules.contract.steps import Needs
from tests.generation.toy_family import ToyFamily

CPU = torch.device("cpu")
LOW, HIGH = Expert(LOW_NOISE, 0.0), Expert(HIGH_NOISE, 900.0)
CAT = Request("cat", 0, steps=3, guidance_scale=5.0)
DOG = Request("a dog", 0, steps=3, guidance_scale=5.0, negative_prompt="worse")


def session(family: ToyFamily, keep: bool) -> Session:
    def load(expert: int) -> nn.Module:
        return family.load_dit(Placement(CPU), expert)

    return Session(family, CPU, load, keep)


def texts_of(*requests: Request) -> list[Mapping[int, Prompts]]:
    return [wanted_texts(ToyFamily().prepare(request)) for request in requests]


def test_each_text_is_encoded_once_and_the_encoder_is_freed() -> None:
    family = ToyFamily()
    first, second = session(family, keep=False).texts(texts_of(CAT, DOG))
    assert family.diary == [
        "load text",
        "encode cat",
        "encode bad",
        "encode a dog",
        "encode worse",
        "free text",
    ]
    assert float(first[0].positive["letters"][0]) == 3.0
    assert second[0].negative is not None
    assert float(second[0].negative["letters"][0]) == 5.0


def test_lines_of_one_prompt_keep_their_own_negative_text() -> None:
    requests = [Request("cat", 0, steps=3, guidance_scale=2.0, negative_prompt=text) for text in ("a", "bb")]
    found = session(ToyFamily(), keep=False).texts(texts_of(*requests))
    negatives = [by_section[0].negative for by_section in found]
    assert [float(negative["letters"][0]) for negative in negatives if negative is not None] == [1.0, 2.0]


def test_only_needed_texts_are_encoded() -> None:
    texts = Prompts(Prompt("cat"), Prompt("bad"))
    assert select_texts(texts, Needs()) == Prompts(Prompt("cat"))
    assert select_texts(texts, Needs(negative=True)) == texts
    assert select_texts(texts, Needs(blank=True)) == Prompts(Prompt("cat"), blank=Prompt(""))


def test_steps_that_all_go_without_guidance_need_no_negative_text() -> None:
    never = replace(PLAIN_GUIDANCE, cfg_skip_mode="late", cfg_apply_ratio=0.0)
    assert wanted_texts(ToyFamily().prepare(DOG), never)[0].negative is None
    assert wanted_texts(ToyFamily().prepare(DOG))[0].negative == Prompt("worse")


def test_known_texts_do_not_wake_the_encoder() -> None:
    family = ToyFamily()
    kept = session(family, keep=True)
    kept.texts(texts_of(CAT))
    family.diary.clear()
    kept.texts(texts_of(CAT))
    assert family.diary == []


def test_a_freed_network_is_really_gone() -> None:
    family = ToyFamily()
    freeing = session(family, keep=False)
    with freeing.dit() as dit_at:
        dit = weakref.ref(dit_at(500.0))
    gc.collect()
    assert dit() is None
    with freeing.media(images=True, again=True) as encoders:
        vae = weakref.ref(encoders.vae)
    with freeing.media(images=False, again=False) as encoders:
        assert vae() is encoders.vae
    del encoders
    gc.collect()
    assert vae() is None


def test_a_kept_network_is_loaded_once() -> None:
    family = ToyFamily()
    kept = session(family, keep=True)
    for _ in range(2):
        with kept.dit():
            pass
        with kept.media(images=False, again=False):
            pass
    assert family.diary == ["load dit", "load vae"]


@pytest.mark.parametrize(("timestep", "expert"), [(1000.0, 1), (900.0, 1), (899.0, 0), (0.0, 0), (-1.0, 0)])
def test_the_expert_of_a_timestep_is_the_last_that_begins_at_or_below_it(
    timestep: float, expert: int
) -> None:
    assert expert_at(timestep, (LOW, HIGH)) == expert
    assert expert_at(timestep, (HIGH, LOW)) == 1 - expert  # in whichever order they are named


def test_inputs_without_media_need_no_encoders() -> None:
    (inputs,) = encode_inputs(ToyFamily(), NO_ENCODERS, [ToyFamily().prepare(CAT)])
    assert inputs == {0: {}}
    family = ToyFamily()
    with_image = family.prepare(Request("p", 0, image_path=Path("a.png")))
    (inputs,) = encode_inputs(family, family.media_encoders(CPU), [with_image])
    assert isinstance(inputs[0]["image"], torch.Tensor)
