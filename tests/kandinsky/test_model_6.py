"""The transformer of Kandinsky 6 equals diffusers', and each mistake in it makes another velocity."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky import model_6
from kandinsky.model_6 import Kandinsky6Model, Velocities
from tests.kandinsky.making_6 import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.tiny.dit_files import frozen
from tests.tiny.kandinsky_6 import CONFIG, tiny_state, to_diffusers

NEAR = 3e-5  # float32 on the CPU, of values near 1
FAR = 5e-3  # the least that a mistake changes


def assert_near(ours: Velocities, theirs: Velocities) -> None:
    torch.testing.assert_close(ours.video, theirs.video, rtol=0, atol=NEAR)
    if theirs.audio is None:
        assert ours.audio is None
    else:
        torch.testing.assert_close(ours.audio, theirs.audio, rtol=0, atol=NEAR)


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("sound", [True, False], ids=["sound", "silent"])
def test_velocities_equal_diffusers(image: bool, sound: bool) -> None:
    inputs = tiny_inputs(image=image)
    if not sound:
        del inputs["audio"]

    with torch.no_grad():
        ours = tiny_model()(**inputs)
        theirs = predict_with(in_diffusers(tiny_state()), inputs)

    assert_near(ours, theirs)


def test_gradients_equal_diffusers() -> None:
    ours, theirs = Kandinsky6Model(CONFIG), in_diffusers(tiny_state())
    ours.load_state_dict(tiny_state())
    inputs = tiny_inputs(image=True)

    for velocities in (ours(**inputs), predict_with(theirs, inputs)):
        (velocities.video.square().mean() + 2 * velocities.audio.square().mean()).backward()

    parameters = dict(theirs.named_parameters())
    for name, parameter in to_diffusers(dict(ours.named_parameters())).items():
        grad, other = parameter.grad, parameters[name].grad
        assert grad is not None
        assert other is not None
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=3e-6, msg=name)


def test_a_silent_sample_of_a_batch_does_not_hear() -> None:
    """Its video is what the video alone gives, whatever stands in its sound; the other sample hears."""
    inputs = tiny_inputs()
    model = tiny_model()

    with torch.no_grad():
        mixed = model(**inputs, has_audio=torch.tensor([True, False])).video
        both = model(**inputs).video
        silent = model(**{name: value for name, value in inputs.items() if name != "audio"}).video

    torch.testing.assert_close(mixed[0], both[0], rtol=0, atol=NEAR)
    torch.testing.assert_close(mixed[1], silent[1], rtol=0, atol=NEAR)
    assert (both[1] - silent[1]).abs().max() > FAR


def test_silent_clips_give_modules_of_sound_no_gradient() -> None:
    model = Kandinsky6Model(CONFIG)
    inputs = tiny_inputs()
    del inputs["audio"]

    model(**inputs).video.square().mean().backward()

    only_audio = ("audio", "va_cross_attention", "av_cross_attention", "va_modulation", "av_modulation")
    for name, parameter in model.named_parameters():
        is_of_audio = any(part in name for part in only_audio)
        assert (parameter.grad is None) == (is_of_audio or "token_type" in name), name


def test_a_sample_does_not_depend_on_the_others() -> None:
    inputs = tiny_inputs(image=True)
    model = tiny_model()
    second = {name: value[1:] if isinstance(value, Tensor) else value for name, value in inputs.items()}

    with torch.no_grad():
        both, alone = model(**inputs), model(**second)

    torch.testing.assert_close(both.video[1:], alone.video, rtol=0, atol=NEAR)
    torch.testing.assert_close(both.audio[1:], alone.audio, rtol=0, atol=NEAR)


# what a reader of the release may get wrong, as settings of diffusers' network
MISTAKES: dict[str, dict[str, Any]] = {
    "sound's positions not slowed": {"audio_freqs_scaling": 1.0},
    "no positions between streams": {"ca_rope": False},
    "a factor of 1": {"scale_factor": (1.0, 1.0, 1.0)},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_setting_of_no_release_shows(name: str) -> None:
    inputs = tiny_inputs(rows=8, columns=8, image=True)

    with torch.no_grad():
        ours = tiny_model()(**inputs)
        mistaken = predict_with(in_diffusers(tiny_state(), **MISTAKES[name]), inputs)

    distance = max(float((a - b).abs().max()) for a, b in zip(ours, mistaken, strict=True))
    assert distance > FAR


def own_gates(monkeypatch: pytest.MonkeyPatch, model: Kandinsky6Model) -> None:
    """Modulation by the other stream's time, which has another width: its first values stand for it."""
    for block in model.visual_blocks:
        for layer in (block.va_modulation, block.av_modulation):
            run = layer.forward
            monkeypatch.setattr(layer, "forward", lambda time, run=run: run(time.flip(1)))


def no_token_types(monkeypatch: pytest.MonkeyPatch, model: Kandinsky6Model) -> None:
    model.visual_token_type_embeddings.weight.zero_()


def one_norm(monkeypatch: pytest.MonkeyPatch, model: Kandinsky6Model) -> None:
    layer = model.audio_outLayer
    plain = model_6.KandinskyFinalLayer.forward
    monkeypatch.setattr(layer, "forward", lambda x, tokens: plain(layer, x, tokens))


def own_place(monkeypatch: pytest.MonkeyPatch, model: Kandinsky6Model) -> None:
    """The image has a position of its own, behind the clip."""
    make = model_6.make_clip_table

    def make_longer(widths: Any, grid: Any, device: torch.device) -> Tensor:
        frames, *sides = grid.sizes
        return make(widths, grid._replace(sizes=(frames + 1, *sides), ends_with_image=False), device)

    monkeypatch.setattr(model_6, "make_clip_table", make_longer)


def no_mask(monkeypatch: pytest.MonkeyPatch, model: Kandinsky6Model) -> None:
    weight = model.visual_embeddings["in_layer"].weight
    weight.unflatten(1, (4, CONFIG.in_channels))[..., -1].zero_()


PLANTED: dict[str, Callable[[pytest.MonkeyPatch, Kandinsky6Model], None]] = {
    "modulation by another time": own_gates,
    "no token types": no_token_types,
    "the sound normalized once": one_norm,
    "a place of its own in time": own_place,
    "no mask": no_mask,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_inputs(image=True)
    model = tiny_model()

    with torch.no_grad():
        theirs = predict_with(in_diffusers(tiny_state()), inputs)
        PLANTED[name](monkeypatch, model)
        ours = model(**inputs)

    distance = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert distance > FAR


def test_heads_of_16_bits_are_normalized_with_torchs_epsilon() -> None:
    """The release has none of its own: torch computes in float32 and takes the epsilon of that."""
    state = tiny_state(dtype=torch.bfloat16)
    ours = frozen(Kandinsky6Model(CONFIG).to(torch.bfloat16), state)
    heads = 0.05 * torch.randn(1, 3, 2, CONFIG.video.head_width).bfloat16()
    norm = ours.visual_blocks[0].videoT.self_attention.query_norm

    expected = torch.nn.functional.rms_norm(heads, norm.weight.shape, norm.weight)

    assert torch.equal(norm(heads), expected)


def test_an_image_needs_token_types() -> None:
    config = model_6.Kandinsky6Config(**{**vars(CONFIG), "num_token_types": 0})
    model = frozen(Kandinsky6Model(config), tiny_state(num_token_types=0))

    with pytest.raises(ValueError, match="no types of tokens"):
        model(**tiny_inputs(image=True))
