"""Grids: --sheet with all values of options, and tools/compare.py with every prompt, LoRA and strength."""

import logging
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wan_generate_video
from generation.grid_options import read_lora_family, split_values
from generation.run import generate
from generation.sheets import EMPTY, HEADING_HEIGHT, TEXT_HEIGHT, read_display_frames
from modules.errors import OptionError, UserError
from modules.media.reading import read_image, read_tags, video_frames, video_info
from tests.chromium import open_page
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.generation.guided import Script
from tests.generation.test_run import options, run
from tests.generation.toy_family import ToyFamily
from tests.tiny.families import FAMILIES
from tests.tiny.project import write_lora
from tests.tiny.wan import TinyWan, write_tiny_wan
from tools import compare

BY_NAME = {family.name: family for family in FAMILIES}
SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--output_type", "both"]
# family -> two axes, whose cells all differ
AXES = {
    "wan i2v-14B": ("flow_shift=3,5", "sample_solver=unipc,dpm++"),
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


@pytest.mark.slow_cases("framepack one frame")
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
    top = HEADING_HEIGHT + TEXT_HEIGHT + TEXT_HEIGHT
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
        top, left = HEADING_HEIGHT + TEXT_HEIGHT + (32 + TEXT_HEIGHT) * row + TEXT_HEIGHT, 128 * column
        assert np.array_equal(pixels[top : top + 32, left : left + 48], read_image(tmp_path / file))
    labels = pixels[:, :, 0] < 128
    assert labels[:TEXT_HEIGHT].any()  # the prompt
    assert labels[TEXT_HEIGHT : TEXT_HEIGHT + HEADING_HEIGHT, :128].any()
    assert labels[TEXT_HEIGHT : TEXT_HEIGHT + HEADING_HEIGHT, 128:].any()
    assert labels[TEXT_HEIGHT + HEADING_HEIGHT : TEXT_HEIGHT + HEADING_HEIGHT + TEXT_HEIGHT].any()


def test_metadata_tell_what_all_cells_share_the_axes_and_the_files(tmp_path: Path) -> None:
    run(tmp_path, "--prompt", "a cat\nä", "--sheet", "seed=1,2", "cs=1-2, 3:2|e~2")
    sheet = sheet_in(tmp_path)
    said = read_tags(sheet)
    assert said["bt_prompt"] == "a cat\\nä"
    assert said["bt_sheet"] == "seed=1,2 'cs=1-2, 3:2|e~2'"
    assert "bt_seeds" not in said  # they differ
    # a second file of one second has one more _
    assert re.search(r"_1_?\.mp4: seed = 1, cfg_schedule = e~2$", said["bt_sheet_cell_2_1"])
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
    empty = read_image(sheet)[TEXT_HEIGHT + HEADING_HEIGHT + TEXT_HEIGHT :][:32, 128 : 128 + 48]
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
        (["--sheet", "sead=1,2"], ["--sheet sead: it is not an option of a prompt line", "seed"]),
        (["--sheet", "lora_multiplier=1,2"], ["--sheet lora_multiplier", "tools/compare.py"]),
        (["--sheet", "s=1,x"], ["--sheet s: 'x' is not a whole number"]),
        (["--sheet", "s=1,1"], ["--sheet s: the value '1' is given twice"]),
        (["--sheet", "g=1", "guidance_scale=2"], ["both axes are guidance_scale"]),
        (["--sheet", "fps=8,16"], ["--sheet fps: it changes no image"]),
        (["--sheet", "prompt=a||b"], ["one of the prompts is empty"]),
        (["--sheet", "s=1,2", "--num_videos", "2"], ["--num_videos and --sheet: pass the seeds"]),
        (
            ["--sheet", f"d={','.join(map(str, range(101)))}"],
            ["--sheet has 101 cells, at most 100 are possible"],
        ),
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


SMALL = ("--video_size", "32", "48", "--video_length", "5", "--infer_steps", "2", "--device", "cpu")
HOSTILE = "<script>alert(1)</script> a cat"


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    files = write_tiny_wan(tmp_path_factory.mktemp("t2v"))
    for rank in (2, 10):
        write_lora(files.dit.parent / f"style-{rank:06d}.safetensors", files.dit, rank)
    return files


def compared(folder: Path, files: TinyWan, *more: object, loras: str = "style-*.safetensors") -> None:
    words = ["--family", "wan", "--lora", str(files.dit.parent / loras), "--save_path", str(folder)]
    compare.main([*words, "--task", "t2v-1.3B", *SMALL, *files.models, *map(str, more)])


def prompts(folder: Path) -> Path:
    path = folder / "p.txt"
    path.write_text(f"{HOSTILE} --d 7\na dog\n", encoding="utf-8")
    return path


@pytest.mark.slow_cases("in place", "loaded for each", "with fresh noise")
@pytest.mark.parametrize(
    "speed",
    [(), ("--fp8_scaled",), ("--sample_solver", "lcm")],
    ids=["in place", "loaded for each", "with fresh noise"],
)
def test_a_clip_equals_what_the_generation_script_makes(
    tmp_path: Path, t2v: TinyWan, speed: tuple[str, ...]
) -> None:
    more = ("--prompt", "a cat", *speed)
    compared(tmp_path / "grid", t2v, *more, "--lora_multiplier", 0.6, 1, "--output_type", "both")

    made = {path.name: load_file(path)["latent"] for path in (tmp_path / "grid").glob("*_latent.safetensors")}
    assert len(made) == 5
    assert not any(torch.equal(one, other) for one, other in combinations(made.values(), 2))
    script = Script(wan_generate_video.main, ["--task", "t2v-1.3B", *SMALL, *t2v.models, "--seed", "0"])
    lora = ("--lora_weight", t2v.dit.parent / "style-000010.safetensors")
    for column, weights in {
        "without-LoRA": (),
        "style-000010-x-0-6": (*lora, "--lora_multiplier", 0.6),
        "style-000010-x-1": lora,
    }.items():
        (name,) = (name for name in made if name.startswith(f"001_0_{column}_"))
        assert torch.equal(made[name], script.one(tmp_path / column, *more, *weights)), column


def test_columns_have_the_files_beside_them(tmp_path: Path, t2v: TinyWan) -> None:
    small, large = (t2v.dit.parent / f"style-0000{rank}.safetensors" for rank in ("02", "10"))
    more = ("--prompt", "a cat")
    beside = ("--beside", small, "--beside_multiplier", 0.6, "--lora_multiplier", 0.5)
    compared(tmp_path / "grid", t2v, *more, *beside, "--output_type", "both", loras=large.name)

    made = {path.name: load_file(path)["latent"] for path in (tmp_path / "grid").glob("*_latent.safetensors")}
    script = Script(wan_generate_video.main, ["--task", "t2v-1.3B", *SMALL, *t2v.models, "--seed", "0"])
    for column, loras, strengths in (
        ("without-LoRA", (), ()),
        ("style-000002-alone", (small,), (0.6,)),
        ("style-000010-x-0-5", (large, small), (0.5, 0.6)),
    ):
        (name,) = (name for name in made if name.startswith(f"001_0_{column}_"))
        used = ("--lora_weight", *loras, "--lora_multiplier", *strengths) if loras else ()
        assert torch.equal(made[name], script.one(tmp_path / column, *more, *used)), column
    assert len(made) == 3
    words = next((tmp_path / "grid").glob("*.html")).read_text(encoding="utf-8")
    assert "style-000010.safetensors" in words
    assert "--lora_multiplier 0.5 0.6" in words


def test_loras_of_two_experts_are_compared_in_pairs(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path / "models", experts=2)
    low, high = tmp_path / "low.safetensors", tmp_path / "high.safetensors"
    write_lora(low, files.dit, 2)
    write_lora(high, files.dit, 3)
    more = ["--task", "t2v-A14B", *SMALL, "--flow_shift", "1", *files.models, "--prompt", "a cat"]

    compare.main(
        ["--family", "wan", "--lora", str(low), "--lora_high_noise", str(tmp_path / "high*"), *more]
        + ["--lora_multiplier", "0.6", "--save_path", str(tmp_path / "grid"), "--output_type", "both"]
    )

    (column,) = (tmp_path / "grid").glob("*low-x-0-6*_latent.safetensors")
    with safe_open(column, "pt") as file:
        metadata = file.metadata()
    names = ("bt_lora_0", "bt_lora_high_noise_0")
    assert [metadata[name] for name in names] == ["low.safetensors: 0.6", "high.safetensors: 0.6"]
    assert metadata["bt_lora_sha256_0"] != metadata["bt_lora_high_noise_sha256_0"]
    words = next((tmp_path / "grid").glob("*.html")).read_text(encoding="utf-8")
    assert "--lora_weight_high_noise" in words
    wan_generate_video.main(
        ["--save_path", str(tmp_path / "one"), *more, "--seed", "0", "--output_type", "latent"]
        + ["--lora_weight", str(low), "--lora_multiplier", "0.6"]
        + ["--lora_weight_high_noise", str(high), "--lora_multiplier_high_noise", "0.6"]
    )
    (path,) = (tmp_path / "one").iterdir()
    assert torch.equal(load_file(column)["latent"], load_file(path)["latent"])


@pytest.mark.slow
def test_the_grids_show_every_clip_with_its_labels(
    tmp_path: Path, t2v: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    compared(tmp_path / "grid", t2v, "--from_file", prompts(tmp_path))

    page, sheet, video = (
        next((tmp_path / "grid").glob(f"compare_*.{kind}")) for kind in ("html", "png", "mp4")
    )
    assert len(list((tmp_path / "grid").glob("00[12]_*.mp4"))) == 6
    assert caplog.text.count("style-000002 x 1\n") == 1
    assert "6 clips" in caplog.text
    assert caplog.text.count(f"Loading {t2v.dit}") == 1
    assert len(list(video_frames(video))) == 5
    info = video_info(video)
    assert read_image(sheet).shape == (info.height, info.width, 3)
    with open_page(page) as opened:
        assert opened.locator("td video").count() == 6
        assert opened.locator("script").count() == 1  # page.js
        assert opened.title() == "style"
        headings = opened.locator("thead").first.locator("th").all_inner_texts()
        assert headings == ["strength", "without LoRA", "style-000002", "style-000010"]
        assert HOSTILE in opened.locator("h2").first.inner_text()
        assert not opened.problems


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_and_replaces_nothing(
    tmp_path: Path, t2v: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    folder, words = tmp_path / "grid", ("--from_file", prompts(tmp_path), "--infer_steps", 1)
    compared(folder, t2v, *words)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("00*.mp4")}
    gone = sorted(times)[:2]
    for path in gone:
        path.unlink()
    caplog.set_level(logging.INFO)

    compared(folder, t2v, *words)

    assert "4 of them made before" in caplog.text
    assert {path for path in times if path.stat().st_mtime_ns == times[path]} == set(times) - set(gone)
    assert len(list(folder.glob("compare_*.html"))) == 2

    compared(folder, t2v, *words, "--guidance_scale", 3)

    again = [path for path in folder.glob("00*.mp4") if path.stem.endswith("_")]
    assert len(again) == 6
    assert {read_tags(path)["bt_guidance_scale"] for path in again} == {"3.0"}


def test_a_retrained_lora_of_the_same_name_is_not_taken_for_the_old_one(tmp_path: Path, t2v: TinyWan) -> None:
    lora = t2v.dit.parent / "other.safetensors"
    write_lora(lora, t2v.dit)
    compared(tmp_path / "grid", t2v, "--prompt", "a cat", loras=lora.name)
    save_file({name: tensor * 2 for name, tensor in load_file(lora).items()}, lora)

    compared(tmp_path / "grid", t2v, "--prompt", "a cat", loras=lora.name)

    assert len(list((tmp_path / "grid").glob("001_*_other*.mp4"))) == 2
    assert len(list((tmp_path / "grid").glob("001_*_without*.mp4"))) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--interactive",), "--interactive has no meaning"),
        (("--save_last_frame",), "--save_last_frame has no meaning"),
        (("--sheet", "seed=1,2"), "--sheet has no meaning"),
        (("--output_type", "latent"), "--output_type latent has no meaning"),
        (("--no_metadata",), "--no_metadata has no meaning"),
        (("--post", "upscaler model=x"), "--post has no meaning"),
        (("--shard_base",), "--shard_base has no meaning"),
        (("--cfg_parallel",), "--cfg_parallel has no meaning"),
        (("--lora_multiplier", "nan"), "--lora_multiplier nan: pass a finite number"),
        (("--lora_multiplier", *("1" * 70)), "64 are the most"),
        (("--lora", "no-*.safetensors"), "--lora no-.*: no such file"),
    ],
)
def test_what_makes_no_comparison_is_refused(
    tmp_path: Path, t2v: TinyWan, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compared(tmp_path, t2v, "--prompt", "a", *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "wan2.1"}, "wan"),
        ({"modelspec.architecture": "hunyuan-video/lora"}, "hunyuan_video"),
        ({"ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora"}, "flux"),
        ({"modelspec.architecture": "flux-1-kontext/lora"}, "flux_kontext"),
        ({"ss_base_model_version": "flux_2_klein_4b"}, "flux_2"),
        ({"title": "x"}, None),
    ],
)
def test_the_family_is_what_the_lora_says(
    tmp_path: Path, metadata: dict[str, str], family: str | None
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    families = dict.fromkeys(("hunyuan_video", "wan", "flux_kontext", "flux_2"), ())
    families |= {"flux": ("chroma",)}
    if family is None:
        with pytest.raises(OptionError, match=re.escape("Pass --family: hunyuan_video, wan, ")):
            read_lora_family(path, families)
    else:
        assert read_lora_family(path, families) == family


def test_transparent_pictures_lie_on_a_checkerboard(tmp_path: Path) -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[..., :3] = 40
    pixels[:, 15:, 3] = 255
    pixels[:, 10:15, 3] = 51
    Image.fromarray(pixels).save(tmp_path / "layer.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "plain.png")

    (shown,) = read_display_frames(tmp_path / "layer.png")
    (plain,) = read_display_frames(tmp_path / "plain.png")

    gray = shown[..., 0].tolist()
    assert gray[0] == [238] * 10 + [158] * 5 + [40] * 5
    assert gray[10] == [187] * 10 + [198] * 5 + [40] * 5
    assert (plain == 40).all()
