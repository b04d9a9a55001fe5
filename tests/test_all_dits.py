"""What the transformers of all families have in common: a batch, padding, attention's back ends, bfloat16."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.speed_options import AttentionChoice
from tests.modules.attention_packages import PACKAGES, put_in
from tests.tiny.dits import DITS, Size, TinyDit

SIZE: Size = (2, 4, 6, 9)
NEAR = 1e-5  # of the largest value, in float32
NEAR_IN_BF16 = 0.05
HIDING = [each for each in DITS if each.name != "flux chroma"]  # which sees one row of padding, as trained
of_each_that_hides = pytest.mark.parametrize("dit", HIDING, ids=lambda each: each.name)


@pytest.fixture(params=DITS, ids=lambda each: each.name)
def dit(request: pytest.FixtureRequest) -> TinyDit:
    return request.param


def masks_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The masks of texts by the texts' names."""
    return {name.removesuffix("_mask"): mask for name, mask in inputs.items() if name.endswith("_mask")}


def text_of(inputs: dict[str, Any], name: str) -> str:
    """The name of the input that a mask is for: `glyph_mask` is for `glyphs`."""
    return name if name in inputs else f"{name}s"


def assert_near(found: Tensor, expected: Tensor, near: float = NEAR) -> None:
    assert (found - expected).abs().max() <= near * expected.abs().max()


@of_each_that_hides
def test_a_sample_of_a_batch_equals_that_sample_alone_without_its_padding(dit: TinyDit) -> None:
    model, inputs = dit.make(2), dit.inputs(SIZE, 2)

    together = model(**inputs)

    for sample in range(2):
        alone = {name: value[sample : sample + 1] for name, value in inputs.items()}
        for name, mask in masks_of(inputs).items():
            length = max(int(mask[sample].sum()), 1)  # an empty text is a row that nobody sees
            for each in (text_of(inputs, name), f"{name}_mask"):
                alone[each] = alone[each][:, :length]
        assert_near(model(**alone)[0], together[sample])


@of_each_that_hides
def test_what_stands_in_the_padding_does_not_matter(dit: TinyDit) -> None:
    model, inputs = dit.make(2), dit.inputs(SIZE, 2)
    changed = {
        text_of(inputs, name): inputs[text_of(inputs, name)].masked_fill(mask.unsqueeze(-1) == 0, -5.0)
        for name, mask in masks_of(inputs).items()
    }

    assert torch.equal(model(**inputs), model(**inputs | changed))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", ["sdpa", *PACKAGES])
def test_every_attention_back_end_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, dit: TinyDit, mode: str, split: bool
) -> None:
    """With stand-ins for the packages."""
    if mode in PACKAGES:
        put_in(monkeypatch, mode)
    model, inputs = dit.make(1), dit.inputs(SIZE, 2)
    expected = model(**inputs)
    model.attention = AttentionChoice(mode.partition(" ")[0], split)

    assert_near(model(**inputs), expected)


def test_bfloat16_autocast_stays_near_float32(dit: TinyDit) -> None:
    model, inputs = dit.make(2), dit.inputs(SIZE, 2)
    expected = model(**inputs)

    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs)

    assert_near(found.float(), expected, NEAR_IN_BF16)
