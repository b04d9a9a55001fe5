"""hv_generate_video.py on a tiny HunyuanVideo, from the command line to files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hv_generate_video
from modules.errors import OptionError
from tests.generation.guided import latents_in
from tests.tiny.hunyuan import TinyHunyuan, write_tiny_hunyuan

SIZE = ("--video_size", "32", "48", "--video_length", "5", "--infer_steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuan:
    return write_tiny_hunyuan(tmp_path_factory.mktemp("t2v"))


def generate(folder: Path, files: TinyHunyuan, *arguments: object) -> dict[int, Tensor]:
    """The latents that are left, by seed."""
    words = ["--save_path", folder, *SIZE, *files.models, "--output_type", "latent", *arguments]
    hv_generate_video.main([str(word) for word in words])
    return latents_in(folder)


def test_latents_are_decoded_with_nothing_but_the_vae(tmp_path: Path, t2v: TinyHunyuan) -> None:
    generate(tmp_path / "latents", t2v, "--prompt", "a cat", "--seed", 7)
    (path,) = (tmp_path / "latents").iterdir()
    words = ["--latent_path", path, "--vae", t2v.vae, "--save_path", tmp_path / "out", "--device", "cpu"]
    hv_generate_video.main([str(word) for word in words])
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".mp4"]


@pytest.fixture
def undone() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("undone")
def test_reproduce_sets_deterministic_algorithms(tmp_path: Path, t2v: TinyHunyuan) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    generate(tmp_path, t2v, "--prompt", "a cat", "--seed", 1, "--reproduce")
    assert torch.are_deterministic_algorithms_enabled()


def test_one_sample_at_a_time_makes_the_passes_of_guidance_singly(
    tmp_path: Path, t2v: TinyHunyuan, caplog: pytest.LogCaptureFixture
) -> None:
    say = ("--prompt", "a cat that is long", "--negative_prompt", "dull", "--guidance_scale", 3, "--seed", 1)

    together, singly = (
        generate(tmp_path / "a", t2v, *say),
        generate(tmp_path / "b", t2v, *say, "--split_uncond"),
    )
    assert "--split_attn" not in caplog.text
    split = generate(tmp_path / "c", t2v, *say, "--split_attn")

    assert "--split_attn runs the guidance passes one after the other" in caplog.text
    assert torch.equal(split[1], singly[1])
    # float32, summed in another order, over the steps
    torch.testing.assert_close(split[1], together[1], atol=1e-4, rtol=1e-4)


def test_a_slowed_frequency_changes_long_videos_only(
    tmp_path: Path, t2v: TinyHunyuan, caplog: pytest.LogCaptureFixture
) -> None:
    def made(*more: object) -> Tensor:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return generate(folder, t2v, "--prompt", "a cat", "--seed", 1, *more)[1]

    slow, long = ("--riflex_index", 4), ("--video_length", 53)
    assert torch.equal(made(*slow), made())
    assert "--riflex_index 4 is ignored because the video has 5 frames" in caplog.text
    assert not torch.allclose(made(*long, *slow), made(*long), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--te_multiplier", "much", "1"], "--te_multiplier much 1: give two numbers"),
        (["--dit_in_channels", "20"], "--dit_in_channels 20"),
        (["--strength", "1.5"], "--strength 1.5"),
        (["--hidden_state_skip_layer", "-1"], "--hidden_state_skip_layer"),
        (["--vae_chunk_size", "0"], "--vae_chunk_size"),
        (["--vae_spatial_tile_sample_min_size", "20"], "--vae_spatial_tile_sample_min_size 20"),
        (["--vae_dtype", "fp8"], "nothing is computed in fp8"),
        (
            ["--blocks_to_swap", "2"],
            "--blocks_to_swap 2: the transformer has 2 . 3 blocks, at most 0 can be swapped",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, t2v: TinyHunyuan, arguments: list[str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        generate(tmp_path, t2v, "--prompt", "a cat", *arguments)
