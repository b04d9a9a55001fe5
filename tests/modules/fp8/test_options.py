"""Which weights are kept in 8 bits and what multiplies them, as options say it."""

import argparse

import pytest

from modules.errors import OptionError
from modules.fp8.options import (
    GenerationFp8Options,
    Quantisation,
    TrainingFp8Options,
    add_generation_fp8_arguments,
    add_training_fp8_arguments,
)
from modules.options import read_options


def training(*arguments: str) -> TrainingFp8Options:
    parser = argparse.ArgumentParser()
    add_training_fp8_arguments(parser.add_argument_group())
    return read_options(TrainingFp8Options, parser.parse_args(arguments))


def generation(*arguments: str) -> GenerationFp8Options:
    parser = argparse.ArgumentParser()
    add_generation_fp8_arguments(parser.add_argument_group())
    return read_options(GenerationFp8Options, parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "quantisation"),
    [
        ((), None),
        (("--fp8_base",), Quantisation("cast")),
        (("--fp8_base", "--fp8_fast"), Quantisation("cast", fp8_matmul=True)),
        (("--fp8_base", "--fp8_scaled", "--fp8_fast"), Quantisation("rows", fp8_matmul=True)),
        (("--fp8_base", "--fp8_scaled", "--upcast_quantization"), Quantisation("rows", float32_scales=True)),
    ],
)
def test_what_training_options_mean(arguments: tuple[str, ...], quantisation: Quantisation | None) -> None:
    assert training(*arguments).quantisation == quantisation


@pytest.mark.parametrize("option", ["--fp8_scaled", "--fp8_fast"])
def test_training_needs_fp8_weights_for_what_is_done_with_them(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} needs --fp8_base"):
        training(option)


@pytest.mark.parametrize(
    ("arguments", "quantisation"),
    [
        ((), None),
        (("--fp8",), Quantisation("cast")),
        (("--fp8", "--fp8_fast"), Quantisation("cast", fp8_matmul=True)),
        (("--fp8", "--fp8_scaled", "--fp8_fast"), Quantisation("rows", fp8_matmul=True)),
        (
            ("--fp8_scaled", "--upcast_linear", "--fp8_fast"),
            Quantisation("rows", float32_linear=True, fp8_matmul=True),
        ),
    ],
)
def test_what_generation_options_mean(arguments: tuple[str, ...], quantisation: Quantisation | None) -> None:
    assert generation(*arguments).quantisation == quantisation


def test_fast_generation_without_fp8_weights_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert generation("--fp8_fast").quantisation is None
    assert "--fp8_fast is ignored" in caplog.text


def test_float32_layers_need_scaled_weights() -> None:
    with pytest.raises(OptionError, match="--upcast_linear needs --fp8_scaled"):
        generation("--fp8", "--upcast_linear")
