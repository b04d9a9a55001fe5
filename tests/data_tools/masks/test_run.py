"""Masks of a folder by tools/mask.py: drawn pictures whose masks are known, tiny random networks."""

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchEncoding, CLIPSegForImageSegmentation, CLIPSegProcessor

from data_tools.masks import run
from data_tools.masks.places import find_mask_entries, remove_mask, replace_mask
from data_tools.masks.seen import MEAN, BackgroundFinder, load_background_finder
from data_tools.masks.words import PromptFinder, load_prompt_finder, read_kind
from dataset.config import load_dataset_config
from dataset.listing import find_all_sources
from modules.errors import CheckpointError, DatasetError, InstallationError, OptionError
from modules.media.reading import read_image
from tests.commands import assert_user_error, run_script
from tests.data_tools.masks.making import (
    BOX,
    draw,
    make,
    make_sam3,
    read,
    rectangle,
    write_background,
    write_clip,
    write_clipseg,
    write_images,
)
from tests.tiny.onnx_files import write_yolo
from tests.tiny.stable_diffusion import vocabulary

COLOR = ("--colour", "fa1414")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_images(tmp_path / "a b ü" / "pictures")


def grown(pixels: int) -> np.ndarray:
    left, top, right, bottom = BOX
    return rectangle(left - pixels, top - pixels, right + pixels, bottom + pixels)


def test_masks_are_those_that_the_dataset_reads(pictures: Path) -> None:
    done = run_script("tools/mask.py", pictures, *COLOR, "--expand_pixels", 3)

    masks = pictures / "masks"
    assert sorted(path.name for path in masks.glob("*")) == [".before", "cat.png", "dog.png"]
    np.testing.assert_array_equal(read(masks / "cat.png"), grown(3))
    np.testing.assert_array_equal(read(masks / "dog.png"), grown(3))
    said = " ".join((done.stdout + done.stderr).split())
    line = f'mask_directory = "{masks.as_posix()}"'
    assert f"\n  {line}\n" in done.stdout + done.stderr  # never wrapped
    assert "Nothing was found in 1 file (a file without a mask is used completely): plain.png" in said

    config = pictures.parent / "dataset.toml"
    config.write_text(f'[[datasets]]\nimage_directory = "{pictures.as_posix()}"\n{line}\n', encoding="utf-8")
    sources = find_all_sources(load_dataset_config(config))
    assert {source.stem: source.mask for source in sources} == {
        "cat": masks / "cat.png",
        "dog": masks / "dog.png",
        "plain": None,
    }


def test_masks_beside_the_pictures_are_masks_and_no_pictures(pictures: Path) -> None:
    make(pictures, *COLOR, "--beside")
    make(pictures, *COLOR, "--beside")
    names = sorted(path.name for path in pictures.glob("[!.]*"))
    assert names == [
        *("cat-masklabel.png", "cat.png", "cat.txt", "dog-masklabel.png", "dog.webp", "plain.png"),
    ]
    np.testing.assert_array_equal(read(pictures / "cat-masklabel.png"), grown(10))


