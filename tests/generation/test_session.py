"""Networks are loaded when first needed, and freed or kept between their phases."""

import gc
import weakref

import torch
from torch import nn

from generation.session import Session, wanted_texts
from modules.contract.loading import Placement
from modules.contract.requests import Request
from tests.generation.toy_family import ToyFamily

CPU = torch.device("cpu")


def session(family: ToyFamily, keep: bool) -> Session:
    def load(expert: int) -> nn.Module:
        return family.load_dit(Placement(CPU), expert)

    return Session(family, CPU, load, keep)


def test_lines_of_one_prompt_keep_their_own_negative_text() -> None:
    requests = [Request("cat", 0, steps=3, guidance_scale=2.0, negative_prompt=text) for text in ("a", "bb")]
    found = session(ToyFamily(), keep=False).texts(
        [wanted_texts(ToyFamily().prepare(request)) for request in requests]
    )
    negatives = [by_section[0].negative for by_section in found]
    assert [float(negative["letters"][0]) for negative in negatives if negative is not None] == [1.0, 2.0]


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
