"""The shared options of generation scripts."""

from pathlib import Path

import pytest

from generation.options import GenerationOptions, ScriptDefaults, generation_parser, read_arguments
from modules.errors import OptionError
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
        (["--prompt", "p", "--blocks_to_swap", "-4"], "--blocks_to_swap -4: give a number"),
        (["--prompt", "p", "--video_path", "x.mp4"], "--video_path is not supported yet"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(tmp_path, *arguments)


def test_prores_needs_matroska(tmp_path: Path) -> None:
    assert read(tmp_path, "--prompt", "p", "--codec", "prores").output.format.suffix == ".mkv"