def test_a_clip_has_a_folder_of_frames_with_a_steady_edge(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    boxes = [BOX, BOX, None, BOX, BOX, BOX]  # one frame flickers
    write_clip(clips / "dance.mp4", boxes)
    write_clip(clips / "still.mp4", [None] * 3)

    make(clips, *COLOR, "--expand_pixels", 0, "--colour_distance", 0.3, "--steady_frames", 1)

    masks = clips / "masks"
    assert sorted(path.name for path in masks.glob("[!.]*")) == ["dance"]
    frames = [read(path) for path in sorted((masks / "dance").iterdir())]
    assert len(frames) == len(boxes)
    for frame in frames:
        assert (frame != rectangle(*BOX)).mean() < 0.01  # the codec blurs the edge

    make(clips, *COLOR, "--colour_distance", 0.3, "--steady_frames", 0, "--mode", "replace")
    frames = [read(path) for path in sorted((masks / "dance").iterdir())]
    assert [bool(frame.any()) for frame in frames] == [box is not None for box in boxes]


def test_words_give_what_clipseg_gives(pictures: Path, tmp_path: Path) -> None:
    folder = write_clipseg(tmp_path / "clipseg")
    image = read_image(pictures / "cat.png")
    prompts = ["a red box", "the sea"]
    processor = CLIPSegProcessor.from_pretrained(folder)
    network = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    inputs = processor(text=prompts, images=[image] * 2, padding=True, return_tensors="pt")
    with torch.no_grad():
        values = network(**inputs).logits.sigmoid()

    for asked in (prompts[:1], prompts[1:], prompts):
        found = load_prompt_finder(folder, asked, 0.5, "cpu").score(image)
        expected = values[[prompts.index(prompt) for prompt in asked]].amax(dim=0).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)  # batches of other sizes round otherwise
    assert np.array_equal(
        load_prompt_finder(folder, prompts, 0.5, "cpu").score(image), values.amax(0).numpy()
    )

    smoothed = cv2.blur(values.amax(0).numpy(), (11, 11), borderType=cv2.BORDER_REPLICATE)
    threshold = float(np.median(smoothed))
    make(pictures, "--what", prompts[0], "--what", prompts[1], "--model", folder, "--threshold", threshold)
    large = cv2.resize(smoothed, (60, 40), interpolation=cv2.INTER_LINEAR)
    expected = cv2.dilate((large > threshold).astype(np.uint8) * 255, np.ones((21, 21), np.uint8))
    np.testing.assert_array_equal(read(pictures / "masks" / "cat.png"), expected)


def test_a_watermark_is_left_out_and_the_rest_learned(pictures: Path, tmp_path: Path) -> None:
    folder = write_clipseg(tmp_path / "clipseg")
    prompts = ("a watermark", "a logo", "text")
    values = load_prompt_finder(folder, prompts, 0.5, "cpu").score(read_image(pictures / "cat.png"))
    words = ("--model", folder, "--threshold", np.median(values), "--smooth_pixels", 0, "--expand_pixels", 0)
    make(pictures, "--watermark", *words, "--output", tmp_path / "without")
    found = [word for each in prompts for word in ("--what", each)]
    make(pictures, *found, *words, "--output", tmp_path / "found")
    without, only = (read(tmp_path / name / "cat.png") for name in ("without", "found"))
    assert {0, 255} == set(np.unique(without))
    np.testing.assert_array_equal(without, 255 - only)


def test_the_foreground_is_that_of_the_network(pictures: Path, tmp_path: Path) -> None:
    path = write_background(tmp_path / "u2net.onnx")
    finder = load_background_finder(path)
    image = read_image(pictures / "cat.png")
    assert isinstance(finder, BackgroundFinder)
    given = finder.to_model_input(image)
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    normal = (small / small.max() - MEAN) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(given[0].transpose(1, 2, 0), normal, atol=1e-6)
    output = 1 / (1 + np.exp(given[0, 2] - given[0, 0]))
    expected = (output - output.min()) / (output.max() - output.min())
    np.testing.assert_allclose(finder.score(image), expected, atol=1e-5)

    make(pictures, "--background", path, "--smooth_pixels", 0, "--expand_pixels", 0, "--threshold", 0.5)
    assert (read(pictures / "masks" / "cat.png") != rectangle(*BOX)).mean() < 0.03

    damaged = BackgroundFinder(path, lambda pictures: pictures * np.float32("nan"), 32)
    with pytest.raises(CheckpointError, match="returns NaN or infinite values"):
        damaged.score(image)
    with pytest.raises(CheckpointError, match="is not a U2Net-like network"):
        load_background_finder(write_yolo(tmp_path / "yolo.onnx", side=0))


