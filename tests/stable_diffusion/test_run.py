"""Runs of gen_img.py with a maker of plain pictures."""

import builtins
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modules.errors import MemoryPlanError, OptionError, UserError
from modules.media.reading import read_tags
from stable_diffusion.run import generate, viewer_command
from tests.stable_diffusion.loaded import PlainMaker, options, write_image

SIZE = ("--W", 16, "--H", 16)


def run(folder: Path, *arguments: object, maker: PlainMaker | None = None) -> PlainMaker:
    maker = maker or PlainMaker()
    generate(options("--outdir", folder / "out", *SIZE, *arguments), maker.load)
    return maker


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


def prompts_of(folder: Path) -> list[str]:
    return sorted(read_tags(path)["prompt"] for path in (folder / "out").iterdir())


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


def test_lines_of_a_file_are_made_in_batches(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "# no", "", "eins für 1", "two --s 3", "three --s 3", "four --s 3")
    maker = run(tmp_path, "--from_file", path, "--batch_size", 2, "--sequential_file_name")
    assert [[image.prompt for image in batch] for batch in maker.batches] == [
        ["eins für 1"],
        ["two", "three"],
        ["four"],
    ]
    assert names(tmp_path) == [f"im_00000{number}.png" for number in range(1, 5)]


def test_the_same_command_has_the_same_seeds(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "a {1|2|3}", "b", "c --d 4,5")
    asked = ("--from_file", path, "--n_iter", 3, "--images_per_prompt", 2, "--seed", 5, "--shuffle_prompts")
    first, second = (run(tmp_path / name, *asked) for name in "xy")
    one_batch = run(tmp_path / "z", *asked, "--batch_size", 5)

    said = [(image.seed, image.prompt, image.label) for image in first.pictures]
    assert said == [(image.seed, image.prompt, image.label) for image in second.pictures]
    assert said == [(image.seed, image.prompt, image.label) for image in one_batch.pictures]
    assert len(said) == 18
    assert [len(batch) for batch in one_batch.batches] == [5, 5, 5, 3]  # rounds share batches
    rounds = [[label.split(",")[0] for _, _, label in said[start : start + 6]] for start in (0, 6, 12)]
    assert len({tuple(labels) for labels in rounds}) > 1
    assert all(sorted(labels) == sorted(rounds[0]) for labels in rounds)


# Failures


def test_a_wrong_line_is_told_and_the_rest_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path, "a --w 17", "b", "c {x --s 0|x --s 0}", "d")
    with pytest.raises(
        UserError, match=r"prompts.txt: 2 of 4 failed:\n  line 1: OptionError: --W 17"
    ) as caught:
        run(tmp_path, "--from_file", path)
    assert "line 3: OptionError: --steps 0" in str(caught.value)
    assert prompts_of(tmp_path) == ["b", "d"]
    assert caught.value.exit_code == 1


def test_nothing_is_loaded_if_no_line_can_be_used(tmp_path: Path) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    for asked in (["--prompt", "a --s 0"], ["--from_file", write_lines(tmp_path, "a --s 0", "b --d x")]):
        with pytest.raises(UserError):
            generate(options("--outdir", tmp_path / "out", *asked), load)  # type: ignore[arg-type]


def test_what_fails_in_a_batch_does_not_take_the_others_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path, "a", "broken", "c")
    with pytest.raises(UserError, match="1 of 3 failed:\n  line 2: RuntimeError: no such thing"):
        run(tmp_path, "--from_file", path, "--batch_size", 4, maker=PlainMaker(fails_on="broken"))
    assert prompts_of(tmp_path) == ["a", "c"]
    assert "A batch of 3 images failed and is generated one by one: no such thing" in caplog.text


def test_a_single_prompt_that_fails_is_the_error(tmp_path: Path) -> None:
    maker = PlainMaker(fails_on="a", error=OptionError)
    with pytest.raises(OptionError, match="^no such thing$"):
        run(tmp_path, "--prompt", "a", maker=maker)


def test_too_little_memory_says_what_to_do(tmp_path: Path) -> None:
    maker = PlainMaker(fails_on="a", error=torch.OutOfMemoryError)
    with pytest.raises(MemoryPlanError, match="too little memory for 1 image of 16 x 16(.|\n)*--vae_slices"):
        run(tmp_path, "--prompt", "a", maker=maker)


