"""The shared options of generation scripts."""

from pathlib import Path

import pytest

from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.script_options import ScriptDefaults
from modules.errors import OptionError
from modules.options import read_options
from modules.speed_options import Quantisation

DEFAULTS = ScriptDefaults(fps=16, guidance_scale=5.0)


def read(folder: Path, *arguments: str, defaults: ScriptDefaults = DEFAULTS) -> GenerationOptions:
    parser = generation_parser(None, defaults)
    return read_options(GenerationOptions, read_arguments(parser, ["--save_path", str(folder), *arguments]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--from_file", __file__, "--interactive"], "give one of them"),
        (["--latent_path", __file__, "--output_type", "both"], "the latents exist already"),
        (["--latent_path", __file__, "--interactive"], "only decodes"),
        (["--from_file", "no such.txt"], "--from_file no such.txt: no such file"),
        (["--prompt", "p", "--trim_tail_frames", "-1"], "--trim_tail_frames"),
        (["--prompt", "p", "--blocks_to_swap", "-4"], "--blocks_to_swap -4: give a number"),
        (["--video_path", "x.mp4", "--i2i_path", "x.png"], "--video_path x.mp4 and --i2i_path x.png"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(tmp_path, *arguments)


def test_a_script_may_have_options_about_each_video_of_its_own(tmp_path: Path) -> None:
    defaults = ScriptDefaults(fps=30, guidance_scale=1.0, has_length=False, extras={"paws": "feet"})
    parser = generation_parser(None, defaults)
    parser.add_argument("--paws", type=int, default=4)
    args = read_arguments(
        parser, ["--save_path", str(tmp_path), "--prompt", "p", "--paws", "3", "--guidance_rescale", "0.5"]
    )
    options = read_options(GenerationOptions, args)
    assert options.request.extras == {"paws": ("feet", 3)}
    assert options.request.video_length is None
    assert options.guidance.guidance_rescale == 0.5
    with pytest.raises(SystemExit):
        parser.parse_args(["--save_path", str(tmp_path), "--video_length", "5"])


def test_optimized_turns_on_what_it_stands_for(tmp_path: Path) -> None:
    speed = read(tmp_path, "--prompt", "p", "--optimized").speed
    assert speed.attention.choice.mode == "sage"
    assert speed.compilation.choice is not None
    assert speed.fp8.quantisation == Quantisation("rows", fp8_matmul=True)
    assert set(speed.by_preset) == {"attn_mode", "compile", "fp8_scaled", "fp8_fast"}
    assert read(tmp_path, "--prompt", "p").speed.by_preset == ()
