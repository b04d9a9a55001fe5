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
from modules.option_values import option_argv
from modules.script_options import parse_options
from modules.speed_options import (
    AttentionChoice,
    GenerationAttentionOptions,
    TrainingAttentionOptions,
    get_attention_flag,
)
from runtime.options import GenerationSpeedOptions, TrainingSpeedOptions, say_for_generation
from tests.faults.messages import assert_one_message, run_here


def _training(*arguments: str) -> TrainingAttentionOptions:
    return parse_options(None, arguments, TrainingAttentionOptions)[0]


def _generation(*arguments: str) -> GenerationAttentionOptions:
    return parse_options(None, arguments, GenerationAttentionOptions)[0]


FLAGS = ("--sdpa", "--flash_attn", "--sage_attn", "--xformers", "--flash3")  # the first one counts
MODES = ("sdpa", "flash", "sage", "xformers", "flash3")


@pytest.mark.parametrize(("first", "mode"), enumerate(MODES))
def test_the_first_back_end_counts(first: int, mode: str) -> None:
    options = _training(*reversed(FLAGS[first:]))
    assert options.choice == AttentionChoice(mode)
    assert _training().choice == AttentionChoice("sdpa")


@pytest.mark.parametrize(("value", "mode"), [("torch", "sdpa"), ("flash2", "flash"), ("sageattn", "sage")])
def test_generation_names_back_ends_by_values(value: str, mode: str) -> None:
    assert _generation("--attn_mode", value).choice == AttentionChoice(mode)
    for known in MODES:
        _, named = get_attention_flag(known, training=False).split()
        assert _generation("--attn_mode", named).choice.mode == known


def test_generation_refuses_before_it_opens_a_model(tmp_path: Path) -> None:
    arguments = ("--prompt", "a cat", "--save_path", "out", "--dit", "no such file", "--device", "cpu")

    done = run_here("hv_generate_video.py", *arguments, "--attn_mode", "flash", folder=tmp_path)

    assert_one_message(*done, "--attn_mode flash runs on CUDA devices only", "Omit --attn_mode flash")
    assert not (tmp_path / "out").exists()


def training(*argv: str) -> Compilation | None:
    return parse_options(None, argv, TrainingCompileOptions)[0].choice


def generation(*argv: str) -> Compilation | None:
    return parse_options(None, argv, GenerationCompileOptions)[0].choice


def test_nothing_is_compiled_without_being_asked_for() -> None:
    assert training() is None
    assert generation() is None
    assert training("--dynamo_backend", "no") is None
    assert generation("--compile") == Compilation("inductor", "default", False, False)  # for each size


def test_both_spellings_of_training_say_the_same() -> None:
    default, words = (
        Compilation("inductor", "default", None, False),
        ("--dynamo_dynamic", "--dynamo_fullgraph"),
    )
    assert training("--compile") == training("--dynamo_backend", "INDUCTOR") == default
    assert training("--dynamo_backend", "eager", *words) == training(
        "--compile", "--compile_args", "EAGER", "default", "true", "1"
    )
    assert training("--dynamo_backend", "inductor", "--dynamo_mode", "max-autotune") == replace(
        default, mode="max-autotune"
    )


def test_backends_may_be_written_in_either_case() -> None:
    for name in [*DYNAMO_BACKENDS, *(name.lower() for name in DYNAMO_BACKENDS)]:
        if name.lower() not in {"no", "cudagraphs"}:
            assert training("--dynamo_backend", name) == Compilation(name.lower())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--compile", "--dynamo_backend", "inductor"], "both set how to compile. Pass either --compile"),
        (["--dynamo_dynamic"], "do nothing without --dynamo_backend"),
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
    default = ask("--compile")
    assert default is not None

    assert ask("--compile", *words) == ask("--compile", "--compile_args", "eager", "default", "true", "true")
    assert ask("--compile", "--compile_mode", "max-autotune") == replace(default, mode="max-autotune")
    assert ask("--compile", "--compile_cache_size_limit", "4") == replace(default, variants=4)


@pytest.mark.parametrize("ask", [training, generation])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--compile_args", *["eager", "default", "auto", "False"]],
            "--compile_args needs --compile",
        ),
        (["--compile_backend", "eager"], "--compile_backend needs --compile"),
        (["--compile_cache_size_limit", "4"], "--compile_cache_size_limit needs --compile"),
        (["--compile", "--compile_cache_size_limit", "0"], "of at least 1"),
        (["--compile", "--compile_mode", "reduce-overhead"], "CUDA graphs"),
        (
            ["--compile", "--compile_args", "eager", "default", "true", "false", "--compile_fullgraph"],
            "--compile_args and --compile_fullgraph both set how",
        ),
    ],
)
def test_words_that_do_nothing_or_clash_are_refused(
    ask: Callable[..., Compilation | None], words: list[str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        ask(*words)


@pytest.mark.parametrize(
    ("training", "generation"),
    [
        ("", ""),
        ("--sdpa --split_attn", ""),
        ("--flash_attn", "--attn_mode flash"),
        ("--fp8_base", "--fp8"),
        ("--fp8_base --fp8_scaled --fp8_fast", "--fp8_scaled --fp8_fast"),
        ("--fp8_base --fp8_scaled --upcast_quantization", "--fp8_scaled --upcast_quantization"),
        ("--convrot_int8 --convrot_int8_bwd int8", "--convrot_int8"),
        ("--nf4_base --blocks_to_swap auto", "--nf4 --blocks_to_swap auto"),
        ("--blocks_to_swap 20 --block_swap_ring_size 3", "--blocks_to_swap 20 --block_swap_ring_size 3"),
        ("--shard_base", "--shard_base"),
    ],
)
def test_generation_keeps_the_model_as_a_training_did(training: str, generation: str) -> None:
    (options,) = parse_options(None, training.split(), TrainingSpeedOptions)

    words = option_argv(say_for_generation(options))

    assert words == generation.split()
    (again,) = parse_options(None, words, GenerationSpeedOptions)
    stored, kept = options.fp8.quantization, again.fp8.quantization
    assert (stored and (stored.kind, stored.form)) == (kept and (kept.kind, kept.form))
