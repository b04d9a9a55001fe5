"""Which weights are kept in 8 bits and what multiplies them, as options say it."""

import pytest

from modules.parser import parse_options
from modules.speed_options import (
    GenerationFp8Options,
    Quantisation,
    TrainingFp8Options,
)


def training(*arguments: str) -> TrainingFp8Options:
    return parse_options(None, arguments, TrainingFp8Options)[0]


def generation(*arguments: str) -> GenerationFp8Options:
    return parse_options(None, arguments, GenerationFp8Options)[0]


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
