"""The numbers of the report against sets that were counted by hand, and against --check."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.report.check import check_caching
from data_tools.report.looks import Measures
from data_tools.report.numbers import count_bins
from data_tools.report.run import SAME_FLAT, group_copies
from dataset.caching.loop import cache_media
from dataset.config import load_dataset_config
from modules.errors import DatasetError, OptionError
from modules.media.measures import NEAR
from tests.data_tools.report.making import (
    names,
    report,
    save_clip,
    save_copy,
    save_image,
    save_still_clip,
    write_config,
)
from tests.dataset.making import make_clip, make_frames, make_image
from tests.dataset.toy_family import ToyFamily, options
from tests.pictures import picture
from tools import dataset_report


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """5 pictures, one of them broken, 3 times an epoch; 4 clips; one clip for validation."""
    folder = tmp_path_factory.mktemp("a set \u00fc")
    for name in ("pictures", "clips", "held back"):
        (folder / name).mkdir()
    save_image(folder / "pictures/a.png", 1, caption="A red cat, sitting")
    save_copy(folder / "pictures/a.png", folder / "pictures/b.jpg", (64, 48), caption="")
    save_image(folder / "pictures/c.png", 2, (72, 96), caption="a dog's red ball")
    save_image(folder / "pictures/d.png", 3, (96, 32), caption="a dog's red ball")
    (folder / "pictures/e.png").write_bytes(b"no picture")
    save_clip(folder / "clips/long.mp4", 4, 11)
    save_clip(folder / "clips/short.mp4", 5, 6)
    save_still_clip(folder / "clips/night.mp4", 0, 9, caption=None)
    save_still_clip(folder / "clips/tiny.mp4", picture(6, (96, 72)), 3)
    save_clip(folder / "held back/v.mp4", 7, 5)
    config = write_config(
        folder,
        "image_directory = '{folder}/pictures'\nnum_repeats = 3",
        "video_directory = '{folder}/clips'\ntarget_frames = [5, 9]",
        "video_directory = '{folder}/held back'\ntarget_frames = [5]\nvalidation = true",
    )
    return report(config)


def test_tables_count_files_items_and_their_share_of_the_epoch(found: dict[str, Any]) -> None:
    keys = ("kind", "sources", "items", "items_per_epoch", "share_percent", "batches_per_epoch", "broken")
    assert [[table[key] for key in keys] for table in found["tables"]] == [
        ["image", 5, 4, 12, 70.59, 7, 1],
        ["video", 4, 5, 5, 29.41, 3, 0],
        ["video", 1, 1, 0, 0.0, 0, 0],
    ]
    totals = ("sources", "items", "items_per_epoch", "batches_per_epoch")
    assert [found[key] for key in totals] == [10, 10, 17, 10]


def test_buckets_count_items_by_size_and_frames(found: dict[str, Any]) -> None:
    assert [list(bucket.values()) for bucket in found["buckets"]] == [
        [48, 64, 1, 1],
        [64, 48, 1, 2],
        [64, 48, 5, 4],
        [64, 48, 9, 2],
        [96, 32, 1, 1],
    ]
    assert found["tables"][0]["buckets"][1] == {
        "width": 64,
        "height": 48,
        "frames": 1,
        "items": 2,
        "batches_per_epoch": 3,
        "last_batch": 2,
        "cut_percent_mean": 0,
        "cut_percent_max": 0,
    }


def test_broken_files_and_those_without_items_have_a_reason(found: dict[str, Any]) -> None:
    (broken,) = found["broken"]
    assert Path(broken["path"]).name == "e.png"
    assert "e.png" in broken["reason"]
    (none,) = found["without_items"]
    assert Path(none["path"]).name == "tiny.mp4"
    assert none["reason"] == "3 frames, the shortest of target_frames is 5"


def test_captions_are_counted(found: dict[str, Any]) -> None:
    captions = found["captions"]
    keys = ("total", "empty", "missing", "duplicates", "distinct_words")
    assert [captions[key] for key in keys] == [8, 1, 2, 4, 7]
    assert names(captions["missing_paths"]) == ["e.png", "night.mp4"]
    assert names(captions["empty_paths"]) == ["b.jpg"]
    assert captions["words"] == {"count": 7, "min": 2, "median": 2, "mean": 2.857143, "max": 4, "total": 20}
    words = [(one["word"], one["captions"]) for one in captions["frequent_words"]]
    assert words == [("dog", 4), ("red", 3), ("ball", 2), ("dog's", 2), ("cat", 1), ("sitting", 1)]
    groups = [(one["text"], names(one["paths"])) for one in captions["duplicate_texts"]]
    assert groups == [
        ("a dog", ["long.mp4", "short.mp4", "tiny.mp4", "v.mp4"]),
        ("a dog's red ball", ["c.png", "d.png"]),
    ]


def test_black_static_and_copied_files_are_found(found: dict[str, Any]) -> None:
    assert names(found["black"]) == ["night.mp4"]
    assert names(found["static"]) == ["tiny.mp4"]
    assert [names(group) for group in found["near_duplicates"]] == [["a.png", "b.jpg"]]


def test_durations_rates_and_sizes_are_those_of_the_files(found: dict[str, Any]) -> None:
    assert found["durations"]["seconds"]["total"] == pytest.approx((11 + 6 + 9 + 3 + 5) / 16)
    assert found["rates"] == [{"fps": 16, "count": 5}]
    sizes = {(one["width"], one["height"]): one["count"] for one in found["resolutions"]}
    assert sizes == {(96, 72): 6, (64, 48): 1, (72, 96): 1, (96, 32): 1}


def make_mixed_set(folder: Path) -> Path:
    for name in ("clips", "pictures", "control"):
        (folder / name).mkdir()
    make_clip(folder / "clips/a.mp4", 30, (64, 32))
    make_clip(folder / "clips/b.mp4", 7)
    make_frames(folder / "frames", 12)
    gif = [Image.new("RGB", (32, 48), (8 * index, 0, 0)) for index in range(9)]
    gif[0].save(folder / "clips/c.gif", save_all=True, append_images=gif[1:], duration=100)
    for name in ("x", "y", "z"):
        make_image(folder / f"pictures/{name}.png", (40, 50))
        make_image(folder / f"control/{name}.png", (40, 50))
    (folder / "control/y.png").write_bytes(b"damaged")
    make_image(folder / "pictures/small.png", (8, 8))
    make_image(folder / "control/small.png", (8, 8))
    listed = ("clips/a.mp4", "clips/none.mp4", "frames")
    lines = [{"video_path": str(folder / name), "caption": name} for name in listed]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    clips = "video_directory = '{folder}/clips'\ntarget_frames = [1, 5, 9]"
    return write_config(
        folder,
        f"{clips}\nframe_extraction = 'chunk'\nsource_fps = 24.0\nnum_repeats = 2",
        f"{clips}\nframe_extraction = 'slide'\nframe_stride = 3\nsource_fps = 'auto'",
        "video_jsonl_file = '{folder}/list.jsonl'\nframe_extraction = 'full'\nmax_frames = 21",
        "image_directory = '{folder}/pictures'\ncontrol_directory = '{folder}/control'\n"
        "bucket_no_upscale = true\nresolution = [96, 96]",
    )


def test_items_are_those_that_caching_makes(tmp_path: Path) -> None:
    config = make_mixed_set(tmp_path)

    result = report(config)

    loaded = load_dataset_config(config)
    cached = cache_media(ToyFamily(), loaded, options())
    files = [len(list(table.cache_directory.glob("*.safetensors"))) for table in loaded.datasets]
    assert [table["items"] for table in result["tables"]] == files
    assert min(files) > 0
    broken = {(one["path"], one["table"]) for one in result["broken"]}
    assert broken == {(str(one.path), one.table + 1) for one in cached.failures}
    assert sorted(Path(path).name for path, _ in broken) == ["none.mp4", "small.png", "y.png"]
    checked = check_caching(ToyFamily(), loaded, 1, False)
    for table, expected in zip(result["tables"][:3], checked.tables, strict=False):
        sizes = {(one["width"], one["height"], one["frames"]): one["items"] for one in table["buckets"]}
        assert sizes == expected.num_items_by_bucket


def test_blurred_pictures_are_told_from_sharp_ones_and_trigger_words_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    save_image(tmp_path / "p/sharp.png", 1, (512, 384), caption="ohwx on a chair")
    small = Image.fromarray(picture(2, (512, 384))).resize((40, 30), Image.Resampling.BOX)
    small.resize((512, 384), Image.Resampling.BICUBIC).save(tmp_path / "p/soft.png")
    save_image(tmp_path / "p/other.png", 2, caption="a chair")
    Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save(tmp_path / "p/flat.png")

    result = report(write_config(tmp_path, "image_directory = '{folder}/p'\ntrigger_word = 'ohwx'"))

    assert names(result["blurred"]) == ["soft.png"]
    assert result["captions"]["trigger_words"] == [{"word": "ohwx", "captions": 2, "present": 2}]


@pytest.mark.parametrize(("options", "frames"), [((), 13), (("--frame_step", "8", "--pixel_step", "32"), 9)])
def test_clips_have_the_frames_that_the_model_takes(
    tmp_path: Path, options: tuple[str, ...], frames: int
) -> None:
    (tmp_path / "clips").mkdir()
    save_still_clip(tmp_path / "clips/a.mp4", picture(1, (96, 72)), 15)
    table = "video_directory = '{folder}/clips'\nframe_extraction = 'full'\nmax_frames = 65"

    result = report(write_config(tmp_path, table), *options)

    assert [one["frames"] for one in result["tables"][0]["buckets"]] == [frames]


def test_a_table_that_cannot_be_used_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p").mkdir()
    save_image(tmp_path / "p/a.png", 1)
    (tmp_path / "p/a.txt").write_bytes("девушка".encode("cp1251"))
    tables = ["image_directory = '{folder}/p'", "video_directory = '{folder}/nothing'\ntarget_frames = [5]"]
    odd = "image_directory = '{folder}/p'\nenable_bucket = false\nresolution = [50, 50]"

    result = report(write_config(tmp_path, *tables, odd))

    assert [table["items"] for table in result["tables"]] == [1, 0, 0]
    assert result["captions"]["unreadable"] == 2
    kinds = [(one["table"], one["kind"]) for one in result["faults"]]
    caption = "have a caption that cannot be used"
    assert kinds == [(1, caption), (2, "tables cannot be used"), (3, caption), (3, "tables cannot be used")]
    assert "is not a multiple of 16" in caplog.text

    with pytest.raises(DatasetError, match="nothing to report on"):
        report(write_config(tmp_path, tables[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing would be written"),
        (["--json", "data.toml"], "ends in .json"),
        (["--output", f"{__file__}/page.html"], "is a file, not a folder"),
        (["--output", "page.html", "--pixel_step", "0"], "--pixel_step 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(options: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dataset_report.main(["--dataset_config", "none.toml", *options])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([1, 2, 2, 4], [(1, 2, 1), (2, 3, 2), (3, 4, 0), (4, 5, 1)]),
        ([0.5, 0.5], [(0, 1, 2)]),
        ([1] * 99 + [1000], [(1, 2, 99), (2, 1000, 1)]),
    ],
)
def test_bins(values: list[float], expected: list[tuple[float, float, int]]) -> None:
    assert [tuple(one.values()) for one in count_bins(values)] == expected


GREY = bytes([100] * 48)


def measures(hashes: tuple[int, ...], colors: bytes = GREY, **changes: bool) -> Measures:
    flags = {"is_black": False, "is_static": False, "is_blurred": False, "is_flat": False} | changes
    return Measures(0.5, 0.0, 0.1, hashes=hashes, colors=colors * len(hashes), **flags)


@pytest.mark.parametrize("frames", [1, 4])
def test_copies_differ_in_few_bits_on_average(frames: int) -> None:
    generator = random.Random(frames)
    found = []
    for _ in range(40):  # a picture, and others at all distances around the limit
        base = [generator.getrandbits(63) for _ in range(frames)]
        for bits in (0, NEAR * frames - 1, NEAR * frames, NEAR * frames + 1):
            hashes = list(base)
            for bit in generator.sample(range(63 * frames), bits):
                hashes[bit // 63] ^= 1 << bit % 63
            found.append(measures(tuple(hashes)))

    near = [group for group in group_copies(found) if group[0] % 4 == 0]

    assert len(near) == 40
    assert all(group[:3] == [group[0], group[0] + 1, group[0] + 2] for group in near)
    alone = [group_copies([found[place], found[place + 3]]) for place in range(0, 160, 4)]
    assert not any(alone)


def test_groups_are_chains_in_order() -> None:
    steps = [0, (1 << 6) - 1, (1 << 12) - 1, (1 << 18) - 1]
    others = [0b101010101010101 << 40, 0b110011001100110011 << 30]
    found = [measures((value,)) for value in (others[0], steps[2], steps[0], others[1], steps[3], steps[1])]

    assert group_copies(found) == [[1, 2, 4, 5]]


DOTS = bytes(random.Random(0).randrange(20, 200) for _ in range(48))


@pytest.mark.parametrize(
    ("colors", "other", "is_copy"),
    [
        (bytes([200, 40, 40] * 16), bytes([40, 40, 200] * 16), False),
        (bytes([200, 40, 40] * 16), bytes([230, 70, 70] * 16), True),  # brighter
        (DOTS, bytes(round(0.7 * value) for value in DOTS), True),  # with less contrast
        (DOTS, bytes([*DOTS[:3], 250, 20, 250, *DOTS[6:]]), False),  # in one cell
    ],
)
def test_pictures_of_one_shape_are_copies_unless_colours_differ(
    colors: bytes, other: bytes, is_copy: bool
) -> None:
    assert group_copies([measures((5,), colors), measures((5,), other)]) == ([[0, 1]] if is_copy else [])


def test_flat_pictures_are_copies_if_they_have_one_colour_and_black_ones_never() -> None:
    off = bytes([100 + round(255 * SAME_FLAT) + 2] * 48)
    found = [
        measures((0,), GREY, is_flat=True),
        measures((0,), off, is_flat=True),
        measures((0,), bytes([101] * 48), is_flat=True),
        measures((0,), GREY),
    ]
    assert group_copies(found) == [[0, 2]]
    assert group_copies([measures((7,), is_black=True), measures((7,), is_black=True)]) == []
