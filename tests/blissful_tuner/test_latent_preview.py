"""TAEHV and latents as colors. Latent previews: what is shown, when, and that nothing depends on them."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blissful_tuner.latent_preview import LatentPreviews, LatestWriter, make_previews, preview_clip
from blissful_tuner.options import PreviewOptions
from blissful_tuner.taehv import TinyDecoder, TinyVae, check_taehv, enlarge, load_taehv, project
from modules.errors import CheckpointError
from modules.media.reading import read_image, video_info
from protocols.data import LatentSpec
from protocols.steps import CompletedStep, PreviewPiece, Section, Step
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.taehv import write_taehv
from wan.spec import LATENT, LATENT_5B

CPU = torch.device("cpu")


def previews_in(folder: Path, every: int = 1, **more: object) -> LatentPreviews:
    return LatentPreviews(every, folder, LATENT, CPU, lambda _: True, **more)  # type: ignore[arg-type]


def draw(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 16, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def step(index: int, num_steps: int, frames: int = 1, section: Section | None = None) -> CompletedStep:
    noisy, velocity = draw(frames, index), draw(frames, 100 + index)
    section = section or Section(noisy, {})
    return CompletedStep(Step(index, num_steps, 0.7, 700.0, noisy), velocity, section)


def colors_of(latents: Tensor) -> list[np.ndarray]:
    return list(enlarge(project(latents[0], LATENT), 8, 8))


@dataclass
class Shown(LatentPreviews):
    """Notes what would be written, instead of writing it."""

    seen: list[np.ndarray] = field(default_factory=list)

    def take(self, latents: Tensor, fps: float) -> None:
        self.seen.append(latents)


def shown(every: int, steps: Sequence[CompletedStep]) -> list[Tensor]:
    """What is shown of these steps, one clip after the other so that none replaces another."""
    previews = Shown(every, Path(), LATENT, torch.device("meta"), lambda _: True)
    with preview_clip(previews, 16.0) as ((watch,), on_section):
        assert [watch(done) for done in steps] == [False] * len(steps)
    return previews.seen


def test_the_clean_clip_is_shown_and_not_the_noisy_one(tmp_path: Path) -> None:
    done = step(0, 4)
    with preview_clip(previews_in(tmp_path), 16.0) as ((watch,), on_section):
        watch(done)

    image = read_image(tmp_path / "latent_preview.png")
    clean = done.step.noisy - 0.7 * done.velocity
    assert np.array_equal(image, colors_of(clean)[0])
    assert not np.array_equal(image, colors_of(done.step.noisy)[0])


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4]), (6, [])])
def test_previews_come_after_every_nth_step_but_not_after_the_last(every: int, expected: list[int]) -> None:
    steps = [step(index, 6) for index in range(6)]
    found = shown(every, steps)
    assert len(found) == len(expected)
    assert all(torch.equal(one, steps[index].clean) for one, index in zip(found, expected, strict=True))


def test_a_tiny_vae_shows_every_frame_at_the_rate_of_the_video(tmp_path: Path) -> None:
    path = write_taehv(tmp_path / "taehv.pth")
    previews = make_previews(
        PreviewOptions(preview_latent_every=1, preview_vae=path), LATENT, tmp_path, CPU, lambda _: True
    )
    assert previews is not None
    with preview_clip(previews, 24.0) as ((watch,), on_section):
        watch(step(0, 2, frames=3))

    info = video_info(tmp_path / "latent_preview.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (48, 32, 9, 24.0)


@pytest.mark.parametrize("in_front", [True, False])
def test_of_a_video_in_sections_the_finished_ones_are_shown(tmp_path: Path, in_front: bool) -> None:
    previews = Shown(2, tmp_path, LATENT, torch.device("meta"), lambda _: True)
    so_far = [draw(frames) for frames in (3, 6, 9, 12)]
    pieces = [None, *(PreviewPiece(one, 0, in_front, lambda *_: iter(()), one) for one in so_far)]
    with preview_clip(previews, 30.0) as ((watch,), on_section):
        for piece in pieces:
            section = Section(draw(3), {}, previous_piece=piece, count=5)
            on_section(section)
            for index in range(3):
                watch(step(index, 3, section=section))
    assert [one.shape[2] for one in previews.seen] == [6, 12]
    assert torch.equal(previews.seen[0], so_far[1])


def test_an_error_is_one_warning_and_a_file_that_cannot_be_written_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "latent_preview.png"
    (in_the_way / "x").mkdir(parents=True)
    previews = previews_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            with preview_clip(previews, 16.0) as ((watch,), on_section):
                watch(step(index, 4))
    assert caplog.text.count("A latent preview has failed: OutputError") == 1
    assert "the generation continues" in caplog.text

    (in_the_way / "x").rmdir()
    in_the_way.rmdir()
    with preview_clip(previews, 16.0) as ((watch,), on_section):
        watch(step(0, 4))
    assert in_the_way.is_file()


SOON = 30.0  # seconds that a test would wait for what should happen at once


def test_a_newer_item_replaces_one_that_waits() -> None:
    written: list[int] = []
    began, may_go_on = threading.Event(), threading.Event()

    def write(item: int) -> None:
        written.append(item)
        began.set()
        assert may_go_on.wait(SOON)

    writer = LatestWriter(write)
    writer.put(1)
    assert began.wait(SOON)
    for item in (2, 3, 4):  # returns though the first is still being written
        writer.put(item)
    may_go_on.set()
    writer.close()

    assert written == [1, 4]


IMAGES = LatentSpec(channels=16, stride=(1, 8, 8), pixel_step=16, frame_step=1)


def decode(vae: TinyVae, latents: Tensor) -> Tensor:
    """latents: F C h w. Returns F 3 H W."""
    decoder = TinyDecoder(vae.config)
    decoder.load_state_dict(vae.weights)
    with torch.no_grad():
        return torch.cat(list(decoder.decode(latents.transpose(0, 1))))


def test_decoding_equals_the_recorded_one(tmp_path: Path) -> None:
    case, tensors = read_case("taehv")
    path = tmp_path / "taehv.safetensors"
    save_file(make_weights(case["weights_model_key"], case["weights"]), path)

    vae, still = load_taehv(path, LATENT, CPU), load_taehv(path, IMAGES, CPU)

    latents = tensors["latent"][0]
    tolerance = {"rtol": 0, "atol": 1e-4}  # float32; differences are below 1e-6
    torch.testing.assert_close(decode(vae, latents), tensors["decoded"][0], **tolerance)
    torch.testing.assert_close(decode(vae, latents[:1]), tensors["decoded_one"][0], **tolerance)
    torch.testing.assert_close(decode(still, latents), tensors["decoded_no_time_growth"][0], **tolerance)


@pytest.mark.parametrize(
    ("manifest", "spec"),
    [
        ("taehv", LATENT),
        ("taehv1.5", LatentSpec(channels=32, stride=(4, 16, 16), pixel_step=16, frame_step=4)),
        ("taew2.2", LATENT_5B),
    ],
)
def test_published_files_fit_the_latents_that_they_are_for(
    tmp_path: Path, manifest: str, spec: LatentSpec
) -> None:
    path = write_hollow(tmp_path / "t.safetensors", tensor_list(manifest))

    assert check_taehv(path, spec).widths == (256, 128, 64, 64)

    other = replace(spec, channels=spec.channels + 1)
    with pytest.raises(CheckpointError, match=rf"is for other latents: it decodes {spec.channels} channels"):
        check_taehv(path, other)


TWO = LatentSpec(
    channels=2,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=((1.0, 0.0, -1.0), (0.5, 2.0, 0.0)),
    preview_bias=(0.25, 0.0, 1.0),
)


def test_each_place_is_mapped_to_a_colour_of_its_own() -> None:
    latents = torch.tensor([[[[3.0, -1.0]]], [[[2.0, 4.0]]]])  # 2 1 1 2

    colors = project(latents, TWO)

    expected = torch.tensor([[[[4.25, 1.25]]], [[[4.0, 8.0]]], [[[-2.0, 2.0]]]])
    torch.testing.assert_close(colors, expected, rtol=0, atol=1e-6)


def test_the_whole_range_is_used_once_over_the_clip_not_in_each_frame() -> None:
    colors = torch.zeros(3, 2, 4, 4)
    colors[:, 0, :2] = -3.0
    colors[:, 1, 2:] = 5.0

    dark, light = enlarge(colors, 8, 8)

    assert dark.shape == light.shape == (32, 32, 3)
    assert dark.dtype == np.uint8
    assert (dark.min(), light.max()) == (0, 255)
    assert 90 <= dark.max() <= 110  # zero is 3/8 of the range; bicubic goes a little beyond
    assert 70 <= light.min() <= 96
