"""HiDream-O1-Image's network equals the plain one, its trunk transformers'; each known mistake would show."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from hidream_o1.configs import DIT
from hidream_o1.model import HiDreamO1Model
from protocols.steps import NagText, Overrides
from tests.hidream_o1.making import (
    LENGTHS,
    SMALL,
    plain_model,
    predict_plainly,
    shape_of,
    small_inputs,
    small_model,
    small_state,
)
from tests.hidream_o1.plain import MISTAKES, places, run_blocks, seen
from tests.manifests import tensor_list

NEAR = 1e-5  # of the largest value: both sides sum products in another order


def error_of(made: Tensor, expected: Tensor) -> float:
    return float((made - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def predict(model: HiDreamO1Model | None = None, **changes: Any) -> Tensor:
    clean: Tensor = (model or small_model())(**{**small_inputs(), **changes})
    return clean


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(3, 5), (6, 2), (1, 1)], ids=str)
@torch.no_grad()
def test_the_network_equals_the_plain_one(batch: int, size: tuple[int, int]) -> None:
    inputs = small_inputs(batch, *size)
    assert error_of(small_model()(**inputs), predict_plainly(plain_model(), inputs)) < NEAR


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_would_show(mistake: str) -> None:
    inputs = small_inputs()
    assert error_of(predict(), predict_plainly(plain_model(), inputs, mistake)) > 100 * NEAR


@torch.no_grad()
def test_the_plain_trunk_is_that_of_transformers() -> None:
    shape = shape_of(SMALL)
    rope = {
        "rope_type": "default",
        "mrope_section": list(shape.sections),
        "mrope_interleaved": True,
        "rope_theta": shape.theta,
    }
    config = Qwen3VLTextConfig(
        vocab_size=SMALL.vocabulary,
        hidden_size=SMALL.dim,
        intermediate_size=SMALL.ffn_dim,
        num_hidden_layers=SMALL.num_layers,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_kv_heads,
        head_dim=SMALL.head_width,
        rms_norm_eps=SMALL.eps,
        rope_theta=shape.theta,
        rope_scaling=rope,
        rope_parameters=rope,
        pad_token_id=None,
    )
    there = Qwen3VLTextModel._from_config(config, attn_implementation="eager").eval()
    state, start = small_state(), "language_model."
    there.load_state_dict(
        {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
    )
    where, mask = places(7, 3, 5), seen(7, 22)
    x = torch.randn(22, SMALL.dim, generator=torch.Generator().manual_seed(3))
    hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]

    expected = there(
        inputs_embeds=x[None], position_ids=where[:, None], attention_mask=hidden, use_cache=False
    ).last_hidden_state[0]

    assert error_of(run_blocks(plain_model(), shape, x, where, mask), expected) < NEAR


@torch.no_grad()
def test_a_sample_with_a_short_text_equals_the_same_alone() -> None:
    """Padding has no effect, and the time stands behind the sample's own text."""
    inputs = small_inputs()
    alone = {name: value[1:] for name, value in inputs.items()}
    alone |= {"text": alone["text"][:, : LENGTHS[1]], "text_mask": alone["text_mask"][:, : LENGTHS[1]]}

    torch.testing.assert_close(predict()[1:], small_model()(**alone), rtol=1e-5, atol=1e-5)


def test_padding_and_the_id_of_the_time_do_not_matter() -> None:
    inputs = small_inputs()
    text = inputs["text"].clone()
    text[~inputs["text_mask"]] = 9
    text[torch.arange(2), torch.tensor(LENGTHS) - 1] = 3
    assert torch.equal(predict(text=text), predict())


@torch.no_grad()
def test_a_second_text_of_the_same_words_changes_nothing() -> None:
    inputs = small_inputs()
    nag = NagText({name: inputs[name] for name in ("text", "text_mask")}, lambda first, second: first)
    torch.testing.assert_close(predict(overrides=Overrides(nag=nag)), predict(), rtol=1e-5, atol=1e-5)


def test_angles_and_time_are_float32_in_16_bits_too() -> None:
    """In bfloat16, positions from 4096 on fall together."""
    model = small_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.embed(**small_inputs()).tokens
    rows = tokens.rotary[0, : tokens.image, 0]
    assert tokens.rotary.dtype == torch.float32
    assert len(torch.unique(rows.flatten(1), dim=0)) == tokens.image


def test_sizes_that_do_not_fit_are_refused() -> None:
    inputs = small_inputs()
    with pytest.raises(ValueError, match="multiples of 4"):
        predict(noisy=inputs["noisy"][..., 1:])
    with pytest.raises(ValueError, match="a text mask of"):
        predict(text_mask=inputs["text_mask"][:, 1:])


def test_layers_in_8_bits_are_those_of_the_blocks_without_norms() -> None:
    names = [name for name in tensor_list("hidream-o1-comfy") if name.startswith(DIT.block_lists)]
    matrices = {name for name in names if name.endswith("proj.weight")}
    assert len(matrices) == 7 * 36
    assert {name for name in names if not any(part in name for part in DIT.fp8_exclude)} == matrices
