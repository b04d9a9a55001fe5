"""fpack_generate_video.py on a tiny FramePack, from the command line to files."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fpack_generate_video
from modules.errors import OptionError, UserError
from modules.media.reading import read_image, video_frames
from modules.media.writing import write_png
from tests.generation.guided import latents_in
from tests.tiny.framepack import TinyFramePack, write_tiny_framepack

SIZE = ("--video_size", "32", "48", "--infer_steps", "2", "--device", "cpu")
SAY = ("--prompt", "a cat", "--seed", 1, "--video_sections", 1)


@dataclass(frozen=True)
class Tiny:
    """A tiny FramePack on disk, two pictures, and its script."""

    models: TinyFramePack
    start: Path
    other: Path

    def run(self, folder: Path, *arguments: object, output: str = "latent") -> None:
        words = ("--save_path", folder, *SIZE, *self.models.models, "--output_type", output, *arguments)
        fpack_generate_video.main(list(map(str, words)))

    def latents(self, folder: Path, *arguments: object) -> dict[int, Tensor]:
        """The latents that are left, by seed."""
        self.run(folder, *arguments)
        return latents_in(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder, random = tmp_path_factory.mktemp("framepack"), numpy.random.default_rng(1)
    start, other = folder / "start.png", folder / "other.png"
    for path in (start, other):
        write_png(path, random.integers(0, 256, (32, 48, 3), dtype=numpy.uint8))
    return Tiny(write_tiny_framepack(folder / "models"), start, other)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.slow
def test_texts_images_and_the_end_act_on_their_sections(tmp_path: Path, tiny: Tiny) -> None:
    """In F1 the first section sees nothing of the second, so only the second changes; the first latent is the
    start image.
    """
    start, other = tiny.start, tiny.other
    say = ("--video_sections", 2, "--seed", 1, "--f1")
    plain = tiny.latents(tmp_path / "a", *say, "--prompt", "a cat", "--image_path", start)[1]
    text = tiny.latents(tmp_path / "b", *say, "--prompt", "a cat;;;1:a dog", "--image_path", start)[1]
    two = f"{start};;;-1:{other}"
    image = tiny.latents(tmp_path / "c", *say, "--prompt", "a cat", "--image_path", two)[1]
    for changed in (text, image):
        assert torch.equal(changed[:, :10], plain[:, :10])
        assert not torch.equal(changed[:, 10:], plain[:, 10:])


def test_a_video_is_written_whole_and_can_be_decoded_again(tmp_path: Path, tiny: Tiny) -> None:
    say = (*SAY, "--video_sections", 2, "--latent_window_size", 2, "--image_path", tiny.start)
    tiny.run(tmp_path / "a", *say, output="both")
    (video,), (saved,) = (tmp_path / "a").glob("*.mp4"), (tmp_path / "a").glob("*.safetensors")
    assert len(list(video_frames(video))) == 17  # 4 * 2 * 2 + 1
    assert metadata_of(saved)["bt_latent_window_size"] == "2"

    # the window is in the file
    vae = ("--vae", str(tiny.models.vae), "--vae_dtype", "float32")
    fpack_generate_video.main(["--latent_path", str(saved), *vae, "--save_path", str(tmp_path / "b")])

    again = tmp_path / "b" / saved.name.replace("_latent.safetensors", ".mp4")
    assert numpy.array_equal(*(list(video_frames(path)) for path in (video, again)))


@pytest.mark.slow_cases("images-1", "video-1")
@pytest.mark.parametrize(("output", "left"), [("video", 1), ("images", 1), ("latent_images", 2)])
def test_one_picture_is_a_png_beside_nothing_else(
    output: str,
    left: int,
    tmp_path: Path,
    tiny: Tiny,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start, other = tiny.start, tiny.other
    caplog.set_level("INFO")
    tiny.run(
        tmp_path,
        *("--prompt", "a cat", "--seed", 1, "--image_path", start),
        *("--one_frame_inference", "target_index=1,control_index=0;10,no_post,no_2x,no_4x"),
        *("--control_image_path", start, other),
        output=output,
    )
    (png,) = tmp_path.glob("*_1_000.png")
    assert len(list(tmp_path.iterdir())) == left
    assert read_image(png).shape == (32, 48, 3)
    assert "48 x 32 (width x height), " in caplog.text
    for saved in tmp_path.glob("*.safetensors"):
        assert load_file(saved)["latent"].shape == (16, 1, 4, 6)
        assert metadata_of(saved)["bt_one_frame"].startswith("target_index=1")
        assert not any(str(start) in text for text in metadata_of(saved).values())


@pytest.mark.slow
def test_lines_of_a_file_equal_single_runs_and_those_that_fail_are_skipped(
    tmp_path: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    start, other = tiny.start, tiny.other
    lines = [
        f"a cat --d 1 --i {start} --f 1",  # seconds, in place of the sections of the command line
        "a dog --d 2",  # the image of the command line
        f"a dog --d 3 --of default --ci {start} --ci {other} --cim {start}",
        f"a dog --d 4 --g 2 --n dull --ei {other} --vs 1",
        "a dog --d 5 --i nothing.png",
        f"0:a cat;;;-1:a dog --d 6 --of no_4x --f1 --i {other}",
    ]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    default = ("--image_path", other, "--video_sections", 2, "--latent_window_size", 2)

    with pytest.raises(
        UserError, match=r"1 of 6 failed:\s+line 5: OptionError: --image_path nothing.png: no such file"
    ):
        tiny.run(tmp_path / "file", "--from_file", tmp_path / "lines.txt", *default)
    # for lines 3 and 6
    assert caplog.text.count("--video_sections 2 is ignored because a single image is generated") == 1

    made = latents_in(tmp_path / "file")
    dog = ("--prompt", "a dog", *default)
    one_frame = ("--one_frame_inference", "default", "--control_image_path", start, other)
    singly: dict[int, tuple[object, ...]] = {
        1: ("--prompt", "a cat", "--image_path", start, "--video_seconds", 1, "--latent_window_size", 2),
        2: dog,
        3: (*dog, *one_frame, "--control_image_mask_path", start),
        4: (*dog, "--video_sections", 1, "--end_image_path", other, "--guidance_scale", 2)
        + ("--negative_prompt", "dull"),
        6: ("--prompt", "a cat", *default, "--one_frame_inference", "no_4x"),
    }
    assert made.keys() == singly.keys()
    for seed, say in singly.items():
        assert torch.equal(made[seed], tiny.latents(tmp_path / str(seed), "--seed", seed, *say)[seed]), seed


def test_the_metadata_says_how_it_was_made(tmp_path: Path, tiny: Tiny) -> None:
    tiny.run(tmp_path, *SAY, "--image_path", tiny.start, "--f1", "--latent_window_size", 2)
    (path,) = tmp_path.iterdir()
    found = metadata_of(path)
    expected = {
        "model_type": "framepack",
        "embedded_cfg_scale": "10.0",
        "fps": "30",
        "video_sections": "1",
        "video_length": "9",
        "video_seconds": "0.3",
        "latent_window_size": "2",
        "f1": "True",
        "sample_solver": "unipc",
        "image_path": tiny.start.name,
        "dit": tiny.models.dit.name,
        "vae_dtype": "float32",
    }
    assert {name: found[f"bt_{name}"] for name in expected} == expected
    for name in ("seeds", "prompt", "fps", "latent_window_size", "sample_solver"):
        assert found[name] == found[f"bt_{name}"]


def test_latents_of_the_known_tool_are_read(tmp_path: Path, tiny: Tiny) -> None:
    """Its names have no prefix."""
    said = {"seeds": "77", "fps": "24", "latent_window_size": "2", "prompt": "a cat"}
    save_file({"latent": torch.zeros(16, 5, 4, 6)}, tmp_path / "theirs.safetensors", said)
    words = ["--latent_path", tmp_path / "theirs.safetensors", "--save_path", tmp_path / "out"]
    words += ["--vae", tiny.models.vae, "--vae_dtype", "float32", "--container", "mkv", "--device", "cpu"]
    fpack_generate_video.main([str(word) for word in words])
    (video,) = (tmp_path / "out").iterdir()
    assert "_77_theirs" in video.name
    assert len(list(video_frames(video))) == 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_path", "3-1:a;;;0:b"], "--image_path: 3-1 is not a range"),
        (["--prompt", "3-1:a;;;0:b"], "--prompt: 3-1 is not a range"),
        (["--latent_window_size", "0"], "--latent_window_size 0"),
        (["--latent_paddings", "1,x"], "--latent_paddings '1,x'"),
        (["--preview_vae", "x"], "--preview_vae"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, tiny: Tiny, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tiny.run(tmp_path, "--prompt", "a cat", "--image_path", tiny.start, *arguments)
