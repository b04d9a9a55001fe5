"""The transformer of Qwen-Image-2.1 against diffusers' in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.compile_options import Compilation
from protocols.steps import Overrides, StepPosition
from qwen_image_21.configs import default_axes
from qwen_image_21.model import Prefix, QwenImage21Model, order_prefixes
from runtime.compile import compile_blocks
from tests.parity.running import assert_equal
from tests.qwen_image_21.making import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.tiny.qwen_image_21 import CONFIG, tiny_state

# Of the largest value. Measured: 1e-6 to 2e-6, and 5e-6 for the fastest cosines of the time, which both sides
# compute from a float32 number; the nearest mistakes are above 1e-2 (below)
NEAR = 2e-5
GRIDS = ((2, 4), (6, 2))


def draw_references(batch: int, grids: tuple[tuple[int, int], ...] = GRIDS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, CONFIG.channels, 1, *grid, generator=generator) for grid in grids]


@pytest.mark.parametrize("batch", [1, 2], ids=["no padding", "padded"])
@pytest.mark.parametrize("slots", [(), (3,), (2, 5), (4, 4)], ids=["none", "one", "two", "side by side"])
@torch.no_grad()
def test_velocities_equal_those_of_diffusers(batch: int, slots: tuple[int, ...]) -> None:
    given = tiny_inputs(batch, slots=slots)
    references = draw_references(batch, GRIDS[: len(slots)])

    ours = tiny_model()(**given, references=references)

    assert_equal(ours, predict_with(in_diffusers(tiny_state()), given, references), "velocity", NEAR)


@torch.no_grad()
def test_samples_of_a_batch_may_have_references_in_different_places() -> None:
    given = tiny_inputs(2)
    given["slots"] = torch.tensor([[2], [6]])
    references = draw_references(2, GRIDS[:1])

    ours = tiny_model()(**given, references=references)

    assert_equal(ours, predict_with(in_diffusers(tiny_state()), given, references), "velocity", NEAR)


class Mistaken(QwenImage21Model):
    """The network with one mistake."""

    mistake = ""

    def modulation_rows(self, times: Tensor) -> Tensor:
        if self.mistake == "time of references":
            times = times[:, :1].expand_as(times)
        return super().modulation_rows(times)

    def _make_sample_table(self, layout: Any, prefix: Any, device: torch.device) -> Tensor:
        table = super()._make_sample_table(layout, prefix, device)
        if self.mistake == "rows from 0":
            rows, columns = layout.grid
            moved = layout._replace(grid=(2 * rows, 2 * columns))
            full = super()._make_sample_table(moved, prefix, device)[: 4 * rows * columns]
            quarter = full.unflatten(0, (2 * rows, 2 * columns))[rows:, columns:].flatten(0, 1)
            table = torch.cat([quarter, table[rows * columns :]])
        return table


@pytest.mark.parametrize("mistake", ["time of references", "rows from 0", "order of references"])
@torch.no_grad()
def test_the_nearest_mistakes_are_far_away(mistake: str) -> None:
    given = tiny_inputs(1, slots=(3, 5))
    references = draw_references(1)
    model = Mistaken(CONFIG)
    model.load_state_dict(tiny_state())
    model.mistake = mistake
    shown = references[::-1] if mistake == "order of references" else references
    expected = predict_with(in_diffusers(tiny_state()), given, references)
    error = (model(**given, references=shown) - expected).abs().max() / expected.abs().max()
    assert error > 500 * NEAR


@torch.no_grad()
def test_what_precedes_the_picture_is_computed_once_for_all_steps() -> None:
    """With other noise and at another time, with a batch of unequal prompts, each pass by its own."""
    model = tiny_model()
    counts: list[int] = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    references = draw_references(2)
    given = tiny_inputs(2, slots=(3, 5))
    memory: dict[Any, Any] = {}
    for step, changes in enumerate(({}, {"noisy": -given["noisy"], "timesteps": given["timesteps"] / 3})):
        asked = {**given, **changes}
        plain = model(**asked, references=references)
        counts.clear()
        overrides = Overrides(
            section_cache=memory,
            step_position=StepPosition(step, 2, 1.0, next_timestep=0.0, pass_key="a pass"),
        )
        assert_equal(model(**asked, references=references, overrides=overrides), plain, "velocity", 1e-5)
        prefix = 9 + 8 + 12
        assert counts == [prefix, 24][step:]
    skipping = Overrides(
        section_cache=memory,
        step_position=StepPosition(2, 3, 1.0, next_timestep=0.0, pass_key="b"),
        skip_blocks=frozenset({1}),
    )
    counts.clear()
    model(**given, references=references, overrides=skipping)
    assert counts == [prefix + 24]
    assert not any(attention.cached_keys_values for attention in model.attentions())


@pytest.mark.slow
@torch.no_grad()
def test_blocks_are_not_compiled_for_each_length_of_a_text() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model()
    compile_blocks(model, model.spec, Compilation(backend="eager", fullgraph=True))
    for length in range(5, 12):
        model(**tiny_inputs(1, text=length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_sizes_and_slots_that_do_not_fit_are_refused() -> None:
    given = tiny_inputs(1)
    with pytest.raises(ValueError, match="channels of one image"):
        tiny_model()(**{**given, "noisy": given["noisy"][:, 1:]})
    for slots in ((12,), (-1,), (), (5, 3)):
        with pytest.raises(ValueError, match=r"slots .* in a text of 9 tokens for 1 references"):
            order_prefixes(given["text_mask"], torch.tensor([slots]), draw_references(1)[:1])


def test_a_prefix_is_cut_where_references_stand() -> None:
    prefix = Prefix(5, (0, 2, 2, 5), ((1, 2), (1, 1), (1, 1), (1, 1)))
    assert [tuple(segment) for segment in prefix.segments] == [
        (0, 2, False),
        (2, 4, True),
        (4, 5, False),
        (5, 6, False),
        (6, 9, True),
        (9, 10, False),
    ]
    assert prefix.length == 10


def test_axes_without_a_configuration_are_those_of_the_release() -> None:
    assert default_axes(128) == (16, 56, 56)
    for width in (8, 16, 32, 64):
        assert sum(default_axes(width)) == width
        assert all(axis > 0 and axis % 2 == 0 for axis in default_axes(width))
