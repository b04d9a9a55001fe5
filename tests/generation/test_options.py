"""The shared options of generation scripts."""

from pathlib import Path

import pytest

from generation.options import GenerationOptions, ScriptDefaults, generation_parser, read_arguments
from modules.errors import OptionError
from modules.fp8_options import Quantisation
from modules.options import read_options


def read(folder: Path, *arguments: str) -> GenerationOptions:
    parser = generation_parser(None, ScriptDefaults(fps=16, guidance_scale=5.0))
    return read_options(GenerationOptions, read_arguments(parser, ["--save_path", str(folder), *arguments]))


def test_defaults_are_read(tmp_path: Path) -> None:
    options = read(tmp_path, "--prompt", "p")
    assert options.request.video_size == (256, 256)
    assert options.request.fps == 16.0
    assert options.lora.multipliers() == ()
    assert options.output.format.suffix == ".mp4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--from_file", __file__, "--interactive"], "give one of them"),
        (["--latent_path", __file__, "--output_type", "both"], "the latents are there already"),
        (["--latent_path", __file__, "--interactive"], "only decodes"),
        (["--from_file", "no such.txt"], "--from_file no such.txt: there is no such file"),
        (["--prompt", "p", "--lora_weight", "no such.safetensors"], "--lora_weight no such.safetensors: there is no such file"),
        (["--latent_path", __file__, "no such.pt"], "--latent_path no such.pt: there is no such file"),
        (["--latent_path", __file__, "--fps", "0"], "--fps 0: has to be above 0"),
        (["--prompt", "p", "--trim_tail_frames", "-1"], "--trim_tail_frames"),
        (["--prompt", "p", "--upcast_linear"], "--upcast_linear needs --fp8_scaled"),
        (["--prompt", "p", "--blocks_to_swap", "-4"], "--blocks_to_swap -4: give a number"),
        (["--prompt", "p", "--video_path", "x.mp4"], "--video_path is not supported yet"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--fp8"], Quantisation("cast")),
        (["--fp8", "--fp8_scaled"], Quantisation("rows")),
        (["--fp8_scaled", "--upcast_linear"], Quantisation("rows", float32_linear=True)),
        (["--fp8_scaled", "--upcast_quantization"], Quantisation("rows", float32_scales=True)),
    ],
)
def test_options_of_fp8_say_how_weights_are_kept(tmp_path: Path, arguments: list[str], expected: Quantisation | None) -> None:
    assert read(tmp_path, "--prompt", "p", *arguments).speed.fp8.quantisation == expected


def test_a_finer_rounding_of_nothing_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, "--prompt", "p", "--fp8", "--upcast_quantization")
    assert "--upcast_quantization is ignored because --fp8_scaled is not given" in caplog.text


def test_prores_needs_matroska(tmp_path: Path) -> None:
    assert read(tmp_path, "--prompt", "p", "--codec", "prores").output.format.suffix == ".mkv"
