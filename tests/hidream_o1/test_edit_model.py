"""With references, HiDream-O1-Image's network equals the plain one and transformers' tower; mistakes show."""

import numpy
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hidream_o1.references import cut_tokens, shrink_for_tower
from hidream_o1.vision import HiDreamO1Vision
from protocols.steps import NagText, Overrides
from tests.hidream_o1.making import (
    EDITING,
    edit_inputs,
    edit_model,
    edit_plainly,
    edit_state,
    look_with,
    public_tower,
)
from tests.hidream_o1.plain import EDIT_MISTAKES
from tests.hidream_o1.test_model import NEAR, error_of
from tests.tiny.dit_files import frozen
from tests.tiny.hidream_o1 import DEEP_LAYERS, tower_state


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """Of three references, and texts of unequal lengths."""
    return edit_plainly(edit_inputs(3), 3)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("number", [1, 3])
@torch.no_grad()
def test_the_network_with_references_equals_the_plain_one(number: int, batch: int) -> None:
    inputs = edit_inputs(number, batch)
    assert error_of(edit_model()(**inputs), edit_plainly(inputs, number)) < NEAR


@pytest.mark.parametrize("mistake", EDIT_MISTAKES)
def test_each_mistake_with_references_would_show(mistake: str, expected: Tensor) -> None:
    assert error_of(edit_plainly(edit_inputs(3), 3, mistake), expected) > 20 * NEAR


def picture(width: int, height: int) -> NDArray[numpy.uint8]:
    generator = numpy.random.default_rng(width * height)
    return generator.integers(256, size=(height, width, 3), dtype=numpy.uint8)


def small_copy(frame: NDArray[numpy.uint8], side: int) -> Image.Image:
    """As the released code: an area, sides cut to 32 pixels, Lanczos."""
    width, height = frame.shape[1], frame.shape[0]
    wide = (side * side * width / height) ** 0.5
    size = int(wide / 32) * 32, int(wide / (width / height) / 32) * 32
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


@pytest.mark.parametrize(
    ("number", "side", "size"), [(1, 384, (224, 160)), (5, 288, (96, 160)), (10, 192, (160, 160))]
)
@torch.no_grad()
def test_the_tower_and_its_input_are_those_of_transformers(
    number: int, side: int, size: tuple[int, int]
) -> None:
    """Also of copies that are so small that the processor enlarges them."""
    frame = picture(*size)
    expected, layers = look_with(public_tower(edit_state(), DEEP_LAYERS), [small_copy(frame, side)])
    small = shrink_for_tower(frame, number)
    assert EDITING.vision is not None
    tower = frozen(HiDreamO1Vision(EDITING.vision), bare_tower())

    last, *deep = tower(cut_tokens(small)[None], (small.shape[0] // 32, small.shape[1] // 32))

    assert error_of(last[0], expected) < NEAR
    for ours, theirs in zip(deep, layers, strict=True):
        assert error_of(ours[0], theirs) < NEAR


def bare_tower() -> dict[str, Tensor]:
    return {name.removeprefix("visual."): tensor for name, tensor in tower_state(DEEP_LAYERS).items()}


@torch.no_grad()
def test_a_second_text_of_the_same_words_and_references_changes_nothing() -> None:
    inputs = edit_inputs(2)
    names = ("text", "text_mask", "shown", "grids")
    nag = NagText({name: inputs[name] for name in names}, lambda first, second: first)
    model = edit_model()
    torch.testing.assert_close(
        model(**inputs, overrides=Overrides(nag=nag)), model(**inputs), rtol=1e-5, atol=1e-5
    )


def test_the_tower_learns_and_is_computed_again_in_the_backward_pass() -> None:
    inputs, model = edit_inputs(1), edit_model()
    names = ("visual.blocks.0.attn.qkv.weight", "visual.deepstack_merger_list.1.linear_fc2.weight")
    weights = [model.get_parameter(name).requires_grad_(True) for name in names]
    for gradient in torch.autograd.grad(model(**inputs).sum(), weights):
        assert gradient.abs().max() > 0


def test_texts_of_other_references_are_refused() -> None:
    inputs = edit_inputs(2)
    with pytest.raises(ValueError, match="texts for other references"):
        edit_model()(**{**inputs, "text": inputs["text"].clamp(min=0)})
