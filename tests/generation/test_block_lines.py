"""Strengths of LoRA blocks in prompt lines: --lb equals --lora_blocks, which equals a written file."""

import builtins
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import wan_generate_video
from generation.prompt_lines import parse_generation_line
from modules.errors import OptionError, UserError
from modules.media.reading import read_tags
from networks.rewriting_blocks import BlockOptions, rewrite_blocks
from tests.generation.guided import Script
from tests.generation.test_run import Typing
from tests.generation.test_sheets import compared
from tests.tiny.loras import write_lora_of_blocks
from tests.tiny.wan import TinyWan, write_tiny_wan

SMALL = ("--video_size", "32", "48", "--video_length", "5", "--infer_steps", "2", "--device", "cpu")
HALF = "0=0.5, 1=0"


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    files = write_tiny_wan(tmp_path_factory.mktemp("t2v"))
    write_lora_of_blocks(files.dit.parent / "a.safetensors", files.dit, r"blocks.\d+.(self_attn.q|ffn.0)")
    return files


def script(files: TinyWan, *more: object) -> Script:
    lora = ("--lora_weight", files.dit.parent / "a.safetensors")
    return Script(wan_generate_video.main, ["--task", "t2v-1.3B", *SMALL, *files.models, *lora, *more])


def one(folder: Path, files: TinyWan, *more: object) -> Tensor:
    return script(files, *more).one(folder, "--prompt", "a cat", "--seed", 7)


def all_made(made_by: Script, folder: Path, *more: object) -> list[Tensor]:
    """The latents of all lines, also of those with equal seeds."""
    made_by.made(folder, *more)
    return [load_file(path)["latent"] for path in sorted(folder.glob("*_latent.safetensors"))]


def test_the_letters_of_a_line_are_read() -> None:
    line = 'a cat --lb 0-3=0.5, 7=0 --d 1 --lora_blocks "other=0" --lb ""'
    assert parse_generation_line(line)["lora_blocks"] == ["0-3=0.5, 7=0", "other=0", ""]
    with pytest.raises(OptionError, match="^--lb '0-3': write blocks and their strength"):
        parse_generation_line("a cat --lb 0-3")


@pytest.mark.slow_cases("loaded for each")
@pytest.mark.parametrize("speed", [(), ("--fp8_scaled",)], ids=["in place", "loaded for each"])
def test_lines_equal_the_option_and_a_written_file(
    tmp_path: Path, t2v: TinyWan, speed: tuple[str, ...]
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text(f"a cat --d 7 --lb {HALF}\na cat --d 7\na cat --d 7 --lb {HALF}\n", encoding="utf-8")
    made = all_made(script(t2v, *speed), tmp_path / "lines", "--from_file", lines)

    half = one(tmp_path / "half", t2v, *speed, "--lora_blocks", HALF)
    whole = one(tmp_path / "whole", t2v, *speed)

    assert not torch.equal(half, whole)
    assert sum(torch.equal(latents, half) for latents in made) == 2
    assert sum(torch.equal(latents, whole) for latents in made) == 1
    written = tmp_path / "written.safetensors"
    model = t2v.dit.parent / "a.safetensors"
    rewrite_blocks(BlockOptions(model=model, lora_blocks=HALF, output=written))
    assert torch.equal(one(tmp_path / "written", t2v, *speed, "--lora_weight", written), half)


def test_a_line_that_does_not_fit_is_said_and_others_are_made(tmp_path: Path, t2v: TinyWan) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("a cat --d 1 --lb 40-=0\na dog --d 2\na cat --lb 0=1 --lb 1=1\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        script(t2v).made(tmp_path / "made", "--from_file", lines)
    assert "line 1" in str(caught.value)
    assert "names no block" in str(caught.value)
    assert "--lora_blocks has 2 texts for 1 LoRA file:" in str(caught.value)
    assert len(list((tmp_path / "made").glob("*_latent.safetensors"))) == 1
    with pytest.raises(OptionError, match="no meaning for a comparison"):
        compared(tmp_path / "grid", t2v, "--from_file", _write(tmp_path, "a cat --lb 0=0"), loras="a*")


def _write(folder: Path, text: str) -> Path:
    path = folder / "one line.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_conversation_changes_blocks_for_one_line(
    tmp_path: Path, t2v: TinyWan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    typed = (f"a cat --d 7 --lb {HALF}", f"a cat --d 7 --lb {HALF}", "a cat --d 7", "a cat --lb 9=0")
    monkeypatch.setattr(builtins, "input", Typing(*typed))
    with caplog.at_level(logging.INFO):
        made = all_made(script(t2v), tmp_path / "talk", "--interactive")
    assert "is ignored" not in caplog.text
    assert caplog.text.count(f"Loading {t2v.dit}") == 2  # lines with equal blocks share a network
    assert "names no block" in caplog.text
    half = one(tmp_path / "half", t2v, "--lora_blocks", HALF)
    whole = one(tmp_path / "whole", t2v)
    assert sum(torch.equal(latents, half) for latents in made) == 2
    assert sum(torch.equal(latents, whole) for latents in made) == 1


def test_a_sheet_compares_strengths_of_blocks(tmp_path: Path, t2v: TinyWan) -> None:
    sheet = ("--prompt", "a cat", "--seed", 7, "--sheet", f"lora_blocks={HALF}|0-=1", "--output_type", "both")
    made = all_made(script(t2v), tmp_path / "sheet", *sheet)
    half, whole = one(tmp_path / "half", t2v, "--lora_blocks", HALF), one(tmp_path / "whole", t2v)
    assert [any(torch.equal(latents, expected) for latents in made) for expected in (half, whole)] == [
        True
    ] * 2
    (shown,) = (tmp_path / "sheet").glob("*_sheet*.mp4")
    assert f"lora_blocks = {HALF}" in read_tags(shown)["bt_sheet_cell_1_1"]
    for path in (tmp_path / "sheet").glob("*_latent.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["bt_lora_blocks"] in (f"'{HALF}'", "0-=1")
