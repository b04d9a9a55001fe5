"""Latents of keyframes and references, their noise and their places, against diffusers."""

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition
from torch import Tensor

from minimax_h3.conditions import (
    CONTROL_INDICES,
    FIRST,
    LAST,
    TARGET_INDEX,
    add_noise_to_conditions,
    control_key,
    encode_condition,
    position_conditions,
    reference_key,
    sort_condition_keys,
)
from minimax_h3.positions import TIME_PER_FRAME, AudioPosition, ImageGrid, ImagePosition
from minimax_h3.presentation import AUDIO, IMAGE, VIDEO
from minimax_h3.reference_sound import read_reference_audio, resample
from minimax_h3.video_vae import PIXEL_MEAN, PIXEL_STD
from tests.minimax_h3.test_video_vae import single_file, their_vae

HALF_STEP = 2e-3  # of float16 up to 4: a sum in another order may round to the next number
GRID = ImageGrid(7, 3, 4)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pixels(frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (1, 3, frames, 16, 24), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("frames", [1, 22])
def test_conditions_are_encoded_as_by_diffusers(tmp_path: Path, frames: int) -> None:
    shown = pixels(frames)
    expected = encode_vae_condition(their_vae(), shown, PIXEL_MEAN, PIXEL_STD)

    found = encode_condition(single_file(tmp_path, tile=256), shown)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=HALF_STEP, rtol=0)
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.01


def test_latents_are_rounded_to_float16(tmp_path: Path) -> None:
    """Before they are normalized."""
    vae = single_file(tmp_path, tile=256)
    raw = vae.denormalize(encode_condition(vae, pixels(1)))
    rounded = raw.to(torch.float16).float()
    torch.testing.assert_close(raw, rounded, atol=1e-6, rtol=1e-6)


class Drawn:
    """Noise that shows in which order it was drawn."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        self.shapes.append(tuple(shape))
        return torch.full(tuple(shape), float(len(self.shapes)), dtype=dtype)


def test_pictures_and_clips_are_noised_in_order_and_sound_is_not() -> None:
    audio, clip, image = random(1, 32, 2, 5), random(1, 24, 2, 4, 4), random(1, 24, 1, 4, 6)
    conditions = {
        reference_key(1, VIDEO): clip,
        reference_key(1, AUDIO): audio,
        reference_key(0, IMAGE): image,
    }
    noise = Drawn()

    noised = add_noise_to_conditions(conditions, noise)

    assert [*noised] == [reference_key(0, IMAGE), reference_key(1, AUDIO), reference_key(1, VIDEO)]
    assert noise.shapes == [tuple(image.shape), tuple(clip.shape)]
    for number, (key, latents) in enumerate(
        [(reference_key(0, IMAGE), image), (reference_key(1, VIDEO), clip)]
    ):
        drawn = torch.full_like(latents, number + 1.0)
        assert torch.equal(noised[key], MiniMaxH3Scheduler(12.0).scale_noise(latents, 0.999, drawn))
    assert torch.equal(noised[reference_key(1, AUDIO)], audio)


def test_order_is_by_number() -> None:
    keys = ["mmh3_hidden_states", *(reference_key(number, IMAGE) for number in (10, 2, 0)), LAST, FIRST]
    expected = [FIRST, LAST, *(reference_key(number, IMAGE) for number in (0, 2, 10))]
    assert sort_condition_keys(keys) == expected


def test_keyframes_stand_at_first_and_last_frame() -> None:
    frames = {key: random(1, 24, 1, 6, 8) for key in (LAST, FIRST)}

    placement = position_conditions(frames, 0, num_text=11, target=GRID)

    spans = 1 + 4 * 4 + 1 + 4  # of seven latent frames
    places = [condition.position for condition in placement.conditions]
    one = ImageGrid(1, 3, 4)
    assert places == [ImagePosition(one, 11.0), ImagePosition(one, pytest.approx(11 + (spans - 1) * 5 / 3))]
    assert placement.start_time == 11


def test_references_follow_one_another() -> None:
    """As `test_model` compares with diffusers; a clip without sound takes its frames' time."""
    conditions = {
        reference_key(0, IMAGE): random(1, 24, 1, 4, 6),
        reference_key(1, AUDIO): random(1, 32, 2, 5),
        reference_key(2, AUDIO): random(1, 32, 2, 12),
        reference_key(2, VIDEO): random(1, 24, 2, 6, 6),
        reference_key(3, VIDEO): random(1, 24, 2, 6, 6),
    }

    placement = position_conditions(conditions, 0, num_text=11, target=GRID)

    own = ImageGrid(2, 3, 3)
    assert [condition.position for condition in placement.conditions] == [
        ImagePosition(ImageGrid(1, 2, 3), 11.0),
        AudioPosition(5, 12.0, GRID),
        AudioPosition(12, 17.0, own),
        ImagePosition(own, 17.0),
        ImagePosition(own, 29.0),
    ]
    assert placement.start_time == pytest.approx(29 + 5 * 5 / 3)


def test_a_single_picture_stands_where_its_index_says() -> None:
    conditions = {
        **{control_key(number): random(1, 24, 1, 6, 8) for number in range(2)},
        CONTROL_INDICES: torch.tensor([[0, 10]]),
        TARGET_INDEX: torch.tensor([4]),
    }

    placement = position_conditions(conditions, 0, num_text=11, target=ImageGrid(1, 3, 4))

    starts = [condition.position.start_time for condition in placement.conditions]
    assert starts == [11, 11 + 10 * TIME_PER_FRAME]
    assert placement.start_time == 11 + 4 * TIME_PER_FRAME


def test_sound_is_resampled_by_a_windowed_sinc() -> None:
    """A tone keeps its pitch and loudness; no sample is moved. Compared with the tone at the new rate."""
    times = [
        torch.arange(count, dtype=torch.float64) / rate for rate, count in ((44100, 4410), (32000, 3200))
    ]
    old, new = (torch.sin(2 * torch.pi * 1000 * time).float().expand(2, -1) for time in times)

    made = resample(old, 44100, 32000)

    assert made.shape == (2, 3200)
    torch.testing.assert_close(made[:, 50:-50], new[:, 50:-50], atol=2e-3, rtol=0)
    assert torch.equal(resample(old, 44100, 44100), old)


def test_sound_of_a_reference_is_cut_at_its_own_rate_and_doubled(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    samples = numpy.random.default_rng(1).integers(-9000, 9000, 48001).astype("<i2")
    with wave.open(str(path), "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(48000)
        opened.writeframes(samples.tobytes())
    full = torch.from_numpy(samples.astype("float32") / 2**15)

    made = read_reference_audio(path, 0.5)

    assert made.shape == (1, 2, 16000)
    assert torch.equal(made[0, 0], made[0, 1])
    torch.testing.assert_close(made[0, :1], resample(full[None, :24000], 48000, 32000), atol=1e-6, rtol=0)
    assert read_reference_audio(path, 9).shape == (1, 2, 32001)
