"""Latent previews through the generation scripts: all families and modes, and the same latents with them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fpack_generate_video
import hv_generate_video
import wan_generate_video
from frame_pack.generating import video_sections
from frame_pack.sections import ANTI_DRIFTING, F1, Order
from generation.run import generate
from modules.contract.data import LatentSpec
from modules.contract.steps import EncodedPrompts
from modules.errors import CheckpointError, OptionError
from modules.media.reading import video_info
from tests.generation.guided import latents_in
from tests.generation.test_run import options
from tests.generation.toy_family import ToyFamily
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.project import write_image
from tests.tiny.taehv import write_taehv
from tests.tiny.wan import write_tiny_wan

MP4, PNG = "latent_preview.mp4", "latent_preview.png"
COLOURED = LatentSpec(
    channels=2,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=((1.0, 0.5, 0.0), (0.0, 0.5, 1.0)),
)


@dataclass(frozen=True)
class Script:
    """A family's script with tiny models."""

    name: str
    main: Callable[[Sequence[str]], None]
    words: tuple[str, ...]

    def run(self, folder: Path, *more: object) -> torch.Tensor:
        """Return the latents of seed 3."""
        self.main(["--save_path", str(folder), "--device", "cpu", *self.words, *map(str, more)])
        return latents_in(folder)[3]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Script]:
    folder = tmp_path_factory.mktemp("models")
    parts = {name: folder / name for name in ("wan", "hunyuan", "framepack")}
    for part in parts.values():
        part.mkdir()
    write_image(folder / "start.png", 48, 32)
    size = ("--video_size", "32", "48")
    video = (*size, "--video_length", "5", "--infer_steps", "4")
    wan = ("--task", "t2v-1.3B", *write_tiny_wan(parts["wan"]).models, *video)
    image = ("--image_path", str(folder / "start.png"), "--video_sections", "3", "--infer_steps", "2")
    framepack = (*write_tiny_framepack(parts["framepack"]).models, *size, *image)
    hunyuan = (*write_tiny_hunyuan(parts["hunyuan"]).models, *video)
    found = [
        Script("wan", wan_generate_video.main, wan),
        Script("hunyuan", hv_generate_video.main, hunyuan),
        Script("framepack", fpack_generate_video.main, framepack),
    ]
    return {script.name: script for script in found}


@pytest.fixture(scope="module")
def taehv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_taehv(tmp_path_factory.mktemp("taehv") / "taehv.safetensors")


SHAPES = {  # frames and rate of the preview by colours, frames and rate by TAEHV
    "wan": (2, 4.0, 5, 16.0),
    "hunyuan": (2, 6.0, 5, 24.0),
    "framepack": (18, 7.5, 69, 30.0),
}


@pytest.mark.parametrize("family", SHAPES)
def test_latents_are_the_same_bits_with_previews_in_every_family(
    tmp_path: Path, scripts: dict[str, Script], taehv: Path, family: str
) -> None:
    script, say = scripts[family], ("--prompt", "a cat", "--seed", 3, "--output_type", "latent")
    frames, rate, all_frames, full_rate = SHAPES[family]

    plain = script.run(tmp_path / "plain", *say)
    coloured = script.run(tmp_path / "coloured", *say, "--preview_latent_every", 1)
    decoded = script.run(tmp_path / "decoded", *say, "--preview_latent_every", 1, "--preview_vae", taehv)

    assert torch.equal(plain, coloured)
    assert torch.equal(plain, decoded)
    assert not list((tmp_path / "plain").glob("latent_preview*"))
    for folder, expected in (("coloured", (frames, rate)), ("decoded", (all_frames, full_rate))):
        info = video_info(tmp_path / folder / MP4)
        assert (info.width, info.height) == (48, 32)
        assert (info.frames, info.fps) == expected


@pytest.mark.parametrize("order", [ANTI_DRIFTING, F1], ids=["anti-drifting", "f1"])
def test_what_is_shown_of_sections_is_the_part_of_the_video_that_is_finished(order: Order) -> None:
    generator, window = torch.Generator().manual_seed(1), 2

    class Noise:
        def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

    inputs: dict[int, Any] = {
        index: {"start_latents": torch.full((1, 2, 1, 2, 2), 9.0), "image_embeddings": torch.zeros(1, 1, 1)}
        for index in range(3)
    }
    prompts = {index: EncodedPrompts({}) for index in range(3)}
    sections = video_sections(prompts, inputs, Noise(), torch.ones(1), order, window, ())
    so_far, section = [], next(sections)
    try:
        while True:
            so_far.append(None if section.made is None else section.made.so_far)
            assert section.count == 3
            section = sections.send(section.noise)
    except StopIteration as end:
        video = end.value
    assert so_far[0] is None
    for made, part in enumerate(so_far[1:], 1):
        assert part is not None
        whole = video[:, :, -made * window :] if order.in_front else video[:, :, : made * window + 1]
        assert torch.equal(part, whole)


def toy(**more: Any) -> ToyFamily:
    return ToyFamily(latent=COLOURED, **more)


def test_a_folder_in_the_way_is_one_warning_for_all_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / MP4 / "x").mkdir(parents=True)
    (tmp_path / "lines.txt").write_text("cat --d 1\ndog --d 2\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        words = ("--from_file", tmp_path / "lines.txt", "--preview_latent_every", 1)
        generate(toy(), options(tmp_path / "out", *words))
    assert caplog.text.count("A latent preview has failed") == 1
    assert len([path for path in (tmp_path / "out").glob("*.mp4") if path.is_file()]) == 2


def test_a_wrong_file_is_an_error_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no model", encoding="utf-8")
    family = toy()
    words = ("--prompt", "cat", "--preview_latent_every", 1, "--preview_vae")
    with pytest.raises(CheckpointError, match=r"text.pth"):
        generate(family, options(tmp_path, *words, tmp_path / "text.pth"))
    other = write_taehv(tmp_path / "taehv.pth")
    with pytest.raises(CheckpointError, match=r"decodes 16 channels .*\n?.* 2 channels"):
        generate(family, options(tmp_path, *words, other))
    with pytest.raises(OptionError, match="no map from this model's latents to colours"):
        generate(ToyFamily(diary=family.diary), options(tmp_path, *words[:-1]))
    assert family.diary == []
