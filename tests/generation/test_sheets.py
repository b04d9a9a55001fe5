"""--sheet: grids of all values of one or two options, in every family."""

import builtins
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.prompt_lines import SECTIONED_GENERATION_OPTIONS
from generation.run import generate
from generation.script_options import ScriptDefaults
from generation.sheet_options import SheetOptions, cells_of, split_values
from modules.errors import OptionError, UserError
from modules.media.reading import read_image, video_frames, video_info
from modules.options import read_options
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.generation.toy_family import ToyFamily
from tests.media_tags import read_tags
from tests.tiny.families import FAMILIES, TinyFamily

BY_NAME = {family.name: family for family in FAMILIES}
SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--output_type", "both"]
# family -> two axes that all change its pixels, and how single runs are given their values
AXES = {
    "wan t2v-1.3B": ("seed=1,2", "guidance_scale=3,5"),
    "wan i2v-14B": ("flow_shift=3,5", "seed=1,2"),
    "hunyuan_video": ("embedded_cfg_scale=1,6", "infer_steps=1,2"),
    "framepack": ("seed=1,2", "video_sections=1,2"),
    "framepack one frame": ("seed=1,2", "embedded_cfg_scale=3,10"),
}


def options(folder: Path, *arguments: object) -> GenerationOptions:
    parser = generation_parser(None, ScriptDefaults(fps=16, guidance_scale=5.0))
    size = ["--device", "cpu", "--video_size", "32", "48", "--video_length", "5"]
    words = ["--save_path", str(folder), *size, *map(str, arguments)]
    return read_options(GenerationOptions, read_arguments(parser, words))


def run(folder: Path, *arguments: object, family: ToyFamily | None = None) -> list[str]:
    """What the toy networks noted, without the single passes."""
    family = family or ToyFamily()
    generate(family, options(folder, *arguments))
    return [line for line in family.diary if not line.startswith("pass")]


def sheet_in(folder: Path) -> Path:
    (path,) = folder.glob("*_sheet*")
    return path


def cells_in(sheet: Path, ending: str = "") -> dict[str, Path]:
    """The files that a sheet says it shows, by their row and column."""
    names = {key: text for key, text in read_tags(sheet).items() if key.startswith("bt_sheet_cell_")}
    files = {key.removeprefix("bt_sheet_cell_"): text.partition(":")[0] for key, text in names.items()}
    return {place: sheet.parent / (Path(file).stem.removesuffix("_000") + ending) if ending else sheet.parent
            / file for place, file in files.items()}


@pytest.mark.parametrize("name", AXES)
def test_every_cell_is_what_a_single_run_makes(name: str, tmp_path: Path) -> None:
    family, axes = BY_NAME[name], AXES[name]
    family.prepare(tmp_path)
    command = [*family.generate, *SIZE, "--prompt", "a cat"]
    if not any(axis.startswith("seed") for axis in axes):
        command += ["--seed", "5"]

    said = succeed_here(*command, "--sheet", *axes, "--save_path", "sheet", folder=tmp_path)

    sheet = sheet_in(tmp_path / "sheet")
    latents = cells_in(sheet, "_latent.safetensors")
    assert list(latents) == ["1_1", "1_2", "2_1", "2_2"]
    assert said.count("model/dit.safetensors") <= succeed_here(*command[:1], "--help", folder=tmp_path).count("x") + 1
    options_of = [[(axis.partition("=")[0], value) for value in axis.partition("=")[2].split(",")] for axis in axes]
    made = []
    for place, path in latents.items():
        row, column = (int(number) - 1 for number in place.split("_"))
        given = [*(f"--{options_of[0][column][0]}", options_of[0][column][1])]
        given += [f"--{options_of[1][row][0]}", options_of[1][row][1]]
        single = tmp_path / f"single {place}"
        succeed_here(*command, *given, "--save_path", single, folder=tmp_path)
        (expected,) = single.glob("*_latent.safetensors")
        made.append(load_file(path)["latent"])
        assert made[-1].equal(load_file(expected)["latent"])
    assert not any(
        one.shape == other.shape and one.equal(other) for i, one in enumerate(made) for other in made[:i]
    )
