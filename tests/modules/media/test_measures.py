"""Measures of pictures and clips: what they say of made ones, which copies hashes find, where scenes end."""

import io
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from modules.media.encoding import Pixels
from modules.media.measures import (
    BLURRED,
    NEAR,
    clip_hash,
    is_black,
    is_flat,
    is_static,
    perceptual_hash,
    scene_distance,
    sharpness,
    thumbnail,
)
from modules.media.pixels import cross_fade
from modules.media.reading import Frame
from tests.pictures import picture


def hash_distance(first: Sequence[int], second: Sequence[int]) -> float:
    """In how many bits of 63 the hashes of two pictures or clips differ, the mean over their frames."""
    return sum((one ^ other).bit_count() for one, other in zip(first, second, strict=True)) / len(first)


def is_blurred(frame: Frame) -> bool:
    return not is_flat(frame) and sharpness(frame) < BLURRED


def recompressed(frame: Frame) -> Frame:
    data = io.BytesIO()
    Image.fromarray(frame).save(data, format="JPEG", quality=30)
    return np.asarray(Image.open(data))


def rescaled(frame: Frame, size: tuple[int, int]) -> Frame:
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)


COPIES = {
    "reduced": lambda frame: rescaled(frame, (160, 120)),
    "stretched": lambda frame: rescaled(frame, (300, 300)),
    "recompressed": recompressed,
    "brighter": lambda frame: frame + 25,
    "darker": lambda frame: (frame * 0.7).astype(np.uint8),
}
OTHERS = {
    "mirrored": lambda frame: np.ascontiguousarray(frame[:, ::-1]),
    "upside down": lambda frame: np.ascontiguousarray(frame[::-1]),
    "turned": lambda frame: np.ascontiguousarray(np.rot90(frame)),
    "inverted": lambda frame: 255 - frame,
}


@pytest.mark.parametrize("change", COPIES)
def test_copies_of_a_picture_have_near_hashes(change: str) -> None:
    for seed in range(5):
        frame = picture(seed)
        assert hash_distance([perceptual_hash(frame)], [perceptual_hash(COPIES[change](frame))]) <= NEAR


@pytest.mark.parametrize("change", OTHERS)
def test_a_turned_or_inverted_picture_is_another_one(change: str) -> None:
    for seed in range(5):
        frame = picture(seed)
        assert hash_distance([perceptual_hash(frame)], [perceptual_hash(OTHERS[change](frame))]) > 2 * NEAR


def test_stripes_of_one_direction_have_a_hash_of_their_own() -> None:
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:, :24] = 200

    assert perceptual_hash(upright) != perceptual_hash(np.ascontiguousarray(upright.transpose(1, 0, 2)))


def test_flat_frames_have_no_hash_and_are_neither_sharp_nor_blurred() -> None:
    flat = np.full((40, 60, 3), 90, np.uint8)
    assert (perceptual_hash(flat), sharpness(flat)) == (0, 0.0)
    assert is_flat(flat)
    assert not is_blurred(flat)


def test_a_clip_is_near_its_copy_at_another_rate_and_far_from_its_reverse() -> None:
    shares = np.linspace(0, 1, 21)
    frames = [(picture(1) * (1 - fraction) + picture(2) * fraction).astype(np.uint8) for fraction in shares]
    copy = [recompressed(frame) for frame in frames[::2]]

    assert len(clip_hash(frames)) == 4
    assert hash_distance(clip_hash(frames), clip_hash(copy)) <= NEAR
    assert hash_distance(clip_hash(frames), clip_hash(frames[::-1])) > 2 * NEAR
    assert clip_hash(frames[:1]) == (perceptual_hash(frames[0]),)


def test_black_allows_some_light_and_noise() -> None:
    frame = np.random.default_rng(0).integers(0, 20, (100, 100, 3)).astype(np.uint8)
    assert is_black(frame)
    frame[:10, :15] = 255  # 1.5 %
    assert is_black(frame)
    frame[:10, :40] = 255
    assert (is_black(frame), is_black(frame, fraction=0.9)) == (False, True)
    gray = np.full((10, 10, 3), 40, np.uint8)
    assert (is_black(gray), is_black(gray, threshold=0.2)) == (False, True)


def test_noise_and_compression_are_no_motion_but_a_small_part_that_moves_is() -> None:
    generator = np.random.default_rng(0)
    still = picture(3)
    noisy = [np.clip(still + generator.normal(0, 4, still.shape), 0, 255).astype(np.uint8) for _ in range(6)]
    assert is_static(noisy)
    assert is_static([still, recompressed(still)])
    talking = [frame.copy() for frame in noisy]
    talking[3][120:140, 150:190] += 40  # a mouth: 1 % of the picture
    assert not is_static(talking)


def test_slow_motion_counts_although_neighbours_hardly_differ() -> None:
    wide = picture(4, (400, 240))
    slow = [np.ascontiguousarray(wide[:, i : i + 320]) for i in range(24)]
    assert not is_static(slow)
    assert is_static(slow[:1])


