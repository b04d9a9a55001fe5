"""The transformer of HunyuanVideo 1.5 equals diffusers', and each mistake in it makes another velocity."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from hunyuan_video_15.model import HunyuanVideo15Model
from protocols.steps import NagText, Overrides
from tests.hunyuan_video_15.making import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.tiny.hunyuan_video_15 import CONFIG, tiny_state

NEAR = 2e-5  # float32 on the CPU, of values near 1
FAR = 5e-3  # the least that a mistake changes


@pytest.mark.parametrize("has_image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("batch", [1, 2])
def test_velocity_equals_diffusers(has_image: bool, batch: int) -> None:
    inputs = tiny_inputs(batch, has_image=has_image)

    with torch.no_grad():
        ours = tiny_model()(**inputs)
        theirs = predict_with(in_diffusers(tiny_state()), inputs)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=NEAR)


def test_gradients_equal_diffusers() -> None:
    ours, theirs = HunyuanVideo15Model(CONFIG), in_diffusers(tiny_state())
    ours.load_state_dict(tiny_state())
    inputs = tiny_inputs(has_image=True)

    ours(**inputs).square().mean().backward()
    predict_with(theirs, inputs).square().mean().backward()

    gradients = dict(theirs.named_parameters())
    for name, theirs_name in (
        ("img_in.proj.weight", "x_embedder.proj.weight"),
        ("vision_in.proj.1.weight", "image_embedder.linear_1.weight"),
        ("byt5_in.fc1.weight", "context_embedder_2.linear_1.weight"),
        ("cond_type_embedding.weight", "cond_type_embed.weight"),
        ("double_blocks.1.img_attn_q.weight", "transformer_blocks.1.attn.to_q.weight"),
        ("double_blocks.1.txt_attn_v.weight", "transformer_blocks.1.attn.add_v_proj.weight"),
        ("double_blocks.0.txt_mlp.fc1.weight", "transformer_blocks.0.ff_context.net.0.proj.weight"),
        ("double_blocks.0.img_mod.linear.weight", "transformer_blocks.0.norm1.linear.weight"),
        ("time_in.mlp.0.weight", "time_embed.timestep_embedder.linear_1.weight"),
    ):
        mine, other = ours.get_parameter(name).grad, gradients[theirs_name].grad
        assert mine is not None
        assert other is not None
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("has_image", [False, True], ids=["t2v", "i2v"])
def test_a_sample_does_not_depend_on_the_others(has_image: bool) -> None:
    inputs = tiny_inputs(has_image=has_image)
    model = tiny_model()

    with torch.no_grad():
        both = model(**inputs)
        alone = model(**{name: tensor[1:] for name, tensor in inputs.items()})

    torch.testing.assert_close(both[1:], alone, rtol=0, atol=NEAR)


def test_prompts_without_quotation_marks_may_have_no_rows_of_glyphs() -> None:
    inputs = tiny_inputs(1)
    none = {"glyphs": inputs["glyphs"][:, :0], "glyphs_mask": inputs["glyphs_mask"][:, :0]}

    with torch.no_grad():
        assert torch.equal(tiny_model()(**inputs), tiny_model()(**{**inputs, **none}))


def change(inputs: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The inputs with one of them changed as a mistake would."""
    match name:
        case "time from 0 to 1":
            return {**inputs, "timesteps": inputs["timesteps"] / 1000}
        case "no glyphs":
            return {**inputs, "glyphs_mask": torch.zeros_like(inputs["glyphs_mask"])}
        case "no image":
            return {key: tensor for key, tensor in inputs.items() if key != "image"}
        case "no first frame":
            return {**inputs, "first_latents": torch.zeros_like(inputs["first_latents"])}
        case "one token more cut":
            return {**inputs, "text": inputs["text"][:, 1:], "text_mask": inputs["text_mask"][:, 1:]}
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["time from 0 to 1", "no glyphs", "no image", "no first frame", "one token more cut"]
)
def test_a_wrong_input_changes_the_velocity(name: str) -> None:
    inputs = tiny_inputs(has_image=True)

    with torch.no_grad():
        theirs = predict_with(in_diffusers(tiny_state()), inputs)
        ours = tiny_model()(**change(inputs, name))

    assert (ours - theirs).abs().max() > FAR


def test_an_image_of_tiny_numbers_is_another_input_than_none() -> None:
    """Without an image its tokens do not exist; those of zeros would be the bias of their projection."""
    inputs = tiny_inputs(has_image=True)
    faint = {**inputs, "image": torch.full_like(inputs["image"], 1e-6)}

    with torch.no_grad():
        without = tiny_model()(**change(inputs, "no image"))

        assert (tiny_model()(**faint) - without).abs().max() > FAR


@pytest.mark.parametrize(
    ("swapped", "said"),
    [("noisy", "latent channels"), ("text_mask", "a text mask"), ("glyphs_mask", "a text mask")],
)
def test_inputs_of_wrong_sizes_are_refused(swapped: str, said: str) -> None:
    inputs = tiny_inputs()
    inputs[swapped] = inputs[swapped][:, 1:]

    with pytest.raises(ValueError, match=said):
        tiny_model()(**inputs)


def test_a_second_text_whose_attention_counts_nothing_changes_nothing() -> None:
    inputs = tiny_inputs(1, has_image=True)
    texts = {name: inputs[name] for name in ("text", "text_mask", "glyphs", "glyphs_mask")}

    with torch.no_grad():
        alone = tiny_model()(**inputs)
        first = tiny_model()(**inputs, overrides=Overrides(nag=NagText(texts, lambda first, _: first)))

    torch.testing.assert_close(first, alone, rtol=0, atol=NEAR)
