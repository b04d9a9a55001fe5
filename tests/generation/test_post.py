"""--post: decoded frames go through tools on their way into the file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from generation.outputs import save_pixels
from generation.run import generate
from modules.errors import NothingFoundError, OptionError
from modules.media.reading import read_image, read_tags, video_info
from postprocessing.chain_options import NamedTools, ToolOptions
from postprocessing.contract import Stage
from postprocessing.stages import NamedStage, PostTools
from tests.generation.test_outputs import output_options
from tests.generation.test_run import only, options
from tests.generation.toy_family import ToyFamily
from tests.postprocessing.stages_here import Black, Larger, Refusing, Smoother, files_in, frames_of, tool_for
from tests.tiny.post_faces import write_red_detector

CPU = torch.device("cpu")


def post_of(*stages: Stage, needs_video: bool = False) -> tuple[PostTools, list[str]]:
    """Tools that the stages stand for, and what was loaded when."""
    loaded: list[str] = []

    def load(tools: Sequence[ToolOptions], labels: Sequence[str], device: torch.device) -> list[NamedStage]:
        loaded.extend(labels)
        return [NamedStage(stage, label) for stage, label in zip(stages, labels, strict=True)]

    tools = tuple(tool_for(stage, needs_video, hides=isinstance(stage, Black)) for stage in stages)
    return PostTools(NamedTools("--post", tools), CPU, load), loaded


def chunks(frames: int = 5) -> Iterator[Tensor]:
    """Pixels of a video that grows brighter, in two chunks."""
    values = torch.linspace(-1, 1, 5)[:frames].view(1, 1, -1, 1, 1)
    pixels = values * torch.linspace(0.5, 1, 32)
    full = pixels.expand(1, 3, frames, 16, 32)
    yield full[:, :, :2]
    if frames > 2:
        yield full[:, :, 2:]


def test_a_video_is_written_once_with_the_size_and_rate_of_the_tools(tmp_path: Path) -> None:
    plain = save_pixels(output_options(tmp_path), "a", chunks(), 16.0, None)
    post, loaded = post_of(Larger(), Smoother())

    path = save_pixels(output_options(tmp_path), "b", chunks(), 16.0, {"bt_post": "larger"}, post)
    again = save_pixels(output_options(tmp_path), "c", chunks(), 16.0, None, post)

    info = video_info(path)
    assert (info.width, info.height, info.fps, info.frames) == (64, 32, 32.0, 9)
    assert read_tags(path)["bt_post"] == "larger"
    difference = np.abs(frames_of(path)[::2, ::2, ::2].astype(int) - frames_of(plain))
    assert difference.max() <= 4  # two encodings
    assert loaded == ["--post larger", "--post smoother"]  # once
    np.testing.assert_array_equal(frames_of(again), frames_of(path))
    assert {one.name for one in tmp_path.iterdir()} == {"a.mp4", "b.mp4", "c.mp4"}


def test_the_transparency_of_a_picture_goes_along_with_its_colours(tmp_path: Path) -> None:
    pixels = torch.linspace(-1, 1, 4 * 8 * 6).view(1, 4, 1, 8, 6)
    asked = output_options(tmp_path)
    plain = read_image(save_pixels(asked, "a", iter([pixels]), 1.0, None), alpha=True)

    path = save_pixels(asked, "b", iter([pixels]), 1.0, {"bt_post": "larger"}, post_of(Larger())[0])

    enlarged = read_image(path, alpha=True)
    assert plain.shape == (8, 6, 4)
    np.testing.assert_array_equal(enlarged[..., :3], plain[..., :3].repeat(2, 0).repeat(2, 1))
    resized = Image.fromarray(plain[..., 3]).resize((12, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(enlarged[..., 3], np.asarray(resized))
    assert read_tags(path)["bt_post"] == "larger"


@pytest.mark.parametrize("output_type", ["images", "video"])
def test_the_last_frame_shows_nothing_that_a_tool_hides(output_type: str, tmp_path: Path) -> None:
    asked = output_options(tmp_path, output_type, last=True)

    save_pixels(asked, "a", chunks(), 16.0, None, post_of(Black(), Larger())[0])

    last = read_image(tmp_path / "a_last.png")
    assert last.shape == (32, 64, 3)
    assert not last.any()


def test_a_tool_that_fails_at_the_end_leaves_nothing_half_made(tmp_path: Path) -> None:
    post = post_of(Refusing(NothingFoundError("nothing")))[0]
    for output_type in ("video", "images"):
        with pytest.raises(NothingFoundError, match="^--post refusing: nothing"):
            save_pixels(
                output_options(tmp_path, output_type, last=True, pngs=True), "a", chunks(), 16, None, post
            )

    assert files_in(tmp_path) == set()


def test_a_picture_goes_through_tools_for_pictures_only(tmp_path: Path) -> None:
    path = save_pixels(output_options(tmp_path), "a", chunks(1), 16.0, None, post_of(Larger())[0])
    assert read_image(path).shape == (32, 64, 3)

    post, loaded = post_of(Smoother(), needs_video=True)
    with pytest.raises(OptionError, match="--post smoother works between the frames of a video"):
        save_pixels(output_options(tmp_path), "b", chunks(1), 16.0, None, post)
    with pytest.raises(OptionError, match="and line 3 gives a single one"):
        post.check_length(1, "line 3")
    assert not loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "cat", "--output_type", "latent"], "--post with --output_type latent"),
        (["--sheet", "seed=1,2", "--prompt", "cat"], "--sheet and --post cannot be used together"),
        (
            ["--prompt", "cat", "--preview_latent_every", "1", "--post", "blur model=x.onnx"],
            "--preview_latent_every with --post yolo_blur: previews would show what it hides",
        ),
        (["--prompt", "cat", "--post", ""], "--post '': the name of a tool is missing"),
        (["--prompt", "cat", "--post", "upscaler model=x --codec h264"], "--codec applies to the whole run"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        options(tmp_path, "--post", "upscaler model=x.pth", *words)


@pytest.fixture(scope="module")
def blur(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A blur of red dots, which toy videos do not have."""
    return (
        "--post",
        f"yolo_blur model={write_red_detector(tmp_path_factory.mktemp('blur') / 'red.safetensors')}",
    )


def test_where_nothing_is_found_the_latents_are_kept_and_decoded_later(
    blur: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(NothingFoundError, match="--allow_none") as caught:
        generate(ToyFamily(), options(tmp_path, "--prompt", "cat", "--save_last_frame", "--seed", 1, *blur))

    latents = only(tmp_path, "*")
    assert latents.name.endswith("_1_latent.safetensors")
    assert f"--latent_path {latents} decodes them" in str(caught.value)
    assert caught.value.exit_code == 3
    with pytest.raises(NothingFoundError):
        generate(ToyFamily(), options(tmp_path, "--latent_path", latents, *blur))
    generate(ToyFamily(), options(tmp_path, "--latent_path", latents, blur[0], f"{blur[1]} allow_none"))
    assert len(frames_of(only(tmp_path, "*.mp4"))) == 5


def test_a_video_in_sections_has_no_preview_if_a_tool_hides(
    blur: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = ToyFamily(sections_made=3)
    more = (blur[0], f"{blur[1]} allow_none", "--output_type", "both")

    with caplog.at_level("INFO"):
        generate(family, options(tmp_path, "--prompt", "cat", *more))

    assert "Preview: " not in caplog.text
    assert caplog.text.count("There is no preview of the video") == 1
    assert "The latents of --output_type both contain the video before --post yolo_blur" in caplog.text
