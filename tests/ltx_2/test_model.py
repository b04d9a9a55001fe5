"""The LTX-2 transformer against diffusers' in float32, and what diffusers lacks by the released formulas."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from protocols.steps import Overrides
from tests.ltx_2.tiny_dit import DIT_CONFIGS, dit_in_diffusers, dit_inputs, dit_state, tiny_dit
from tests.parity.running import assert_as_exact, assert_equal

FRAMES, ROWS, COLUMNS = 3, 4, 5
TENSORS = {"noisy", "text", "audio", "audio_text"}  # that a network computes in its dtype
each_version = pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])


def in_diffusers(dit: Any, given: dict[str, Any], sample: int = 0, **changed: Any) -> tuple[Tensor, Tensor]:
    """The velocities that diffusers' network makes of the inputs of ours, as ours are shaped."""
    noisy, audio = given["noisy"], given["audio"]
    times = {"timestep": given["timesteps"], "sigma": given["timesteps"]}
    times |= {"audio_timestep": given["audio_timesteps"], "audio_sigma": given["audio_timesteps"]}
    made = dit(
        **{
            "hidden_states": noisy.flatten(2).transpose(1, 2),
            "audio_hidden_states": audio.transpose(1, 2).flatten(2),
            "encoder_hidden_states": given["text"],
            "audio_encoder_hidden_states": given["audio_text"],
            **times,
            **dict(zip(("num_frames", "height", "width"), noisy.shape[2:], strict=True)),
            "audio_num_frames": audio.shape[2],
            "fps": given["fps"],
            **changed,
        }
    )
    video = made.sample.transpose(1, 2).unflatten(2, noisy.shape[2:])
    return video, made.audio_sample.unflatten(2, audio.shape[1::2]).transpose(1, 2)


def assert_both(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor, ...], near: float = 1e-5) -> None:
    for mine, other, name in zip(ours, theirs, ("video", "sound"), strict=True):
        assert mine is not None
        assert_equal(mine, other, name, near)


@each_version
@pytest.mark.parametrize(("rope", "fps"), [("split", 24.0), ("interleaved", 12.5)])
@torch.no_grad()
def test_velocities_of_video_and_sound_equal_those_of_diffusers(version: str, rope: str, fps: float) -> None:
    given = dit_inputs(version, fps=fps)

    ours = tiny_dit(version, rotates_halves=rope == "split")(**given)

    assert_both(ours, in_diffusers(dit_in_diffusers(version, dit_state(version), rope), given))
    other = tiny_dit(version, rotates_halves=rope == "split")(**{**given, "fps": 2 * fps})
    assert (other[0] - ours[0]).abs().max() > 1e-3


@pytest.mark.slow_cases(
    "size0-1-23.976-dtype0-2.0",
    "size1-40-60.0-dtype1-2.0",
    "size2-3-8.5-dtype2-2.0",
    "size2-3-8.5-dtype2-2.3",
    "size2-3-8.5-dtype2-2.5",
    "size3-12-24.0-dtype3-2.0",
)
@each_version
@pytest.mark.parametrize(
    ("size", "moments", "fps", "dtype"),
    [
        ((1, 1, 6, 1), 1, 23.976, torch.float32),
        ((6, 3, 2, 17), 40, 60.0, torch.float32),
        ((4, 5, 3, 8), 3, 8.5, torch.bfloat16),
        ((2, 7, 1, 8), 12, 24.0, torch.float16),
    ],
)
@torch.no_grad()
def test_other_sizes_and_dtypes_give_the_velocities_of_diffusers(
    version: str, size: tuple[int, ...], moments: int, fps: float, dtype: torch.dtype
) -> None:
    """3 heads, whose channels the axes do not divide evenly, 3 blocks, 3 samples; sound of any length."""
    default = DIT_CONFIGS[version]
    assert default.audio is not None
    video, audio = (
        replace(one, dim=dim, ffn_dim=4 * dim, text_dim=one.text_dim if default.projects_text else dim)
        for one, dim in ((default.video, 42), (default.audio, 30))
    )
    sizes: dict[str, Any] = {"video": video, "audio": audio, "num_heads": 3, "num_layers": 3, "cross_dim": 30}
    config = replace(default, **sizes)
    given = dit_inputs(version, size, 3, fps, moments, config)
    theirs = dit_in_diffusers(version, dit_state(version, **sizes), config=config)
    exact = in_diffusers(theirs, given)

    ours = tiny_dit(version, **sizes).to(dtype)(**given)

    if dtype == torch.float32:
        assert_both(ours, exact)
        return
    rounded = {name: one.to(dtype) for name, one in given.items() if name in TENSORS}
    for mine, other, one in zip(ours, in_diffusers(theirs.to(dtype), given | rounded), exact, strict=True):
        assert mine is not None
        assert_as_exact(mine, other, one)


