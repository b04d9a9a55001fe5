"""--sheet: grids of all values of one or two options, in every family."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from generation.grid_options import split_values
from generation.run import generate
from generation.sheets import EMPTY, HEAD, LINE
from modules.errors import UserError
from modules.media.reading import read_image, video_frames
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.generation.test_run import options, run
from tests.generation.toy_family import ToyFamily
from tests.media_tags import read_tags
from tests.tiny.families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}
SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--output_type", "both"]
# family -> two axes, whose cells all differ
AXES = {
    "wan t2v-1.3B": ("seed=1,2", "guidance_scale=3,5"),
    "wan i2v-14B": ("flow_shift=3,5", "sample_solver=unipc,dpm++"),
    "hunyuan_video": ("embedded_cfg_scale=1,6", "infer_steps=1,2"),
    "framepack": ("seed=1,2", "video_sections=1,2"),
    "framepack one frame": ("seed=1,2", "embedded_cfg_scale=3,10"),
}


def sheet_in(folder: Path) -> Path:
    (path,) = folder.glob("*_sheet*")
    return path


def cells_in(sheet: Path) -> dict[str, str]:
    """Names of the files that a sheet says it shows, by their row and column."""
    said = {key: text for key, text in read_tags(sheet).items() if key.startswith("bt_sheet_cell_")}
    return {key.removeprefix("bt_sheet_cell_"): text.partition(":")[0] for key, text in said.items()}


def without_time(metadata: dict[str, str]) -> dict[str, str]:
    """Metadata but for when the file was made."""
    return {name: text for name, text in metadata.items() if name != "bt_creation_timestamp"}


@pytest.mark.parametrize("name", AXES)
def test_every_cell_is_what_a_single_run_makes(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    axes = [(axis.partition("=")[0], axis.partition("=")[2].split(",")) for axis in AXES[name]]
    family.prepare(tmp_path)
    command = [*family.generate, *SIZE, "--prompt", "a cat"]
    if "seed" not in dict(axes):
        command += ["--seed", "5"]

    succeed_here(*command, "--sheet", *AXES[name], "--save_path", "sheet", folder=tmp_path)

    cells = cells_in(sheet_in(tmp_path / "sheet"))
    assert list(cells) == ["1_1", "1_2", "2_1", "2_2"]
    made = []
    for place, file in cells.items():
        row, column = (int(number) - 1 for number in place.split("_"))
        given = [f"--{axes[0][0]}", axes[0][1][column], f"--{axes[1][0]}", axes[1][1][row]]
        single = tmp_path / f"single {place}"
        succeed_here(*command, *given, "--save_path", single, folder=tmp_path)
        (expected,) = single.glob("*_latent.safetensors")
        stem = Path(file).stem.removesuffix("_000")
        made.append(load_file(tmp_path / "sheet" / f"{stem}_latent.safetensors")["latent"])
        assert made[-1].equal(load_file(expected)["latent"])
        files = tmp_path / "sheet" / file, *single.glob(f"*{file[-4:]}")
        ours, theirs = (without_time(read_tags(path)) for path in files)
        assert ours == theirs
    assert not any(one.shape == other.shape and one.equal(other) for one, other in combinations(made, 2))


def test_a_sheet_of_videos_plays_them_together_and_holds_last_frames(tmp_path: Path) -> None:
    run(tmp_path, "--prompt", "cat", "--seed", 1, "--sheet", "video_length=1,5,9")
    sheet = sheet_in(tmp_path)
    assert sheet.suffix == ".mp4"
    frames = np.stack(list(video_frames(sheet)))
    assert len(frames) == 9
    top = HEAD + LINE + LINE
    one, two, three = (frames[:, top : top + 32, left : left + 48].astype(int) for left in (0, 128, 256))
    assert abs(one - one[0]).max() < 8  # a picture
    assert abs(two[5:] - two[4]).max() < 8
    assert abs(three[8] - three[4]).max() > 8
    for path in tmp_path.glob("*_1*.mp4"):
        shown = list(video_frames(path))
        cell = two if len(shown) == 5 else three
        assert abs(cell[: len(shown)] - np.stack(shown)).mean() < 4


def test_a_sheet_of_pictures_is_a_picture_of_their_very_pixels(tmp_path: Path) -> None:
    run(tmp_path, "--prompt", "cat", "--video_length", 1, "--sheet", "seed=1,2", "guidance_scale=3,5")
    sheet = sheet_in(tmp_path)
    pixels = read_image(sheet)
    for place, file in cells_in(sheet).items():
        row, column = (int(number) - 1 for number in place.split("_"))
        top, left = HEAD + LINE + (32 + LINE) * row + LINE, 128 * column
        assert np.array_equal(pixels[top : top + 32, left : left + 48], read_image(tmp_path / file))
    labels = pixels[:, :, 0] < 128
    assert labels[:LINE].any()  # the prompt
    assert labels[LINE : LINE + HEAD, :128].any()
    assert labels[LINE : LINE + HEAD, 128:].any()
    assert labels[LINE + HEAD : LINE + HEAD + LINE].any()


def test_metadata_tell_what_all_cells_share_the_axes_and_the_files(tmp_path: Path) -> None:
    run(tmp_path, "--prompt", "a cat\nä", "--sheet", "seed=1,2", "cs=1-2, 3:2|e~2")
    sheet = sheet_in(tmp_path)
    said = read_tags(sheet)
    assert said["bt_prompt"] == "a cat\\nä"
    assert said["bt_sheet"] == "seed=1,2 'cs=1-2, 3:2|e~2'"
    assert "bt_seeds" not in said  # they differ
    assert said["bt_sheet_cell_2_1"].endswith("_1_.mp4: seed = 1, cfg_schedule = e~2")
    for file in cells_in(sheet).values():
        assert read_tags(tmp_path / file)["bt_prompt"] == said["bt_prompt"]

    run(tmp_path / "bare", "--prompt", "cat", "--sheet", "seed=1", "--no_metadata")
    assert not [key for key in read_tags(sheet_in(tmp_path / "bare")) if key.startswith("bt_")]


def test_a_cell_that_fails_is_empty_and_the_others_are_made(tmp_path: Path) -> None:
    family, more = ToyFamily(), ("--prompt", "cat", "--video_length", 1, "--sheet", "fs=3,-1", "d=1,2")
    with pytest.raises(UserError, match="2 of 4 failed:\n  the prompt, flow_shift = -1, seed = 1: Option"):
        generate(family, options(tmp_path, *more))
    sheet = sheet_in(tmp_path)
    assert list(cells_in(sheet)) == ["1_1", "2_1"]
    empty = read_image(sheet)[LINE + HEAD + LINE :][:32, 128 : 128 + 48]
    assert tuple(empty[-1, -1]) == EMPTY
    assert (empty[:, :, 0] < 128).any()  # it says so

    decoding = ToyFamily(lengths_without_room=frozenset({3}))
    with pytest.raises(UserError, match="1 of 2 failed"):
        generate(decoding, options(tmp_path / "late", "--prompt", "cat", "--sheet", "f=5,9"))
    assert list(cells_in(sheet_in(tmp_path / "late"))) == ["1_1"]
    assert len(list((tmp_path / "late").glob("*_latent.safetensors"))) == 1  # to decode later


def test_prompts_are_an_axis_too_and_need_no_other_prompt(tmp_path: Path) -> None:
    run(tmp_path, "--sheet", "prompt=a cat, old|a dog", "seed=1,2")
    sheet = sheet_in(tmp_path)
    assert len(cells_in(sheet)) == 4
    assert ": prompt = a cat, old, seed = 2" in read_tags(sheet)["bt_sheet_cell_2_1"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2, 3", ["1", "2", "3"]),
        (r"blurry\, dark,ugly", ["blurry, dark", "ugly"]),
        ("1-10:6, e~2|2", ["1-10:6, e~2", "2"]),
        (r"a\|b|c, d", ["a|b", "c, d"]),
        (",blurry", ["", "blurry"]),
        (r"C:\pictures\a.png,b.png", [r"C:\pictures\a.png", "b.png"]),
    ],
)
def test_values_with_commas_can_be_written(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sheet"], ["--sheet takes one or two axes, 0 are given"]),
        (["--sheet", "seed=1", "s=1", "g=1"], ["--sheet takes one or two axes, 3 are given"]),
        (["--sheet", "seed"], ["--sheet seed: no values are given"]),
        (["--sheet", "sead=1,2"], ["--sheet sead: it is no option of a prompt line", "seed"]),
        (["--sheet", "slg_scale=1,2"], ["--sheet slg_scale: it is no option of a prompt line"]),
        (["--sheet", "lora_multiplier=1,2"], ["--sheet lora_multiplier", "tools/compare.py"]),
        (["--sheet", "s=1,x"], ["--sheet s: 'x' is not a whole number"]),
        (["--sheet", "s=1,1"], ["--sheet s: the value '1' is given twice"]),
        (["--sheet", "g=1", "guidance_scale=2"], ["both axes are guidance_scale"]),
        (["--sheet", "fps=8,16"], ["--sheet fps: it changes no picture"]),
        (["--sheet", "prompt=a||b"], ["one of the prompts is empty"]),
        (["--sheet", f"d={','.join(map(str, range(101)))}"], ["--sheet has 101 cells, 100 are the most"]),
        (["--sheet", "s=1,2", "--output_type", "latent"], ["--output_type latent cannot be used together"]),
    ],
)
def test_sheets_that_cannot_be_made_are_refused_before_anything_loads(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    code, said = run_here(
        "wan_generate_video.py", "--save_path", "out", "--prompt", "x", *arguments, folder=tmp_path
    )
    assert_one_message(code, said, *words)
    assert code == 2
    assert not list(tmp_path.iterdir())