def test_faces_are_the_boxes_of_the_detector(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    image = Image.new("RGB", (64, 64))
    image.putpixel((28, 36), (255, 0, 0))  # where the tiny detector looks: a face of 16 pixels around it
    image.save(folder / "one.png")
    make(folder, "--faces", write_yolo(tmp_path / "yolo.onnx"), "--expand_pixels", 0)
    np.testing.assert_array_equal(read(folder / "masks/one.png"), rectangle(20, 28, 36, 44, (64, 64)))


def test_what_a_person_did_is_kept_unless_masks_are_to_be_replaced(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw().save(pictures / "gone.png")
    make(pictures, *COLOR, "--expand_pixels", 1)
    cat, dog, gone, _ = find_mask_entries(pictures)
    drawn = rectangle(0, 0, 5, 5)
    replace_mask(cat, drawn)
    remove_mask(gone)
    caplog.clear()

    make(pictures, "--colour", "#FA1414", "--expand_pixels", 1)  # the same color
    assert "made with other options" not in caplog.text
    make(pictures, *COLOR, "--expand_pixels", 2)
    assert "1 mask kept, made with other options. --overwrite makes them again: dog.webp" in caplog.text
    assert "1 mask kept, drawn or accepted by a person. --mode replace replaces them: cat.png" in caplog.text
    assert "1 mask removed before and not made again; --mode replace does: gone.png" in caplog.text
    assert dog.mask is not None
    np.testing.assert_array_equal(read(dog.mask), grown(1))

    make(pictures, *COLOR, "--expand_pixels", 2, "--overwrite")
    np.testing.assert_array_equal(read(dog.mask), grown(2))
    assert cat.mask is not None
    np.testing.assert_array_equal(read(cat.mask), drawn)

    make(pictures, *COLOR, "--expand_pixels", 3, "--mode", "replace")
    for place in (cat, dog, gone):
        assert place.mask is not None
        np.testing.assert_array_equal(read(place.mask), grown(3))


def test_a_run_that_changes_masks_changes_none_twice(pictures: Path) -> None:
    cat = find_mask_entries(pictures)[0]
    replace_mask(cat, rectangle(0, 0, 60, 5))
    words = (*COLOR, "--expand_pixels", 0, "--mode", "blend", "--alpha", 0.5)
    make(pictures, *words)
    mask = pictures / "masks" / "cat.png"
    blended = np.rint((rectangle(0, 0, 60, 5) / 255 + 0.5 * (rectangle(*BOX) / 255)) / 1.5 * 255)
    np.testing.assert_array_equal(read(mask), blended)
    make(pictures, *words)
    np.testing.assert_array_equal(read(mask), blended)
    make(pictures, *COLOR, "--expand_pixels", 5, "--overwrite")  # a person drew a part of it
    np.testing.assert_array_equal(read(mask), blended)

    make(pictures, *COLOR, "--expand_pixels", 0, "--mode", "subtract")
    np.testing.assert_array_equal(read(mask)[BOX[1], BOX[0] : BOX[2]], 0)


def test_a_stopped_run_goes_on_where_it_was(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(pictures / "eel.mp4", [BOX] * 3)
    make_finder = run._load_finder

    class Stopping:
        """Find in five frames, then stop as Ctrl-C does: in the middle of the clip."""

        def __init__(self, options: object) -> None:
            self.finder, self.left = make_finder(options), 4  # type: ignore[arg-type]

        def score(self, frame: np.ndarray) -> np.ndarray:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return self.finder.score(frame)

    words = (*COLOR, "--colour_distance", 0.3, "--steady_frames", 0)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_load_finder", Stopping)
        with pytest.raises(KeyboardInterrupt):
            make(pictures, *words)
    masks = pictures / "masks"
    assert sorted(path.name for path in masks.iterdir()) == [".before", "cat.png", "dog.png"]
    stamp = (masks / "cat.png").stat().st_mtime_ns
    make(pictures, *words)
    assert len(list((masks / "eel").iterdir())) == 3
    assert (masks / "cat.png").stat().st_mtime_ns == stamp


def test_folders_below_have_their_own_masks(pictures: Path) -> None:
    draw().save(pictures.parent / "top.png")
    make(pictures.parent, *COLOR, "--recursive")
    make(pictures.parent, *COLOR, "--recursive")
    assert (pictures.parent / "masks" / "top.png").is_file()
    assert (pictures / "masks" / "cat.png").is_file()
    assert not list(pictures.parent.glob("**/masks/masks"))


def test_files_that_cannot_be_read_are_told_after_the_others(pictures: Path) -> None:
    (pictures / "bad.png").write_bytes(b"no picture")
    (pictures / "bad.mp4").write_bytes(b"no clip")
    with pytest.raises(DatasetError, match=r"bad\.mp4 and bad\.png would have the same mask"):
        make(pictures, *COLOR)
    (pictures / "bad.mp4").rename(pictures / "worse.mp4")
    with pytest.raises(DatasetError, match=r"2 of the 5 files could not be used.*\n.*bad\.png(.|\n)*worse"):
        make(pictures, *COLOR)
    assert (pictures / "masks" / "dog.png").is_file()


def test_nothing_is_written_by_a_dry_run(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    make(pictures, *COLOR, "--dry_run")
    assert not (pictures / "masks").exists()
    assert "3 masks would be made: cat.png, dog.webp, plain.png. Nothing is written" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"Say what to find: --what"),
        (("--what", " "), "--what is empty"),
        (("--what", "a", *COLOR), "--what"),
        (("--colour", "green"), "six hexadecimal digits"),
        ((*COLOR, "--overwrite", "--mode", "add"), "--overwrite is for --mode fill"),
        ((*COLOR, "--output", "{folder}"), "Pass --beside"),
        ((*COLOR, "--output", "x", "--beside"), "--output"),
        (("--background", "nothing.onnx"), "nothing.onnx"),
    ],
)
def test_a_mistake_is_one_sentence(pictures: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises((OptionError, CheckpointError), match=message):
        make(pictures, *(word.format(folder=pictures) for word in words))
    assert not (pictures / "masks").exists()


def test_a_missing_model_is_named_with_what_downloads_it(pictures: Path, tmp_path: Path) -> None:
    done = run_script("tools/mask.py", pictures, "--what", "a cat", folder=tmp_path, check=False)
    assert_user_error(done, "--model models", "tools/download.py --family tools --task clipseg --to models")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="a model of the kind clip"):
        make(pictures, "--what", "a cat", "--model", tmp_path / "other")


class Words:
    """A processor without torchvision, which SAM 3's own needs: tokens are letters."""

    def __call__(self, images: np.ndarray, text: str, return_tensors: str) -> BatchEncoding:
        assert return_tensors == "pt"
        pixels = torch.from_numpy(cv2.resize(images, (56, 56))).permute(2, 0, 1)[None] / 127.5 - 1
        tokens = torch.tensor([[*text.encode()[:8], vocabulary() - 1]])
        return BatchEncoding(
            {"pixel_values": pixels, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        )


def test_words_give_all_things_that_sam_3_is_sure_of(pictures: Path, tmp_path: Path) -> None:
    network = make_sam3()
    image = read_image(pictures / "cat.png")
    prompts = ["a red box", "the sea"]
    expected = {}
    for prompt in prompts:
        with torch.no_grad():
            outputs = network(**Words()(image, prompt, "pt"))
        scores = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid())[0]
        expected[prompt] = scores, outputs.pred_masks.sigmoid()[0]
    scores, masks = expected[prompts[0]]
    minimum = float(scores.sort().values[-3:-1].mean())  # two of the five things
    assert int((scores > minimum).sum()) == 2

    found = PromptFinder(network, Words(), prompts[:1], minimum).score(image)

    np.testing.assert_array_equal(found, masks[scores > minimum].amax(0))
    both = PromptFinder(network, Words(), prompts, 0.0).score(image)
    maximum = torch.maximum(*(expected[prompt][1].amax(0) for prompt in prompts))
    np.testing.assert_array_equal(both, maximum)
    assert not PromptFinder(network, Words(), prompts, 1.0).score(image).any()
    network.save_pretrained(tmp_path / "sam3")
    assert read_kind(tmp_path / "sam3") == "sam3"
    (tmp_path / "sam3" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Sam3ImageProcessor"}', encoding="utf-8"
    )
    if not find_spec("torchvision"):
        with pytest.raises(InstallationError, match="Run: pip install torchvision"):
            load_prompt_finder(tmp_path / "sam3", prompts, 0.5, "cpu")
