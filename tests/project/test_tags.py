"""Folders whose captions are lists of tags: what `new` makes of them, by what the model reads."""

import io
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from dataset.config import load_dataset_config
from modules.text_files import parse_toml
from project.tags import TagLists, find_tags
from tests.faults.messages import run_here, succeed_here

LISTS = ["1girl, red_hair, smile, garden", "1girl, red_hair, o_o, score_7", "1girl, red_hair, hat"]
ANIMA = ["--family", "anima", "--memory", "12"]


def found(*captions: str) -> TagLists:
    tags = find_tags(captions)
    assert tags is not None
    return tags


@pytest.mark.parametrize(
    "captions",
    [
        [],
        ["a cat sits on a chair"],
        ["a girl with red hair stands in a garden, smiling, seen from the side"],
        ["1girl, red hair, garden. A girl stands in a garden"],
        ["a cat, a chair"],
        ["red_hair is what the girl has in the image"],
        [*LISTS[:2], "a girl stands in a garden", "a cat on a chair"],
    ],
)
def test_sentences_and_short_captions_are_no_lists(captions: list[str]) -> None:
    assert find_tags(captions) is None


@pytest.mark.parametrize(
    ("captions", "trigger", "keys"),
    [
        (LISTS, None, {"keep_tokens": 2}),
        (LISTS, "ohwx", {"keep_tokens": 3}),
        (LISTS, "1girl", {"keep_tokens": 2}),
        (["hat, 1girl, smile", "1girl, hat, garden"], None, {}),
        (["hat, 1girl, smile", "1girl, hat, garden"], "ohwx", {"keep_tokens": 1}),
        (LISTS[:1], None, {"keep_tokens": 1}),
        ([*LISTS * 2, "a girl stands in a garden"], None, {"keep_tokens": 2}),
        (["ohwx, 1girl ||| hat, smile"] * 2, None, {"keep_tokens_separator": "|||"}),
        (["1girl, {red|{blue|green}} hat, smile", "1girl, hat, garden"], None, {"enable_wildcard": True}),
        (["1girl red_hair long_hair solo", "1girl blue_eyes hat"], None, {"caption_separator": " "}),
    ],
)
def test_keys_are_those_of_what_the_lists_share(
    captions: list[str], trigger: str | None, keys: dict[str, Any]
) -> None:
    made = found(*captions).make_keys(trigger)
    kept = {"keep_tokens": 1} if "enable_wildcard" in keys or "caption_separator" in keys else {}
    assert made == {"shuffle_caption": True, **kept, **keys}


def test_tags_are_written_with_blanks() -> None:
    tags = found(*LISTS)
    assert tags.first_with_underscore == "red_hair"
    assert tags.shared_tags == ["1girl", "red_hair"]
    assert found("1girl, score_7, o_o").first_with_underscore is None


def write_folder(folder: Path, captions: list[str]) -> None:
    folder.mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (96, 96), (number * 9, 90, 10)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")


class Description(NamedTuple):
    """What `new` says, and the files that it writes."""

    said: str
    dataset: dict[str, Any]
    run: dict[str, Any]


def describe(folder: Path, *words: str) -> Description:
    printed = io.StringIO()
    code, errors = run_here("reelsmith.py", "new", folder, *words, folder=folder.parent, printed=printed)
    assert code == 0, errors
    names = ("dataset.toml", "run.toml")
    files = (parse_toml((folder / name).read_text(encoding="utf-8")) for name in names)
    return Description(printed.getvalue(), *files)


def test_a_folder_of_tags_is_shuffled_and_its_samples_are_tags(tmp_path: Path) -> None:
    folder = tmp_path / "my girl"
    write_folder(folder, LISTS * 4)

    said, dataset, run = describe(folder, *ANIMA)

    assert "12 captions: lists of tags (1girl, red_hair, smile, ...)" in said
    assert "(shuffle_caption), but for the first 2 (keep_tokens)" in said
    assert (dataset["general"]["shuffle_caption"], dataset["general"]["keep_tokens"]) == (True, 2)
    (table,) = load_dataset_config(folder / "dataset.toml").datasets
    assert table.captions.changes.varying_keys == ("shuffle_caption",)
    scripts = [words[1] for words in run["reelsmith"]["commands"]]
    cache = "anima_cache_latents.py"
    assert scripts == ["tools/download.py", cache, cache, "anima_train_network.py"]
    assert "qwen3" in run["training"]  # which encodes the captions
    first, *_ = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("masterpiece, best quality, score_7, safe, 1girl, red hair, in falling snow --w")
    assert "--n worst quality, low quality" in first


@pytest.mark.parametrize("separator", [", ", " "])
def test_the_printed_command_writes_blanks(tmp_path: Path, separator: str) -> None:
    folder = tmp_path / "my girl"
    lists = LISTS if separator == ", " else ["1girl red_hair o_o", "1girl red_hair hat score_7"]
    write_folder(folder, lists)

    said, _, _ = describe(folder, *ANIMA)
    (command,) = (line for line in said.splitlines() if "--replace_regex" in line)
    _, script, *words = shlex.split(command)
    succeed_here(f"tools/{Path(script).name}", *words, folder=folder)

    texts = [(folder / f"{number}.txt").read_text(encoding="utf-8").strip() for number in range(len(lists))]
    assert texts == [", ".join(one.split(separator)).replace("red_hair", "red hair") for one in lists]
    assert (folder / "0.txt.bak").exists()
    again = [line for line in said.splitlines() if "--overwrite" in line]
    assert len(again) == (separator == " ")
    if again:
        _, _, _, _, *words = shlex.split(again[0])
        assert "--replace_regex" not in describe(folder, *words).said
        assert "caption_separator" not in (folder / "dataset.toml").read_text(encoding="utf-8")


def test_a_model_of_sentences_learns_them_as_they_stand(tmp_path: Path) -> None:
    folder = tmp_path / "girl"
    write_folder(folder, LISTS)
    said, dataset, run = describe(folder, "--family", "krea2", "--memory", "24")
    assert "used unchanged: krea2 raw was trained on sentences" in said
    assert "shuffle_caption" not in dataset["general"]
    assert any("text_encoder" in words[1] for words in run["reelsmith"]["commands"])


def test_captions_without_tags_get_no_line(tmp_path: Path) -> None:
    folder = tmp_path / "girl"
    write_folder(folder, ["a girl stands in a garden"] * 3)
    said, dataset, _ = describe(folder, *ANIMA)
    assert "lists of tags" not in said
    assert "shuffle_caption" not in dataset["general"]


def test_tags_and_regularisation_pictures_together(tmp_path: Path) -> None:
    folder = tmp_path / "girl"
    write_folder(folder, LISTS)
    write_folder(folder / "reg", ["1girl, hat, smile"])
    sdxl = ["--family", "stable_diffusion", "--task", "xl", "--memory", "12"]
    said, dataset, _ = describe(folder, *sdxl)
    assert "Models made from stable_diffusion xl on tags read such lists" in said
    subsets = dataset["datasets"][0]["subsets"]
    assert [subset.get("is_reg", False) for subset in subsets] == [False, True]
    assert dataset["general"]["shuffle_caption"]
