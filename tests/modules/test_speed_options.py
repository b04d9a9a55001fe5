"""Which back end of attention and which compilation options ask for, and what command lines refuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from modules.compile_options import (
    DYNAMO_BACKENDS,
    Compilation,
    GenerationCompileOptions,
    TrainingCompileOptions,
)
from modules.errors import OptionError
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


def test_generation_refuses_before_it_opens_a_model(tmp_path: Path) -> None:
    arguments = ("--prompt", "a cat", "--save_path", "out", "--dit", "no such file", "--device", "cpu")

    done = run_script(
        "hv_generate_video.py", *arguments, "--attn_mode", "flash", folder=tmp_path, check=False
    )

    assert_user_error(done, "--attn_mode flash runs on CUDA devices only", "Leave --attn_mode flash out")
    assert not (tmp_path / "out").exists()


def training(*argv: str) -> Compilation | None:
    return parse_options(None, argv, TrainingCompileOptions)[0].choice


def generation(*argv: str) -> Compilation | None:
    return parse_options(None, argv, GenerationCompileOptions)[0].choice


def test_nothing_is_compiled_without_being_asked_for() -> None:
    assert training() is None
    assert generation() is None
    assert training("--dynamo_backend", "no") is None


def test_both_spellings_of_training_say_the_same() -> None:
    assert (
        training("--compile")
        == training("--dynamo_backend", "INDUCTOR")
        == Compilation("inductor", "default", None, False)
    )
    assert training("--dynamo_backend", "eager", "--dynamo_dynamic", "--dynamo_fullgraph") == training(
        "--compile", "--compile_args", "EAGER", "default", "true", "1"
    )
    assert training("--dynamo_backend", "inductor", "--dynamo_mode", "max-autotune") == Compilation(
        mode="max-autotune"
    )


def test_backends_may_be_written_in_either_case() -> None:
    for name in [*DYNAMO_BACKENDS, *(name.lower() for name in DYNAMO_BACKENDS)]:
        if name.lower() not in {"no", "cudagraphs"}:
            assert training("--dynamo_backend", name) == Compilation(name.lower())


def test_generation_compiles_for_each_size_unless_told_otherwise() -> None:
    assert generation("--compile") == Compilation("inductor", "default", False, False)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--compile", "--dynamo_backend", "inductor"], "both say how to compile. Give either --compile"),
        (["--compile", "--dynamo_fullgraph"], "both say how to compile. Give either --compile"),
        (["--dynamo_dynamic"], "do nothing without --dynamo_backend"),
        (["--dynamo_mode", "max-autotune"], "do nothing without --dynamo_backend"),
        (["--dynamo_backend", "eager", "--dynamo_mode", "max-autotune"], "max-autotune needs inductor"),
        (["--dynamo_backend", "inductor", "--dynamo_mode", "reduce-overhead"], "CUDA graphs"),
        (["--dynamo_backend", "cudagraphs"], "CUDA graphs"),
    ],
)
def test_what_contradicts_itself_is_refused_in_training(argv: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        training(*argv)


@pytest.mark.parametrize("ask", [training, generation])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("inductor default maybe False", "DYNAMIC is 'maybe', use true, false or auto"),
        ("inductor default auto auto", "FULLGRAPH is 'auto', use true or false"),
        ("inductor fast auto False", "mode fast is unknown"),
    ],
)
def test_a_word_that_is_not_known_is_refused_by_name(
    ask: Callable[..., Compilation | None], given: str, words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        ask("--compile", "--compile_args", *given.split())


@pytest.mark.parametrize("ask", [training, generation])
def test_an_option_for_each_word_says_what_compile_args_says(ask: Callable[..., Compilation | None]) -> None:
    words = ("--compile_backend", "eager", "--compile_dynamic", "true", "--compile_fullgraph")

    assert ask("--compile", *words) == ask("--compile", "--compile_args", "eager", "default", "true", "true")
    assert ask("--compile", "--compile_mode", "max-autotune") == replace(
        ask("--compile") or Compilation(), mode="max-autotune"
    )
    limited = ask("--compile", "--compile_cache_size_limit", "4")
    assert limited is not None
    assert limited.variants == 4


@pytest.mark.parametrize("ask", [training, generation])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compile_args", *["eager", "default", "auto", "False"]], "does nothing without --compile"),
        (["--compile_backend", "eager"], "--compile_backend does nothing without --compile"),
        (["--compile_cache_size_limit", "4"], "--compile_cache_size_limit does nothing without --compile"),
        (["--compile", "--compile_cache_size_limit", "0"], "of at least 1"),
        (["--compile", "--compile_mode", "reduce-overhead"], "CUDA graphs"),
        (
            ["--compile", "--compile_args", "eager", "default", "true", "false", "--compile_fullgraph"],
            "--compile_args and --compile_fullgraph both say how",
        ),
    ],
)
def test_words_that_do_nothing_or_clash_are_refused(
    ask: Callable[..., Compilation | None], words: list[str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        ask(*words)
