"""The network and the adapter equal diffusers', and common mistakes are further away than the tolerance."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_cosmos import CosmosAdaLayerNorm, CosmosRotaryPosEmbed
from torch import Tensor

from anima.adapter import embed_prompts
from anima.model import AnimaModel, count_real
from protocols.steps import NagText, Overrides
from tests.anima.making import (
    conditioner_in_diffusers,
    predict_in_diffusers,
    text_in_diffusers,
    tiny_inputs,
    tiny_model,
    transformer_in_diffusers,
)
from tests.parity.reference import relative_error
from tests.tiny.anima import CONFIG, tiny_state
from tests.tiny.dit_files import frozen


def predict_there(change: Callable[[Any, Any], object] = lambda dit, adapter: None) -> Tensor:
    """The velocity of diffusers' networks. change: of transformer and adapter."""
    state, given = tiny_state(), tiny_inputs(3)
    dit, adapter = transformer_in_diffusers(state), conditioner_in_diffusers(state)
    change(dit, adapter)
    return predict_in_diffusers(dit, given["noisy"], given["sigmas"], text_in_diffusers(adapter, given))


@torch.no_grad()
def test_the_network_equals_that_of_diffusers_for_texts_of_unequal_lengths() -> None:
    """The third text has no state of the language model at all, as the empty prompt."""
    assert relative_error(tiny_model()(**tiny_inputs(3)), predict_there()) < 1e-5


@torch.no_grad()
def test_the_adapter_equals_that_of_diffusers() -> None:
    model, given = tiny_model(), tiny_inputs(3)
    expected = text_in_diffusers(conditioner_in_diffusers(tiny_state()), given)

    made = embed_prompts(
        *(model.llm_adapter, given["states"], count_real(given["states_mask"])),
        *(given["ids"], given["weights"], 512, model.attention),
    )

    assert expected.shape[1] == 512
    for rows, wanted in zip(made, expected, strict=True):
        assert relative_error(rows, wanted[: len(rows)]) < 1e-5
        assert not wanted[len(rows) :].any()


@torch.no_grad()
def test_tokens_beyond_the_range_of_float16_are_kept_in_float32() -> None:
    """Large gates make the stream as large as in the released weights; half precision rounds the branches."""
    given = tiny_inputs(1)

    def predict(dtype: torch.dtype) -> Tensor:
        model = tiny_model()
        model.t_embedder[1].linear_2.weight[-CONFIG.dim :] *= 4e4  # the gates
        return model.to(dtype)(**given)

    assert relative_error(predict(torch.float16), predict(torch.float32)) < 0.01


def time_times_1000(dit: Any, adapter: Any) -> None:
    dit.time_embed.register_forward_pre_hook(lambda _, given: (given[0], given[1] * 1000))


def padding_dropped(dit: Any, adapter: Any) -> None:
    """The transformer attends to the rows of tokens alone."""
    adapter.config["min_sequence_length"] = 0
    adapter.register_to_config(min_sequence_length=0)


def adapter_without_positions(dit: Any, adapter: Any) -> None:
    for block in adapter.blocks:
        block.cross_attn.register_forward_pre_hook(
            lambda _, args, given: (
                args,
                given | dict.fromkeys(("position_embeddings", "encoder_position_embeddings")),
            ),
            with_kwargs=True,
        )


def mask_of_ones(dit: Any, adapter: Any) -> None:
    dit.patch_embed.register_forward_pre_hook(
        lambda _, given: torch.cat([given[0][:, :-1], torch.ones_like(given[0][:, -1:])], dim=1)
    )


def last_rows_of_time(dit: Any, adapter: Any) -> None:
    assert isinstance(dit.norm_out, CosmosAdaLayerNorm)
    dit.norm_out.register_forward_pre_hook(
        lambda _, given: (given[0], given[1], given[2].roll(2 * CONFIG.dim, dims=-1))
    )


def plain_ratios(dit: Any, adapter: Any) -> None:
    dit.rope = CosmosRotaryPosEmbed(CONFIG.head_width, rope_scale=(1.0, 1.0, 1.0))


@torch.no_grad()
@pytest.mark.parametrize(
    "mistake",
    [
        time_times_1000,
        padding_dropped,
        adapter_without_positions,
        mask_of_ones,
        last_rows_of_time,
        plain_ratios,
    ],
)
def test_common_mistakes_are_further_away(mistake: Callable[[Any, Any], object]) -> None:
    assert relative_error(tiny_model()(**tiny_inputs(3)), predict_there(mistake)) > 5e-4


@torch.no_grad()
def test_weights_multiply_the_rows_of_their_tokens() -> None:
    given = tiny_inputs(1)
    weights = given["weights"].float()
    weights[:, 2:4] = 1.5
    adapter = conditioner_in_diffusers(tiny_state())
    text = text_in_diffusers(adapter, given)
    text[:, 2:4] *= 1.5
    expected = predict_in_diffusers(
        transformer_in_diffusers(tiny_state()), given["noisy"], given["sigmas"], text
    )

    assert relative_error(tiny_model()(**given | {"weights": weights}), expected) < 1e-5


@torch.no_grad()
def test_a_second_text_is_steered_away_from() -> None:
    """With all of the second text's attention taken, the result is that of the second text."""
    given, other = tiny_inputs(2), tiny_inputs(2)
    names = ("states", "states_mask", "ids", "weights")
    second = {name: other[name].flip(0) for name in names}
    model = tiny_model()

    steered = model(**given, overrides=Overrides(nag=NagText(second, lambda first, nag: nag)))

    torch.testing.assert_close(steered, model(**given | second))
    assert relative_error(steered, model(**given)) > 1e-3


def test_padding_before_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match="padding before real tokens"):
        count_real(torch.tensor([[0, 1, 1]]))


@torch.no_grad()
def test_forty_blocks_are_forty_blocks() -> None:
    """A depth that follows from the width would omit twelve."""
    state, given = tiny_state(num_layers=40), tiny_inputs(1)
    ours = frozen(AnimaModel(replace(CONFIG, num_layers=40)), state)
    dit, adapter = transformer_in_diffusers(state, 40), conditioner_in_diffusers(state)
    text = text_in_diffusers(adapter, given)

    expected = predict_in_diffusers(dit, given["noisy"], given["sigmas"], text)

    assert relative_error(ours(**given), expected) < 1e-4