@each_version
@torch.no_grad()
def test_streams_apart_and_self_attention_by_its_values_equal_those_of_diffusers(version: str) -> None:
    given, model = dit_inputs(version), tiny_dit(version)
    theirs = dit_in_diffusers(version, dit_state(version))

    isolated = model(**given, overrides=Overrides(isolate_modalities=True))
    skipped = model(**given, overrides=Overrides(skip_self_attention=frozenset({1})))

    assert_both(isolated, in_diffusers(theirs, given, isolate_modalities=True))
    assert_both(skipped, in_diffusers(theirs, given, spatio_temporal_guidance_blocks=[1]))
    alone = tiny_dit(version, audio=None)(
        **{name: given[name] for name in ("noisy", "timesteps", "text", "fps")}
    )
    assert torch.equal(alone[0], isolated[0])
    assert alone[1] is None
    of_audio = model(None, given["timesteps"], None, **{k: given[k] for k in given if k.startswith("audio")})
    assert torch.equal(of_audio[1], isolated[1])


@torch.no_grad()
def test_given_frames_have_the_time_0_and_stay() -> None:
    """diffusers has a time for each token; its streams are apart, as it modulates them by other times."""
    given = dit_inputs("2.3")
    per_token = given["timesteps"].repeat_interleave(FRAMES).view(2, FRAMES)
    per_token[:, 0] = 0
    tokens = per_token.repeat_interleave(ROWS * COLUMNS, dim=1)

    ours = tiny_dit("2.3")(**given, overrides=Overrides(num_clean_frames=1, isolate_modalities=True))

    theirs = in_diffusers(
        dit_in_diffusers("2.3", dit_state()), given, timestep=tokens, isolate_modalities=True
    )
    theirs[0][:, :, :1] = 0
    assert_both(ours, theirs)


@torch.no_grad()
def test_each_stream_is_modulated_by_its_own_time_and_gated_by_the_others() -> None:
    """diffusers has all of one time; its layers of the gates are given the released ones."""
    given = dit_inputs("2.3") | {"audio_timesteps": torch.tensor([120.0, 860.0])}
    theirs = dit_in_diffusers("2.3", dit_state())

    ours = tiny_dit("2.3")(**given)
    assert not torch.allclose(ours[0], in_diffusers(theirs, given)[0], rtol=1e-2)

    theirs.av_cross_attn_video_a2v_gate.register_forward_pre_hook(lambda *_: (given["audio_timesteps"],))
    theirs.av_cross_attn_audio_v2a_gate.register_forward_pre_hook(lambda *_: (given["timesteps"],))
    assert_both(ours, in_diffusers(theirs, given))


@each_version
def test_a_sample_without_sound_is_as_in_a_network_without_it(version: str) -> None:
    given = dit_inputs(version)
    given["audio"].requires_grad_()
    model, alone = tiny_dit(version), tiny_dit(version, audio=None)

    video, _ = model(**given, has_audio=torch.tensor([True, False]))

    silent = alone(**{name: given[name] for name in ("noisy", "timesteps", "text", "fps")})[0]
    assert torch.equal(video[1], silent[1])
    assert not torch.allclose(video[0], silent[0], rtol=1e-2)
    (gradient,) = torch.autograd.grad(video.sum(), given["audio"])
    assert gradient[0].any()
    assert not gradient[1].any()


@torch.no_grad()
def test_samples_may_differ_in_frames_a_second() -> None:
    given, model = dit_inputs("2.3"), tiny_dit("2.3")

    together = model(**{**given, "fps": torch.tensor([24.0, 8.0])})

    for sample, fps in enumerate((24.0, 8.0)):
        alone = model(
            **{
                name: one[sample : sample + 1] if isinstance(one, Tensor) else fps
                for name, one in given.items()
            }
        )
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], other[sample], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"noisy": torch.zeros(2, 7, 3, 4, 5)}, "video tokens of width 7, but the model requires 8"),
        ({"audio": torch.zeros(2, 2, 7, 15)}, "audio tokens of width 30, but the model requires 32"),
        ({"audio_text": None}, "the text for the audio is missing"),
        ({"noisy": None, "audio": None}, "neither latents of a video nor of audio"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_dit()(**{**dit_inputs(), **changed})


def test_sound_needs_its_stream() -> None:
    with pytest.raises(ValueError, match="loaded without the stream for it"):
        tiny_dit(audio=None)(**dit_inputs())
