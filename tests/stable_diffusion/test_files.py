"""Names of pictures, and the texts in them."""

from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from blissful_tuner.metaview import as_lines, read_file_facts
from modules.atomic_write import claim_name
from modules.media.reading import read_tags
from stable_diffusion.contract import SD1, SDXL, AskedPicture, ModelKind, PictureSettings
from stable_diffusion.lines import LONGEST_NAME, read_line
from stable_diffusion.options import PictureOutputOptions
from stable_diffusion.run import PictureFiles
from stable_diffusion.sampling_options import SizeOptions

NOW = datetime(2024, 3, 5, 16, 7, 8)
PLAIN = AskedPicture("the prompt", "a cat", "", 7, PictureSettings(16, 8, 20, 7.5), "a {cat|dog}")
IMAGE = Image.new("RGB", (16, 8), (9, 8, 7))


def files(
    folder: Path, sequential: bool = False, original: bool = False, kind: ModelKind = SD1
) -> PictureFiles:
    return PictureFiles(
        PictureOutputOptions(outdir=folder, sequential_file_name=sequential, use_original_file_name=original),
        kind,
        "k_euler",
        lambda: NOW,
    )


def changed(**changes: object) -> AskedPicture:
    return AskedPicture(**{**PLAIN.__dict__, **changes})


def test_names_hold_time_number_and_seed(tmp_path: Path) -> None:
    out = files(tmp_path)
    assert out.save(PLAIN, IMAGE, "", 0).name == "im_20240305160708_000_7.png"
    assert out.save(changed(seed=8), IMAGE, "", 1).name == "im_20240305160708_001_8.png"
    assert out.save(PLAIN, IMAGE, "0", 0).name == "im_20240305160708_0000_7.png"
    assert out.save(PLAIN, IMAGE, "1", 0).name == "im_20240305160708_1000_7.png"


def test_no_file_is_replaced(tmp_path: Path) -> None:
    first = files(tmp_path).save(PLAIN, IMAGE, "", 0)
    before = first.read_bytes()
    assert files(tmp_path).save(PLAIN, IMAGE, "", 0).name == "im_20240305160708_001_7.png"
    assert first.read_bytes() == before
    with claim_name(tmp_path / "im_20240305160708_002_7.png"):  # another run is writing it
        assert files(tmp_path).save(PLAIN, IMAGE, "", 0).name == "im_20240305160708_003_7.png"
    assert len(list(tmp_path.iterdir())) == 3


def test_numbers_go_on_after_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "im_000041.png").touch()
    (tmp_path / "im_abcdef.png").touch()
    out = files(tmp_path, sequential=True)
    assert [out.save(PLAIN, IMAGE, "", 0).name for _ in range(2)] == ["im_000042.png", "im_000043.png"]
    assert files(tmp_path, sequential=True).save(PLAIN, IMAGE, "", 3).name == "im_000044.png"
    assert out.save(PLAIN, IMAGE, "", 0).name == "im_000045.png"
    assert out.save(PLAIN, IMAGE, "1", 0).name == "im_1000001.png"


def test_names_of_lines_and_of_input_pictures_are_kept(tmp_path: Path) -> None:
    named = changed(file_name="my cat.png", image=Path("in/photo.jpg"))
    out = files(tmp_path, original=True)
    assert out.save(named, IMAGE, "0", 0).name == "my cat_0.png"
    assert [out.save(named, IMAGE, "1", 0).name for _ in range(2)] == ["my cat.png", "my cat_1.png"]
    photo = changed(image=Path("in/photo.jpg"))
    assert [out.save(photo, IMAGE, "", n).name for n in range(2)] == ["photo.png", "photo_1.png"]


@pytest.mark.parametrize("letter", ["n", "é", "字"])
def test_the_longest_names_can_be_written(tmp_path: Path, letter: str) -> None:
    """With the digit of a stage, a number, and the mark of a file that is being written."""
    longest = letter * (LONGEST_NAME // len(letter.encode()))
    assert read_line(f"a --f {longest}")["file_name"] == longest
    named, found = changed(file_name=longest), changed(image=Path(letter * 80 + "\x1b[31m\n.jpg"))
    for name in (f"{longest}_0", *(f"{longest}_0_{number}" for number in range(1, 4))):
        assert files(tmp_path).save(named, IMAGE, "0", 0).name == f"{name}.png"
    saved = files(tmp_path, original=True).save(found, IMAGE, "", 0)
    assert saved.stem == (letter * 80 + "_[31m_").encode()[:LONGEST_NAME].decode("utf-8", "ignore")


def test_the_texts_say_how_a_picture_was_made(tmp_path: Path) -> None:
    path = files(tmp_path).save(PLAIN, IMAGE, "", 0)
    assert read_tags(path) == {
        "prompt": "a cat",
        "seed": "7",
        "sampler": "k_euler",
        "steps": "20",
        "scale": "7.5",
        "raw-prompt": "a {cat|dog}",
    }
    with Image.open(path) as image:
        assert (image.size, image.getpixel((0, 0))) == ((16, 8), (9, 8, 7))


def test_they_say_all_of_a_picture_of_xl(tmp_path: Path) -> None:
    sizes = SizeOptions(original_width=99, original_height_negative=33, crop_left=4)
    settings = PictureSettings(16, 8, 20, 7.5, negative_scale=2.0, sizes=sizes)
    full = changed(settings=settings, negative_prompt="schlecht, ü 字", clip_prompt="c")
    path = files(tmp_path, kind=SDXL).save(full, IMAGE, "", 0)

    texts = read_tags(path)
    assert texts["negative-prompt"] == "schlecht, ü 字"
    assert texts["negative-scale"] == "2.0"
    assert texts["clip-prompt"] == "c"
    sizes_told = {name: text for name, text in texts.items() if name.startswith(("original", "crop"))}
    assert sizes_told == {
        "original-width": "99",
        "original-height": "8",
        "original-width-negative": "99",
        "original-height-negative": "33",
        "crop-top": "0",
        "crop-left": "4",
    }
    shown = list(as_lines([read_file_facts(path)], is_one=True))
    assert {"prompt: a cat", "negative-prompt: schlecht, ü 字", "seed: 7", "scale: 7.5"} <= set(shown)
