"""Which back end an option asks for, and what the command lines refuse before anything is loaded."""

from pathlib import Path

import pytest

from modules.parser import parse_options
from modules.speed_options import (
    AttentionChoice,
    GenerationAttentionOptions,
    TrainingAttentionOptions,
    flag_of,
)
from tests.commands import assert_user_error, run_script


def _training(*arguments: str) -> TrainingAttentionOptions:
    return parse_options(None, arguments, TrainingAttentionOptions)[0]


def _generation(*arguments: str, splits: bool = True) -> GenerationAttentionOptions:
    without = () if splits else ("split_attn",)
    return parse_options(None, arguments, GenerationAttentionOptions, without=without)[0]


@pytest.mark.parametrize(
    ("arguments", "mode", "ignored"),
    [
        ((), "sdpa", ()),
        (("--sdpa",), "sdpa", ()),
        (("--flash_attn",), "flash", ()),
        (("--flash3",), "flash3", ()),
        (("--sage_attn",), "sage", ()),
        (("--xformers",), "xformers", ()),
        (("--flash3", "--xformers", "--sage_attn", "--flash_attn", "--sdpa"), "sdpa", None),
        (
            ("--flash3", "--xformers", "--sage_attn", "--flash_attn"),
            "flash",
            ("--sage_attn", "--xformers", "--flash3"),
        ),
        (("--flash3", "--xformers", "--sage_attn"), "sage", ("--xformers", "--flash3")),
        (("--flash3", "--xformers"), "xformers", ("--flash3",)),
    ],
)
def test_the_first_back_end_counts_and_the_others_are_named(
    arguments: tuple[str, ...], mode: str, ignored: tuple[str, ...] | None
) -> None:
    options = _training(*arguments)
    assert options.choice == AttentionChoice(mode)
    assert options.ignored == (
        ("--flash_attn", "--sage_attn", "--xformers", "--flash3") if ignored is None else ignored
    )


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        *(("torch", "sdpa"), ("sdpa", "sdpa"), ("flash", "flash"), ("flash2", "flash"), ("flash3", "flash3")),
        *(("sageattn", "sage"), ("xformers", "xformers")),
    ],
)
def test_generation_names_back_ends_by_values(value: str, mode: str) -> None:
    assert _generation("--attn_mode", value).choice == AttentionChoice(mode)
    assert _generation("--attn_mode", flag_of(mode, training=False).split()[1]).choice.mode == mode


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ("hv_generate_video.py", "flash"),
    ],
)
def test_generation_refuses_before_it_opens_a_model(tmp_path: Path, script: str, value: str) -> None:
    arguments = (
        *("--prompt", "a cat", "--save_path", "out", "--dit", "no such file", "--device", "cpu"),
        *("--attn_mode", value),
    )

    done = run_script(script, *arguments, folder=tmp_path, check=False)

    assert_user_error(
        done, f"--attn_mode {value} runs on CUDA devices only", f"Leave --attn_mode {value} out"
    )
    assert not (tmp_path / "out").exists()
