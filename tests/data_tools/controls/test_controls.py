"""Control pictures of a folder: edges by OpenCV, depth by a tiny random model of transformers."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from data_tools.controls.depth import DepthModel, load_depth_model
from data_tools.controls.run import ControlImageOptions, make_control_images
from modules.errors import CheckpointError, DatasetError, OptionError
from modules.media.reading import read_image, read_tags
from modules.script_options import parse_options
from tests.commands import run_script

SIZES = {"cat.jpg": (60, 40), "dog.png": (40, 60), "tree.webp": (48, 48)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "a b ü" / "pictures"
    folder.mkdir(parents=True)
    for name, size in SIZES.items():
        image = Image.new("RGB", size, (10, 20, 90))
        image.paste((250, 200, 40), (10, 12, 30, 28))
        image.save(folder / name)
        (folder / name).with_suffix(".txt").write_text("a caption", encoding="utf-8")
    return folder


def make(folder: Path, *words: object) -> None:
    make_control_images(parse_options("", [str(folder), *map(str, words)], ControlImageOptions)[0])


def write_depth_model(folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        **settings,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_edges_have_the_names_of_their_pictures(pictures: Path) -> None:
    done = run_script("tools/control_pictures.py", pictures, "--canny", "50", "150")

    output = pictures / "conditioning"
    assert f'conditioning_data_dir = "{output.as_posix()}"' in done.stdout + done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["cat.png", "dog.png", "tree.png"]
    for name in SIZES:
        gray = cv2.cvtColor(read_image(pictures / name), cv2.COLOR_RGB2GRAY)
        edges = read_image((output / name).with_suffix(".png"))
        assert np.array_equal(edges, np.stack([cv2.Canny(gray, 50, 150)] * 3, axis=2))
        assert set(np.unique(edges)) == {0, 255}


def test_what_exists_is_kept_and_only_own_files_are_made_again(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = pictures.parent / "edges"
    output.mkdir()
    Image.new("RGB", (60, 40)).save(output / "cat.jpg")
    foreign = (output / "cat.jpg").read_bytes()
    make(pictures, "--canny", "--output", output)
    assert "1 control image kept, not made by this program" in caplog.text
    assert read_tags(output / "dog.png")["control_picture"] == "canny 63 191"
    (output / "dog.png").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in output.iterdir()}

    make(pictures, "--canny", "--output", output)

    assert sorted(path.name for path in output.iterdir()) == ["cat.jpg", "dog.png", "tree.png"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    caplog.clear()
    make(pictures, "--canny", 10, 20, "--output", output)
    assert "2 control images kept, made with other options. --overwrite makes them again" in caplog.text
    make(pictures, "--canny", 10, 20, "--output", output, "--overwrite")
    assert read_tags(output / "tree.png")["control_picture"] == "canny 10 20"
    assert (output / "cat.jpg").read_bytes() == foreign


def test_a_damaged_picture_is_told_after_the_others_are_done(pictures: Path) -> None:
    (pictures / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"1 of the 4 images could not be used.*\n.*bad\.png"):
        make(pictures, "--canny")
    assert len(list((pictures / "conditioning").iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--canny for edges, or --depth FOLDER"),
        (("--canny", "5"), "two numbers, LOW and HIGH, or none, not 1"),
        (("--canny", "9", "5"), "the first is the lower threshold"),
        (("--canny", "--output", "{folder}"), "need a folder of their own"),
    ],
)
def test_a_mistake_is_one_sentence(pictures: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(pictures, *(word.format(folder=pictures) for word in words))
    assert not (pictures / "conditioning").exists()


def test_two_pictures_cannot_share_a_control_picture(pictures: Path) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "cat.png")
    with pytest.raises(DatasetError, match=r"cat\.jpg and cat\.png would have the same control image"):
        make(pictures, "--canny")


def test_depth_spans_black_to_white_and_fits_the_picture(pictures: Path, tmp_path: Path) -> None:
    model = write_depth_model(tmp_path / "depth_model")

    make(pictures, "--depth", model, "--device", "cpu")

    path = pictures / "conditioning" / "cat.png"
    image, depth = read_image(pictures / "cat.jpg"), read_image(path)
    network = DPTForDepthEstimation.from_pretrained(model)
    with torch.no_grad():
        predicted = network(**DPTImageProcessor.from_pretrained(model)(images=image, return_tensors="pt"))
    expected = torch.nn.functional.interpolate(
        predicted.predicted_depth[:, None], size=(40, 60), mode="bicubic"
    )
    expected = (expected - expected.min()) / (expected.max() - expected.min()) * 255
    assert depth.shape == (40, 60, 3)
    assert np.abs(depth[..., 0] - expected[0, 0].numpy()).max() <= 1
    assert (depth.min(), depth.max()) == (0, 255)
    assert read_tags(path)["control_picture"] == "depth depth_model"


def test_distances_become_white_where_they_are_near(pictures: Path, tmp_path: Path) -> None:
    loaded = load_depth_model(write_depth_model(tmp_path / "depth_model"), "cpu")
    image = read_image(pictures / "cat.jpg")
    inverse = loaded.draw(image).astype(int)

    loaded.network.config.depth_estimation_type = "metric"
    distances = DepthModel(loaded.network, loaded.processor).draw(image).astype(int)

    assert np.corrcoef(inverse[..., 0].ravel(), distances[..., 0].ravel())[0, 1] < 0


def test_a_folder_without_a_depth_model_is_one_sentence(pictures: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no config.json in this folder"):
        make(pictures, "--depth", pictures)
    (pictures / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="it contains no weights"):
        make(pictures, "--depth", pictures)
