"""Images of a request as what its sections are given."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from encoders.tiles import posterior_generator
from frame_pack.inputs import one_frame_inputs, video_inputs
from frame_pack.requests import FramePackRequest
from hunyuan_model.spec import LATENT as VAE_LATENT
from modules.contract.data import MediaEncoders
from modules.contract.requests import Prepared, Request
from modules.media.writing import write_png
from tests.preparing import prepare

WIDTH, HEIGHT = 48, 32


class Vae:
    """The mean of every 8 x 8 pixels in all channels, and the first number of the posterior's generator on
    top.
    """

    def __init__(self) -> None:
        self.count = 0

    def encode(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        self.count += 1
        (generator,) = generators
        assert pixels.shape == (1, 3, 1, HEIGHT, WIDTH)
        means = torch.nn.functional.avg_pool3d(pixels.mean(1, keepdim=True), (1, 8, 8))
        return means.repeat(1, 16, 1, 1, 1) + torch.randn((), generator=generator)


class Siglip:
    """What an image looks like on average."""

    def __init__(self) -> None:
        self.seen: Counter[float] = Counter()

    def encode(self, pixels: Tensor) -> Tensor:
        assert pixels.shape == (1, 3, HEIGHT, WIDTH)
        mean = float(pixels.mean())
        self.seen[round(mean, 4)] += 1
        return torch.full((1, 4, 2), mean)


def encoders() -> MediaEncoders:
    return MediaEncoders(Vae(), Siglip())


def grey(path: Path, value: int, width: int = WIDTH, height: int = HEIGHT) -> Path:
    write_png(path, numpy.full((height, width, 3), value, dtype=numpy.uint8))
    return path


def request(*images: Path, seed: int = 3, end: Path | None = None, **own: tuple[Path, ...]) -> Prepared:
    """images: the start image of each section."""
    asked = Request("a cat", seed, WIDTH, HEIGHT, 37, end_image_path=end)
    return replace(prepare(asked), own=FramePackRequest(images, **own))


def expected(value: int, seed: int = 3) -> float:
    return (
        value / 127.5 - 1 + float(torch.randn((), generator=posterior_generator(seed)))
    ) * VAE_LATENT.scale


def test_each_file_is_encoded_once_and_sections_share_it(tmp_path: Path) -> None:
    first, second = grey(tmp_path / "a.png", 10), grey(tmp_path / "b.png", 200)
    given = encoders()

    inputs = video_inputs(given, request(first, first, first, second, end=second))

    assert given.vae.count == 2
    assert list(given.image_encoder.seen.values()) == [1, 1]
    assert inputs.keys() == {0, 1, 2, 3}
    assert [float(inputs[index]["start_latents"].mean()) for index in range(4)] == pytest.approx(
        [expected(10)] * 3 + [expected(200)], abs=1e-5
    )
    assert inputs[1]["start_latents"] is inputs[0]["start_latents"]
    assert float(inputs[3]["image_embeddings"].mean()) == pytest.approx(200 / 127.5 - 1, abs=1e-5)
    assert float(inputs[0]["end_latents"].mean()) == pytest.approx(expected(200), abs=1e-5)
    assert all("end_latents" not in inputs[index] for index in (1, 2, 3))


def test_the_latents_of_a_file_depend_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    first, second = grey(tmp_path / "a.png", 10), grey(tmp_path / "b.png", 200)
    alone = video_inputs(encoders(), request(second))
    after = video_inputs(encoders(), request(first, second))
    other = video_inputs(encoders(), request(second, seed=4))
    assert torch.equal(alone[0]["start_latents"], after[1]["start_latents"])  # type: ignore[arg-type]
    assert not torch.equal(alone[0]["start_latents"], other[0]["start_latents"])  # type: ignore[arg-type]


def test_images_cover_the_size_and_are_cropped(tmp_path: Path) -> None:
    wide = numpy.zeros((HEIGHT, 2 * WIDTH, 3), dtype=numpy.uint8)
    wide[:, WIDTH // 2 : -WIDTH // 2] = 255
    write_png(tmp_path / "wide.png", wide)
    inputs = video_inputs(encoders(), request(tmp_path / "wide.png"))
    assert float(inputs[0]["image_embeddings"].mean()) == 1.0


# one picture


def test_controls_stand_one_after_the_other(tmp_path: Path) -> None:
    start, first, second = (grey(tmp_path / f"{value}.png", value) for value in (50, 100, 200))
    given = encoders()

    inputs = one_frame_inputs(given, request(start, controls=(first, second, first)))

    assert inputs.keys() == {0}
    controls = inputs[0]["control_latents"]
    assert isinstance(controls, Tensor)
    assert controls.shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
    assert controls.mean((0, 1, 3, 4)).tolist() == pytest.approx(
        [expected(100), expected(200), expected(100)], abs=1e-5
    )
    assert given.vae.count == 2  # the start image is seen by the image encoder alone
    assert float(inputs[0]["image_embeddings"].mean()) == pytest.approx(50 / 127.5 - 1, abs=1e-5)


@pytest.mark.parametrize(("mask", "left"), [(0, 0.0), (255, 1.0), (51, 0.2)])
def test_a_mask_multiplies_its_control(tmp_path: Path, mask: int, left: float) -> None:
    """Black removes it."""
    start, control = grey(tmp_path / "start.png", 50), grey(tmp_path / "control.png", 200)
    grey(tmp_path / "mask.png", mask, 480, 320)

    inputs = one_frame_inputs(
        encoders(),
        request(start, controls=(control, control), masks=(tmp_path / "mask.png",)),
    )

    controls = inputs[0]["control_latents"]
    assert isinstance(controls, Tensor)
    assert controls.mean((0, 1, 3, 4)).tolist() == pytest.approx(
        [left * expected(200), expected(200)], abs=1e-5
    )


def test_without_a_mask_the_alpha_channel_is_one(tmp_path: Path) -> None:
    start = grey(tmp_path / "start.png", 50)
    half = numpy.full((HEIGHT, WIDTH, 4), 200, dtype=numpy.uint8)
    half[:, :, 3] = 0
    half[:, : WIDTH // 2, 3] = 255
    write_png(tmp_path / "half.png", half)

    inputs = one_frame_inputs(encoders(), request(start, controls=(tmp_path / "half.png",)))

    controls = inputs[0]["control_latents"]
    assert isinstance(controls, Tensor)
    left, right = controls[..., :2], controls[..., -2:]  # the two columns between are touched by the filter
    torch.testing.assert_close(left, torch.full_like(left, expected(200)), atol=2e-2, rtol=0)
    torch.testing.assert_close(right, torch.zeros_like(right), atol=2e-2, rtol=0)
