"""Wan's own features and the speed switches with the two transformers of Wan2.2 A14B, through the script."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import wan_generate_video
from modules.errors import OptionError
from modules.media.writing import write_video
from tests.generation.guided import Script
from tests.tiny.project import moving_square, write_image
from tests.tiny.wan import write_tiny_wan

Generate = Callable[..., Tensor]
LENGTH = ("--video_length", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("A14B")
    write_image(folder / "start.png", 32, 32)
    write_video(folder / "clip.mp4", moving_square(5, 32, 32, 3), fps=16)
    for kind in ("t2v", "i2v-2.2"):
        write_tiny_wan(folder / kind, kind, experts=2)
    return folder


@pytest.fixture
def generate(folder: Path, tmp_path: Path) -> Generate:
    """Words of the command line -> latents; both transformers work at two of four steps each."""
    made: list[Path] = []

    def latents(kind: str, *words: object) -> Tensor:
        options = ["--dit", folder / kind / "dit.safetensors", "--vae", folder / kind / "vae.safetensors"]
        options += ["--t5", folder / kind / "t5.safetensors", "--timestep_boundary", 0.87]
        options += ["--dit_high_noise", folder / kind / "dit_high.safetensors"]
        options += ["--flow_shift", 5, *LENGTH, "--task", f"{kind[:3]}-A14B"]
        image = [] if kind == "t2v" else ["--image_path", folder / "start.png"]
        made.append(tmp_path / str(len(made)))
        script = Script(wan_generate_video.main, [str(word) for word in [*options, *image]])
        return script.latents(made[-1], *words)

    return latents


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    ("words", "at_most"),
    [
        (("--fp8_scaled",), 0.2),
        (("--dit_dtype", "bfloat16"), 0.1),
        (("--lower_precision_attention",), 0.1),
        (("--magcache_mag_ratios", 1, 0.98, 0.97, 0.9, "--magcache_threshold", 0.5), 2.0),
    ],
)
def test_what_changes_pixels_does_so(generate: Generate, words: tuple[object, ...], at_most: float) -> None:
    made = generate("t2v", *words)
    assert 0 < difference(made, generate("t2v")) < at_most


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dit_dtype", "float8_e4m3fn"), "nothing is computed in fp8"),
        (("--dit_dtype", "bf17"), "--dit_dtype"),
        (("--dit_dtype", "bfloat16", "--mixed_precision_transformer"), "leave one of them out"),
    ],
)
def test_what_cannot_be_computed_in_is_refused(
    generate: Generate, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        generate("t2v", *words)


def test_the_transformer_for_much_noise_alone_makes_no_video(folder: Path, tmp_path: Path) -> None:
    words = ["--save_path", tmp_path, "--task", "t2v-A14B", "--prompt", "a cat"]
    words += ["--dit_high_noise", folder / "t2v/dit_high.safetensors"]
    with pytest.raises(OptionError, match="--dit is missing"):
        wan_generate_video.main([str(word) for word in words])
