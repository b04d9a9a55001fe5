"""The scripts in finetune/: what users of sd-scripts type does what our tools do."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.captions.asking import reword
from data_tools.cleaning import clean_caption, clean_tags
from data_tools.folder_captions import GitCaptionOptions, wording_without_writing
from dataset.listing import find_sources
from dataset.subset_options import SubsetOptions
from dataset.subsets import folders_config
from modules.script_options import parse_options
from tests.data_tools.captions.making import run_server
from tests.data_tools.tags.making import first_pixel_weights, write_tagger
from tests.dataset.making import make_image
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1
from tests.tiny.vision_model import WORDS, write_git


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


def read(folder: Path) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
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


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("1girl, blue_eyes, ^_^, rating:safe", "1girl, blue eyes, ^_^"),
        ("shirt, white_shirt, hair ornament, star hair ornament", "white shirt, star hair ornament"),
        ("2girls, red hair, blue hair, long hair, bob cut, sky", "2girls, long hair, bob cut, sky"),
        ("2boys, red eyes, long hair, short hair, sleeveless", "2boys, red eyes, sleeveless"),
        ("1girl, red hair, blue hair", "1girl, red hair, blue hair"),
    ],
)
def test_tags_are_cleaned(tags: str, cleaned: str) -> None:
    assert clean_tags(tags) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("An anime woman and a young man", "A girl and a man"),
        ("a cartoon anime drawing of two cartoon women", "a drawing of two girls"),
        ("a cartoon image of a game character", "an image of a game character"),
        ("anime anime girl, a lady", "girl, a girl"),
    ],
)
def test_captions_are_cleaned(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_a_metadata_file_is_cleaned(folder: Path) -> None:
    script = "finetune/clean_captions_and_tags.py"
    entry = {"caption": "a woman", "tags": "red_hat", "train_resolution": [64, 64]}
    (folder / "old.json").write_text(json.dumps({"a": entry, "b": {}}), encoding="utf-8")
    printed = io.StringIO()
    words = ["old.json", "meta.json", "--debug"]
    code, said = run_here(script, *words, folder=folder, printed=printed)
    assert code == 0
    assert "a: tags: red_hat -> red hat" in printed.getvalue()
    assert "2 texts changed" in said
    changed = {"caption": "a girl", "tags": "red hat", "train_resolution": [64, 64]}
    assert read(folder) == {"a": changed, "b": {}}
    (folder / "old.json").write_text('{"a": {"tags": ["x"]}}', encoding="utf-8")
    code, said = run_here(script, "old.json", "meta.json", folder=folder)
    assert_one_message(code, said, "'a': tags is not text")


def test_captions_of_a_folder_come_from_git(folder: Path) -> None:
    model = write_git(folder / "git")
    script = "finetune/make_captions_by_git.py"
    words: list[object] = ["images", "--model_id", model, "--max_length", 4, "--recursive", "--device", "cpu"]
    succeed_here(script, *words, "--batch_size", 2, folder=folder)
    caption = (folder / "images" / "b c.caption").read_text(encoding="utf-8").split()
    assert caption
    assert set(caption) <= set(WORDS)
    assert (folder / "images" / "a.caption").read_text(encoding="utf-8") == "one\n"  # it was there

    (folder / "images" / "b c.caption").unlink()
    succeed_here(script, *words, "--batch_size", 1, folder=folder)
    assert (folder / "images" / "b c.caption").read_text(encoding="utf-8").split() == caption
    words = ["--dataset_config", "data.toml", "--model", model, "--prompt", "What is it?", "--overwrite_all"]
    (folder / "data.toml").write_text('[[datasets]]\nimage_directory = "images"', encoding="utf-8")
    code, said = run_here("tools/caption_dataset.py", *words, folder=folder)
    assert_one_message(code, said, "accepts no text: omit --prompt")


def test_writing_in_an_image_is_left_out_of_captions(tmp_path: Path) -> None:
    wording = wording_without_writing(
        GitCaptionOptions.from_defaults(train_data_dir=tmp_path, remove_words=True)
    )
    captions = {
        'a sign with the words "keep out" on it': "a sign",
        "a cat, with a sign that says 'hi' on it": "a cat",
        "a man and the number 7 on his shirt, smiling": "a man, smiling",
        "a cat with the dog": "a cat with the dog",
    }
    assert {caption: reword(caption, wording) for caption in captions} == captions


@pytest.mark.slow
def test_latents_of_a_metadata_file_are_prepared_for_a_training(folder: Path) -> None:
    model = write_sd1(folder)
    make_image(folder / "images" / "wide.png", size=(96, 32))
    content = {name: {"caption": "a cat"} for name in ("a", "sub/a", "wide", str(folder / "images" / "b c"))}
    (folder / "old.json").write_text(json.dumps(content), encoding="utf-8")
    words = ["--max_resolution", "64,64", "--min_bucket_reso", 32, "--bucket_reso_steps", 32, "--v2"]
    words = [
        "images",
        "old.json",
        "meta.json",
        model,
        *words,
        "--flip_aug",
        "--batch_size",
        2,
        "--device",
        "cpu",
    ]
    script = "finetune/prepare_buckets_latents.py"
    assert "4 written" in succeed_here(script, *words, folder=folder)
    assert "4 kept" in succeed_here(script, *words, folder=folder)

    sizes = {name: entry["train_resolution"] for name, entry in read(folder).items()}
    assert sizes["wide"] == [96, 32]
    with np.load(folder / "images" / "wide_0096x0032_sd.npz") as file:
        assert file["latents"].shape == file["latents_flipped"].shape == (4, 4, 12)
    data = ["--train_data_dir", "images", "--in_json", "meta.json", "--resolution", 64, "--enable_bucket"]
    data += ["--min_bucket_reso", 32, "--bucket_reso_steps", 32, "--flip_aug", "--cache_latents_to_disk"]
    tokenizer_folder(folder / "tokenizers")
    train = [
        "--pretrained_model_name_or_path",
        model,
        "--tokenizer_cache_dir",
        "tokenizers",
        "--max_train_steps",
        1,
    ]
    train += ["--output_dir", "out"]
    said = succeed_here("train_network.py", *train, *data, "--network_dim", 2, folder=folder)
    assert "4 sources, 0 of them to encode" in said

    (folder / "images" / "broken.png").write_bytes(b"no image")
    (folder / "old.json").write_text('{"a": {}, "broken": {}}', encoding="utf-8")
    code, said = run_here(script, *words, folder=folder)
    assert code
    assert "broken.png" in said
    assert read(folder) == {"a": {"train_resolution": [64, 64]}, "broken": {}}
    (folder / "old.json").write_text('{"gone": {}}', encoding="utf-8")
    code, said = run_here(script, *words, folder=folder)
    assert_one_message(code, said, "'gone': there is no such image")
