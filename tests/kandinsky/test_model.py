"""The transformer of Kandinsky 5 equals diffusers', and each mistake in it makes another velocity."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kandinsky.configs import KandinskyConfig
from kandinsky.model import KandinskyModel, KandinskyTokens
from protocols.steps import Overrides
from tests.kandinsky.making import SCALE, in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.tiny.dit_files import frozen
from tests.tiny.kandinsky import CONFIG, IMAGE_CONFIG, tiny_state

NEAR = 2e-5  # float32 on the CPU, of values near 1
FAR = 5e-3  # the least that a mistake changes


@pytest.mark.parametrize("config", [CONFIG, IMAGE_CONFIG], ids=["clips", "images"])
@pytest.mark.parametrize("scale", [1.0, 2.0, 3.16])
def test_velocity_equals_diffusers(config: KandinskyConfig, scale: float) -> None:
    state = tiny_state("video" if config.has_condition else "image")
    inputs = tiny_inputs(frames=3 if config.has_condition else 1)

    with torch.no_grad():
        ours = tiny_model(config=config)(**inputs, position_scale=scale)
        theirs = predict_with(in_diffusers(state, config), inputs, scale)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=NEAR)


def test_a_given_first_frame_is_marked_and_stays_as_it_is() -> None:
    inputs = tiny_inputs()

    with torch.no_grad():
        ours = tiny_model()(**inputs, position_scale=SCALE, overrides=Overrides(num_clean_frames=1))
        theirs = predict_with(in_diffusers(tiny_state()), inputs, num_clean_frames=1)

    torch.testing.assert_close(ours[:, :, 1:], theirs[:, :, 1:], rtol=0, atol=NEAR)
    assert not ours[:, :, :1].any()


def test_gradients_equal_diffusers() -> None:
    ours, theirs = KandinskyModel(CONFIG), in_diffusers(tiny_state())
    ours.load_state_dict(tiny_state())
    inputs = tiny_inputs()

    ours(**inputs, position_scale=SCALE).square().mean().backward()
    predict_with(theirs, inputs).square().mean().backward()

    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        other = gradients[name].grad
        assert other is not None
        torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=2e-6, msg=name)


def test_a_sample_does_not_depend_on_the_others() -> None:
    inputs = tiny_inputs()
    model = tiny_model()

    with torch.no_grad():
        both = model(**inputs, position_scale=SCALE)
        alone = model(**{name: tensor[1:] for name, tensor in inputs.items()}, position_scale=SCALE)

    torch.testing.assert_close(both[1:], alone, rtol=0, atol=NEAR)


def test_modulation_of_a_16_bit_model_is_that_of_float32() -> None:
    """diffusers keeps it in float32; here the weights keep 16 bits, and the layer computes with 32."""
    state = tiny_state(dtype=torch.bfloat16)
    narrow, wide = KandinskyModel(CONFIG).to(torch.bfloat16), KandinskyModel(CONFIG)
    narrow.load_state_dict(state)
    wide.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    time = torch.randn(2, CONFIG.time_dim)

    for ours, theirs in zip(
        narrow.visual_transformer_blocks[0].visual_modulation(time),
        wide.visual_transformer_blocks[0].visual_modulation(time),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def change(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The inputs with one of them changed as a mistake would."""

    def changed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        match name:
            case "no CLIP":
                return {**inputs, "pooled": torch.zeros_like(inputs["pooled"])}
            case "one token more cut":
                return {**inputs, "text": inputs["text"][:, 1:], "text_mask": inputs["text_mask"][:, 1:]}
            case "time from 0 to 1":
                return {**inputs, "timesteps": inputs["timesteps"] / 1000}
        raise AssertionError(name)

    return changed


@pytest.mark.parametrize("name", ["no CLIP", "one token more cut", "time from 0 to 1"])
def test_a_wrong_input_changes_the_velocity(name: str) -> None:
    inputs = tiny_inputs()
    theirs = predict_with(in_diffusers(tiny_state()), inputs)

    with torch.no_grad():
        ours = tiny_model()(**change(name)(inputs), position_scale=SCALE)

    assert (ours - theirs).abs().max() > FAR


@pytest.mark.parametrize("scale", [1.0, 3.16])
def test_the_scale_of_another_task_changes_the_velocity(scale: float) -> None:
    inputs = tiny_inputs(rows=8, columns=8)
    model = tiny_model()

    with torch.no_grad():
        assert (model(**inputs, position_scale=scale) - model(**inputs, position_scale=2.0)).abs().max() > FAR


class SwappedPatches(KandinskyModel):
    """Patches of the output with their channels last, as those of the input have them."""

    def unembed(self, x: Tensor, tokens: KandinskyTokens) -> Tensor:
        channels = self.config.out_channels
        layer = self.out_layer.out_layer
        swapped = frozen(nn.Linear(layer.in_features, layer.out_features), layer.state_dict())
        for name, parameter in layer.state_dict().items():
            swapped.state_dict()[name].copy_(
                parameter.unflatten(0, (4, channels)).transpose(0, 1).flatten(0, 1)
            )
        self.out_layer.out_layer = swapped
        return super().unembed(x, tokens)


def test_patches_in_and_out_have_different_orders() -> None:
    inputs = tiny_inputs()
    mistaken = frozen(SwappedPatches(CONFIG), tiny_state())

    with torch.no_grad():
        assert (
            mistaken(**inputs, position_scale=SCALE) - tiny_model()(**inputs, position_scale=SCALE)
        ).abs().max() > 0.1


def test_the_condition_is_not_the_picture() -> None:
    """musubi-tuner puts the clean frame into the condition's channels and leaves noise in its place."""
    inputs = tiny_inputs()
    clean = torch.randn(2, 16, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    right = {**inputs, "noisy": torch.cat([clean, inputs["noisy"][:, :, 1:]], dim=2)}
    theirs = in_diffusers(tiny_state())
    x = inputs["noisy"].permute(0, 2, 3, 4, 1)
    condition, mask = torch.zeros_like(x), torch.zeros_like(x[..., :1])
    condition[:, :1], mask[:, :1] = clean.permute(0, 2, 3, 4, 1), 1
    count = int(inputs["text_mask"][0].sum())

    with torch.no_grad():
        ours = tiny_model()(**right, position_scale=SCALE, overrides=Overrides(num_clean_frames=1))
        mistaken = theirs(
            hidden_states=torch.cat([x, condition, mask], dim=-1)[:1],
            encoder_hidden_states=inputs["text"][:1, :count],
            timestep=inputs["timesteps"][:1],
            pooled_projections=inputs["pooled"][:1],
            visual_rope_pos=[torch.arange(3), torch.arange(2), torch.arange(3)],
            text_rope_pos=torch.arange(count),
            scale_factor=(1.0, SCALE, SCALE),
            return_dict=False,
        )

    assert (ours[:1, :, 1:] - mistaken.permute(0, 4, 1, 2, 3)[:, :, 1:]).abs().max() > 0.05


def test_the_epsilon_of_16_bits_is_another_norm() -> None:
    """In 16 bits torch's default is 7.8e-3, which the release never uses: it normalizes in float32."""
    inputs = tiny_inputs()
    mistaken = tiny_model(config=replace(CONFIG, head_eps=torch.finfo(torch.bfloat16).eps))

    with torch.no_grad():
        difference = mistaken(**inputs, position_scale=SCALE) - tiny_model()(**inputs, position_scale=SCALE)

    assert difference.abs().max() > 10 * NEAR
