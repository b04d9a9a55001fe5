"""--optimized on machines that lack something, and on files that are in fp8."""

from pathlib import Path

import pytest
import torch

import wan_generate_video
from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.run import leave_out_missing
from modules.options import read_options
from tests.generation.toy_family import ToyFamily

CPU = torch.device("cpu")


def read(folder: Path, *arguments: object) -> GenerationOptions:
    parser = generation_parser(None, wan_generate_video.DEFAULTS)
    parser.set_defaults(rope_func="default")
    words = ["--save_path", folder, "--prompt", "p", *arguments]
    return read_options(GenerationOptions, read_arguments(parser, [str(word) for word in words]))


def test_what_a_cpu_lacks_is_left_out_with_a_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = leave_out_missing(ToyFamily(), read(tmp_path, "--optimized", "--fp8_fast"), CPU)

    assert options.speed.attention.choice.mode == "sdpa"
    assert not options.speed.fp16_accumulation
    assert options.speed.fp8.fp8_scaled
    assert options.speed.fp8.fp8_fast  # given by name: an error later
    assert {"attn_mode", "fp16_accumulation"}.isdisjoint(options.speed.by_preset)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(". ")[0] for line in said] == [
        "--optimized goes without --attn_mode here",
        "--optimized goes without --fp16_accumulation here",
    ]
    assert "CUDA devices only" in said[0]


def said_of(folder: Path, caplog: pytest.LogCaptureFixture, *arguments: object) -> str:
    caplog.clear()
    with caplog.at_level("INFO"):
        leave_out_missing(ToyFamily(), read(folder, *arguments), CPU)
    (line,) = (text for text in caplog.messages if text.startswith("--optimized sets"))
    return line


def test_one_line_says_what_is_set_what_is_missing_and_what_was_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert said_of(tmp_path, caplog, "--optimized", "--compile") == (
        "--optimized sets --fp8_scaled --rope_func; left out, as the warnings above say why: --attn_mode, "
        "--fp16_accumulation; left to what you gave: --compile"
    )
    given = ("--compile", "--fp8", "--attn_mode", "torch", "--fp16_accumulation")
    assert said_of(tmp_path, caplog, "--optimized", *given).endswith(
        "sets --rope_func; left to what you gave: --attn_mode, --compile, --fp8_scaled, --fp16_accumulation"
    )
