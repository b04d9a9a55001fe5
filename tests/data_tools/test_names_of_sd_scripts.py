"""The scripts in finetune/: what users of sd-scripts type does what our tools do."""

import json
from pathlib import Path

import pytest

from dataset.listing import find_sources
from dataset.subset_options import SubsetOptions
from dataset.subsets import folders_config
from modules.script_options import parse_options
from tests.data_tools.captions.making import run_server
from tests.data_tools.tags.making import first_pixel_weights, write_tagger
from tests.dataset.making import make_image
from tests.faults.messages import assert_one_message, run_here, succeed_here


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "sub/a", "b c"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(tmp_path / "images" / f"{name}.png", colour=(255, 0, 0))
    texts = {"a.caption": "one\n", "sub/a.caption": "far", "a.txt": "x, y", "b c.txt": "z"}
    for name, text in texts.items():
        (tmp_path / "images" / name).write_text(text, encoding="utf-8")
    return tmp_path


def merge(folder: Path, what: str, *words: str) -> str:
    script = f"finetune/merge_{what}_to_metadata.py"
    return succeed_here(script, "images", "meta.json", *words, folder=folder)


def read(folder: Path) -> dict[str, dict[str, str]]:
    content: dict[str, dict[str, str]] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return content


def test_captions_and_tags_of_a_folder_are_what_a_training_reads_by_in_json(folder: Path) -> None:
    said = merge(folder, "captions", "--recursive")
    assert "1 image without a .caption file" in said
    merge(folder, "dd_tags")

    assert read(folder) == {
        "a": {"caption": "one", "tags": "x, y"},
        "sub/a": {"caption": "far"},
        "b c": {"tags": "z"},
    }
    words = ["--train_data_dir", str(folder / "images"), "--in_json", str(folder / "meta.json")]
    words += ["--resolution", "64"]
    (table,) = folders_config(parse_options(None, words, SubsetOptions)[0]).datasets
    captions = {source.path: source.caption for source in find_sources(table)}
    images = folder / "images"
    expected = {"a.png": "one, x, y", "sub/a.png": "far", "b c.png": "z"}
    assert captions == {images / name: text for name, text in expected.items()}


def test_whole_paths_and_another_file_to_begin_with(folder: Path) -> None:
    kept = {"tags": "kept", "train_resolution": [64, 64]}
    (folder / "old.json").write_text(json.dumps({"else": kept}), encoding="utf-8")
    merge(folder, "captions", "--in_json", "old.json", "--full_path", "--caption_extention", ".txt")

    image = (folder / "images" / "a.png").resolve()
    content = read(folder)
    assert content["else"] == kept
    assert content[str(image)] == {"caption": "x, y"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["images", "meta.txt"], "ends in .json"),
        (["images", "meta.json", "--caption_extension", ".nix"], "no image has a file that ends in .nix"),
        (["images", "meta.json", "--in_json", "images/a.txt"], "cannot be read as JSON"),
    ],
)
def test_what_cannot_be_merged_is_refused(words: list[str], reason: str, folder: Path) -> None:
    code, said = run_here("finetune/merge_captions_to_metadata.py", *words, folder=folder)
    assert_one_message(code, said, reason)
    assert not (folder / "meta.json").exists()


def test_the_taggers_name_writes_tags(folder: Path) -> None:
    tagger = write_tagger(folder / "tagger", first_pixel_weights(red=(0, 0, 1 / 255)))
    words: list[object] = ["images", "--model_dir", tagger, "--onnx", "--recursive", "--batch_size", 2]
    succeed_here("finetune/tag_images_by_wd14_tagger.py", *words, folder=folder)
    assert (folder / "images" / "sub" / "a.txt").read_text(encoding="utf-8") == "red"
    assert (folder / "images" / "a.txt").read_text(encoding="utf-8") == "x, y"  # it was there
    words = ["images", "--output_path", "meta.json"]
    code, said = run_here("finetune/tag_images_by_wd14_tagger.py", *words, folder=folder)
    assert_one_message(code, said, "merge_dd_tags_to_metadata.py")


def test_captions_of_a_folder_come_from_a_model(folder: Path) -> None:
    with run_server(lambda number, body: "a red square") as server:
        words = [
            "images",
            "--recursive",
            "--max_length",
            20,
            "--api_model",
            "x",
            "--api_base",
            server.address,
        ]
        succeed_here("finetune/make_captions.py", *words, folder=folder)
    assert server.bodies[0]["max_tokens"] == 20
    assert (folder / "images" / "b c.caption").read_text(encoding="utf-8").strip() == "a red square"
    assert (folder / "images" / "a.caption").read_text(encoding="utf-8") == "one\n"
    code, said = run_here("finetune/make_captions.py", "images", "--caption_weights", "x.pth", folder=folder)
    assert_one_message(code, said, "pickle")