@pytest.mark.parametrize("seed", range(3))
def test_a_blurred_picture_is_told_from_a_sharp_one_at_any_size_and_brightness(seed: int) -> None:
    frame = picture(seed, (1024, 768))
    blurred = cv2.GaussianBlur(frame, (0, 0), 8).astype(np.uint8)

    assert not is_blurred(frame)
    assert is_blurred(blurred)
    for change in (COPIES["darker"], COPIES["brighter"], lambda one: rescaled(one, (640, 480))):
        assert not is_blurred(change(frame))
        assert is_blurred(change(blurred))
    assert sharpness(COPIES["darker"](frame)) == pytest.approx(sharpness(frame), rel=0.1)
    assert sharpness(rescaled(frame, (512, 384))) == pytest.approx(sharpness(frame), rel=0.01)


def test_a_sharp_face_before_a_soft_background_is_sharp() -> None:
    frame = picture(5, (512, 512))
    portrait = cv2.GaussianBlur(frame, (0, 0), 8).astype(np.uint8)
    portrait[150:350, 150:350] = frame[150:350, 150:350]
    assert not is_blurred(portrait)


THRESHOLD = 0.25  # the default
HEIGHT, WIDTH = 180, 320


def scene(seed: int, width: int = 3 * WIDTH) -> NDArray[np.float32]:
    """A wide landscape of soft random shapes in the colors of a random palette, 0..1."""
    random = np.random.default_rng(seed)
    layers = []
    for cells in (3, 6, 12, 40):
        small = random.random((cells, cells * width // HEIGHT, 1)).astype(np.float32)
        layers.append(cv2.resize(small, (width, HEIGHT), interpolation=cv2.INTER_CUBIC) * cells**-0.5)
    shade = np.sum(layers, axis=0)
    shade = (shade - shade.min()) / (shade.max() - shade.min())
    dark, light = np.sort(random.random((2, 3)), axis=0)
    return (dark + (light - dark) * shade[..., None]).astype(np.float32)


def shown(picture: NDArray[np.float32], left: int = WIDTH) -> Pixels:
    pixels: Pixels = (picture[:, left : left + WIDTH].clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def distance(first: Pixels, second: Pixels) -> float:
    return scene_distance(thumbnail(first), thumbnail(second))


def test_cuts_are_found() -> None:
    found = [distance(shown(scene(2 * seed)), shown(scene(2 * seed + 1))) for seed in range(20)]
    assert sum(each >= THRESHOLD for each in found) >= 19
    assert np.median(found) > 1.5 * THRESHOLD


def pan(seed: int, step: int) -> list[Pixels]:
    return [shown(scene(seed)), shown(scene(seed), WIDTH + step)]


def flash(seed: int, gain: float) -> list[Pixels]:
    default = shown(scene(seed))
    return [default, shown(gain * scene(seed) + 0.1), default]


def thing_that_moves_fast(seed: int) -> list[Pixels]:
    first, second = scene(seed), scene(seed)
    thing = scene(seed + 100)[:120, :120]
    first[30:150, WIDTH + 20 : WIDTH + 140] = thing
    second[30:150, WIDTH + 120 : WIDTH + 240] = thing
    return [shown(first), shown(second)]


def fade(seed: int, to_black: bool) -> list[Pixels]:
    first = scene(seed)
    last = np.zeros_like(first) if to_black else scene(seed + 50)
    return [shown(first + (last - first) * fraction) for fraction in np.linspace(0, 1, 13)]


def noise(seed: int) -> list[Pixels]:
    random = np.random.default_rng(seed)
    dark = 0.02 * scene(seed)
    return [shown(dark + 0.02 * random.standard_normal(dark.shape).astype(np.float32)) for _ in range(2)]


NO_CUTS = {
    "pan": lambda seed: pan(seed, 16),
    "pan by a sixth of the width": lambda seed: pan(seed, 56),
    "flash": lambda seed: flash(seed, 1.5),
    "bright flash": lambda seed: flash(seed, 2.0),
    "a large thing that moves fast": thing_that_moves_fast,
    "fade to black": lambda seed: fade(seed, to_black=True),
    "fade between scenes": lambda seed: fade(seed, to_black=False),
    "noise": noise,
    "grey": lambda seed: [np.full((9, 300, 3), 90 + step, np.uint8) for step in (0, 4)],
}


@pytest.mark.parametrize("kind", NO_CUTS)
def test_what_is_no_cut_is_not_taken_for_one(kind: str) -> None:
    for seed in range(4):
        images = NO_CUTS[kind](seed)
        assert max(map(distance, images, images[1:])) < THRESHOLD
        assert distance(images[0], images[0]) == 0


def test_the_measure_takes_16_bits_and_narrow_pictures() -> None:
    first, second = shown(scene(1)), shown(scene(2))
    deep = [pixels.astype(np.uint16) * 257 for pixels in (first, second)]
    assert distance(*deep) == distance(first, second)
    assert distance(first[:, :1], second[:, :1]) >= 0


def test_a_fade_begins_with_the_earlier_clip_and_ends_with_the_later_one() -> None:
    earlier, later = torch.zeros(1, 3, 5, 2, 2), torch.ones(1, 3, 5, 2, 2)
    assert cross_fade(earlier, later)[0, 0, :, 0, 0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fade_is_computed_in_float32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    earlier = torch.full((1, 1, 4, 1, 1), 1.0, dtype=dtype)

    faded = cross_fade(earlier, 3 * earlier)

    assert torch.equal(faded.flatten(), torch.tensor([1.0, 5 / 3, 7 / 3, 3.0]).to(dtype))
