"""--optimized on machines that lack something, and on files that are in fp8."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fpack_generate_video
import hv_generate_video
import wan_generate_video
from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.run import leave_out_missing
from modules.options import read_options
from tests.generation.toy_family import ToyFamily
from tests.tiny.wan import TinyWan, write_tiny_wan

CPU = torch.device("cpu")


def read(folder: Path, *arguments: object) -> GenerationOptions:
    parser = generation_parser(None, wan_generate_video.DEFAULTS)
    parser.set_defaults(rope_func="default")
    words = ["--save_path", folder, "--prompt", "p", *arguments]
    return read_options(GenerationOptions, read_arguments(parser, [str(word) for word in words]))


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    return write_tiny_wan(tmp_path_factory.mktemp("t2v"))


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


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (wan_generate_video, {"fp16_accumulation": True, "rope_func": "comfy"}),
        (hv_generate_video, {"fp8_fast": True}),
        (fpack_generate_video, {"fp8_fast": True}),
    ],
)
def test_the_preset_of_each_script(script: ModuleType, expected: dict[str, object]) -> None:
    everywhere = {"attn_mode": "sageattn", "compile": True, "fp8_scaled": True}
    assert dict(script.DEFAULTS.optimized) == everywhere | expected


EAGER = ("eager", "default", "false", "false")  # compiles nothing, so it is quick


def video(folder: Path, files: TinyWan, *arguments: object) -> dict[str, str]:
    """Run the script; returns what the latent file says of itself."""
    size = [
        "--video_size",
        32,
        48,
        "--video_length",
        5,
        "--infer_steps",
        2,
        "--device",
        "cpu",
        "--output_type",
        "latent",
    ]
    words = [
        "--save_path",
        folder,
        "--task",
        "t2v-1.3B",
        "--prompt",
        "a cat",
        "--seed",
        1,
        *size,
        *files.models,
        *arguments,
    ]
    wan_generate_video.main([str(word) for word in words])
    (path,) = folder.glob("*_latent.safetensors")
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_file_in_fp8_stays_as_it_is(tmp_path: Path, t2v: TinyWan, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(t2v.dit)
    rounded = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    save_file(rounded, tmp_path / "fp8.safetensors")
    says = video(
        tmp_path, t2v, "--optimized", "--dit", tmp_path / "fp8.safetensors", "--compile_args", *EAGER
    )
    assert (says["bt_fp8"], says.get("bt_fp8_scaled")) == ("True", None)
    assert "--optimized goes without --fp8_scaled here. " in caplog.text
    assert "is in fp8 already" in caplog.text
