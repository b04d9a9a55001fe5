"""The transformers attend to a second text where `Tweaks.away` asks for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance_formulas import NormalisedGuidance
from modules.contract.steps import Away, Tweaks
from tests.tiny.dits import DITS, TinyDit

SIZE = (3, 4, 6, 9)  # latent frames, rows, columns, tokens of the text
# arguments that a text gives
TEXTS = (
    *("text", "text_mask", "glyphs", "glyph_mask", "caption", "caption_mask"),
    *("llama", "llama_mask", "clip_l", "t5", "t5_mask", "pooled"),
)
POOLED = {"clip_l", "pooled"}
NAG = NormalisedGuidance(5.0, 2.5, 0.5)

each_dit = pytest.mark.parametrize("tiny", DITS, ids=lambda each: each.name)


def toward(first: Tensor, second: Tensor) -> Tensor:
    return first


def away(first: Tensor, second: Tensor) -> Tensor:
    return second


def texts_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in TEXTS if name in inputs}


def other_text(tiny: TinyDit, batch: int = 1, length: int = 6) -> dict[str, Any]:
    """Another text of another length, with the pooled vector of the first one where there is one."""
    text = {
        name: [one.flip(0) * 0.5 for one in value] if isinstance(value, list) else value.flip(-1)
        for name, value in texts_of(tiny.inputs((*SIZE[:3], length), batch)).items()
    }
    masks = {name: value.flip(-1) for name, value in text.items() if name.endswith("_mask")}  # as they were
    pooled = {name: value for name, value in tiny.inputs(SIZE, batch).items() if name in POOLED}
    return text | masks | pooled


@torch.no_grad()
def velocity(
    tiny: TinyDit,
    second: dict[str, Any] | None = None,
    steer: Callable[[Tensor, Tensor], Tensor] = NAG,
    batch: int = 1,
    **given: Any,
) -> Tensor:
    """What the transformer makes of the usual inputs with a second text, if one is given."""
    tweaks = Tweaks(away=None if second is None else Away(second, steer))
    return tiny.make(2)(**{**tiny.inputs(SIZE, batch), **given}, tweaks=tweaks)


def assert_same(steered: Tensor, plain: Tensor) -> None:
    """Where texts have queries too, products of both texts are of other sizes, and rounded otherwise."""
    torch.testing.assert_close(steered, plain, atol=5e-6, rtol=1e-5)


@each_dit
@pytest.mark.parametrize("batch", [1, 2])  # in a batch texts differ in length
def test_what_sees_the_second_text_alone_is_the_pass_of_that_text(tiny: TinyDit, batch: int) -> None:
    other = other_text(tiny, batch)

    seen = velocity(tiny, other, away, batch)

    torch.testing.assert_close(seen, velocity(tiny, batch=batch, **other), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(seen, velocity(tiny, batch=batch), atol=1e-4)


@each_dit
def test_a_second_text_that_steers_nothing_changes_nothing(tiny: TinyDit) -> None:
    assert_same(velocity(tiny, other_text(tiny), toward), velocity(tiny))


@each_dit
def test_steering_away_from_the_same_text_changes_nothing(tiny: TinyDit) -> None:
    assert_same(velocity(tiny, texts_of(tiny.inputs(SIZE, 1))), velocity(tiny))


@each_dit
def test_one_second_text_serves_all_samples(tiny: TinyDit) -> None:
    one = other_text(tiny)
    twice = {
        name: value * 2 if isinstance(value, list) else value.expand(2, *value.shape[1:])
        for name, value in one.items()
    }

    # products of one text and of two are rounded otherwise
    torch.testing.assert_close(
        velocity(tiny, one, batch=2), velocity(tiny, twice, batch=2), atol=1e-5, rtol=1e-5
    )


@each_dit
def test_normalised_guidance_leaves_the_pass_of_either_text(tiny: TinyDit) -> None:
    other = other_text(tiny)
    steered, plain = velocity(tiny, other), velocity(tiny)

    assert not torch.allclose(steered, plain, atol=1e-4)
    assert not torch.allclose(steered, velocity(tiny, **other), atol=1e-4)


@pytest.mark.parametrize("tiny", DITS[2:4], ids=lambda each: each.name)
def test_the_pooled_vector_of_the_second_text_reaches_only_that_text(tiny: TinyDit) -> None:
    other = other_text(tiny)
    changed = {**other, "clip_l": -other["clip_l"]}

    assert_same(velocity(tiny, changed, toward), velocity(tiny))
    assert not torch.allclose(velocity(tiny, changed), velocity(tiny, other), atol=1e-5)


@each_dit
def test_compiled_blocks_do_the_same(tiny: TinyDit) -> None:
    torch._dynamo.reset()  # the families share a forward, and a process compiles it 8 times
    other, dit = other_text(tiny), tiny.make(2)
    for blocks in tiny.spec.blocks(dit).values():
        for block in blocks:
            block.compile(backend="eager", fullgraph=True)
    inputs = tiny.inputs(SIZE, 1)

    with torch.no_grad():
        steered = dit(**inputs, tweaks=Tweaks(away=Away(other, NAG)))
        plain = dit(**inputs)

    torch.testing.assert_close(steered, velocity(tiny, other), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain, velocity(tiny), atol=1e-5, rtol=1e-5)


def test_the_image_is_seen_as_without_a_second_text() -> None:
    """Wan adds what it sees of the image after the texts are combined."""
    tiny = DITS[1]
    dit = tiny.make(1)
    block = dit.get_submodule("blocks.0.cross_attn")
    hidden, tokens = dit.embed(  # type: ignore[operator]
        *tiny.inputs(SIZE, 1).values(), Tweaks(away=Away(other_text(tiny), lambda first, second: 0 * first))
    )

    with torch.no_grad():
        seen = block(hidden, tokens)
        without = block(hidden, replace(tokens, image=None))

    assert torch.equal(without, block.o.bias.expand_as(without))  # type: ignore[union-attr, operator]
    assert not torch.allclose(seen, without, atol=1e-3)