# Input pictures


def test_prompts_come_from_the_metadata_of_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "in" / "a.png", prompt="first {x|y}", negative_prompt="bad")
    write_image(tmp_path / "in" / "b.png")
    write_image(tmp_path / "in" / "c.png", prompt="third")
    maker = run(tmp_path, "--image_path", tmp_path / "in", "--use_original_file_name")
    assert [(one.prompt, one.negative_prompt) for one in maker.pictures] == [
        ("first {x|y}", "bad"),
        ("third", ""),
    ]
    assert names(tmp_path) == ["a.png", "c.png"]
    assert "b.png is skipped because its metadata contains no prompt" in caplog.text


def test_pictures_without_prompts_are_an_error(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    with pytest.raises(OptionError, match="There is no prompt"):
        run(tmp_path, "--image_path", image)


def test_pictures_that_are_not_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.png")
    with caplog.at_level(logging.WARNING):
        run(tmp_path, "--image_path", tmp_path / "in", "--prompt", "x")
    assert "2 images of --image_path were not used" in caplog.text
    assert "--images_per_prompt to 3" in caplog.text


# Modules

MODULE = """
def get_prompter(args, pipe, networks):
    assert args.ckpt.name == "model.safetensors" and args.prompter_module_args == "7" and networks is None
    assert pipe.kind.name == "sd1" and args.prompt == "a cat"

    def prompter(args, pipe, seed_random, iter_seed, prompt_index, global_step):
        if prompt_index == 2:
            return None
        if prompt_index == 1:
            return [f"one --d {args.prompter_module_args}"]
        return [f"{args.prompt} {global_step} --d {seed_random.randint(1, 9)}", f"b {iter_seed}"]

    return prompter
"""


def write_module(folder: Path, text: str) -> Path:
    path = folder / "my prompts.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_module_makes_prompts(tmp_path: Path) -> None:
    module = write_module(tmp_path, MODULE)
    asked = (
        *("--from_module", module, "--prompter_module_args", "7", "--prompt", "a cat"),
        *("--images_per_prompt", 2),
    )
    maker = run(tmp_path, *asked, "--batch_size", 8)
    said = [(image.prompt, image.label) for image in maker.pictures]
    assert said == [("a cat 0", "prompt 1"), ("b None", "prompt 2"), ("one", "prompt 3"), ("one", "prompt 3")]
    assert maker.pictures[2].seed == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("get_prompter = lambda *a: 1 / 0", "get_prompter failed: ZeroDivisionError"),
        ("get_prompter = lambda *a: None", "get_prompter returned no function"),
        ("get_prompter = lambda *a: lambda *b: 1 / 0", "the prompter failed: ZeroDivisionError"),
        ("get_prompter = lambda *a: lambda *b: 'a text'", "the prompter returned str"),
    ],
)
def test_a_module_that_fails_is_one_message(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, "--from_module", write_module(tmp_path, text))
    assert words in str(caught.value)


def test_a_module_may_be_an_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "prompts_for_a_test.py").write_text(
        "get_prompter = lambda *a: lambda *b: [f'p{b[4]}'] if b[4] < 3 else None", encoding="utf-8"
    )
    assert len(run(tmp_path, "--from_module", "prompts_for_a_test").pictures) == 3
    for wrong in ("no/path", "nothing_of_that_name"):
        with pytest.raises(OptionError, match="--from_module"):
            run(tmp_path, "--from_module", wrong)


# Conversation


def test_a_conversation_goes_on_after_mistakes_and_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: Iterator[str | type[BaseException]] = iter(
        ["a --d 3", "", "b --s 0", KeyboardInterrupt, "stop", "stop", "c --d 4", EOFError]
    )

    def read(sign: str) -> str:
        line = next(said)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)
    with caplog.at_level(logging.INFO):
        run(
            tmp_path,
            *("--interactive", "--no_preview"),
            maker=PlainMaker(fails_on="stop", error=KeyboardInterrupt),
        )
    assert prompts_of(tmp_path) == ["a", "c"]
    assert caplog.text.count("The prompt is cancelled. quit or Ctrl-D ends.") == 3
    assert "the prompt is skipped. OptionError: --steps 0" in caplog.text


def test_a_viewer_needs_a_screen() -> None:
    assert viewer_command("win32", {}) == "explorer"
    assert viewer_command("linux", {}) is None
