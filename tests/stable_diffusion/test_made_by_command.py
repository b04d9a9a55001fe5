"""Trainings of ControlNets, LLLites and words through their command lines: as solid as those of LoRAs."""

import io
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.messages import run_here, succeed_here
from tests.stable_diffusion import test_inversion_training as words_test
from tests.stable_diffusion import test_lllite_training as pairs_test
from tests.tiny.stable_diffusion import WRITERS

LLLITE, CONTROL_NET = "sdxl_train_control_net_lllite.py", "train_control_net.py"
WORD = "train_textual_inversion.py"
SIZES = ("--network_dim", "8", "--cond_emb_dim", "6")
pairs, words = pairs_test.folder, words_test.folder  # fixtures: folders to train in


def lllite_words(folder: Path, *further: str) -> list[str]:
    return pairs_test.words_of(WRITERS["sdxl"](folder), *SIZES, *further)


def printed_by(script: str, *typed: str, folder: Path) -> tuple[int, str]:
    printed = io.StringIO()
    code, _ = run_here(script, *typed, folder=folder, printed=printed)
    return code, printed.getvalue()


def test_a_lllite_learns_next_to_weights_in_4_bits(pairs: Path) -> None:
    succeed_here(LLLITE, *lllite_words(pairs, "--nf4_base"), folder=pairs)
    narrow = load_file(pairs / "output" / "net.safetensors")

    widths = {name.partition(".")[0]: len(narrow[name][0]) for name in narrow if "down.0.weight" in name}
    assert widths == pairs_test.TRAINED
    again = ["--network_weights", "output/net.safetensors", "--output_name", "again", "--nf4_base"]
    succeed_here(LLLITE, *lllite_words(pairs, *again), folder=pairs)
    assert load_file(pairs / "output" / "again.safetensors").keys() == narrow.keys()


@pytest.mark.parametrize("option", ["--fp8_base", "--nf4_base", "--convrot_int8"])
def test_a_control_net_is_no_copy_of_rounded_weights(pairs: Path, option: str) -> None:
    typed = pairs_test.words_of(WRITERS["sd1"](pairs), option)

    assert f"{option} is refused: a ControlNet begins as a copy" in pairs_refusal(CONTROL_NET, pairs, *typed)


def pairs_refusal(script: str, folder: Path, *typed: str) -> str:
    code, told = run_here(script, *typed, folder=folder)
    assert code != 0
    assert "Traceback" not in told, told
    return told


def test_a_check_finds_captions_without_the_word(words: Path) -> None:
    typed = words_test.words_of(WRITERS["sd1"](words), "--check")

    code, printed = printed_by(WORD, *typed, "--learning_rate", "1e-3", folder=words)
    assert code == 0
    assert "1 of 3 captions lack the word zorb and teach it nothing, such as 'a cat'" in printed
    assert "HIGH" not in printed
    code, printed = printed_by(
        WORD, *typed, "--token_string", "blub", "--learning_rate", "1e-5", folder=words
    )
    assert code == 1
    assert "no caption has this word" in printed
    assert "1e-05, which is LOW for textual inversion: 1e-3 is usual" in printed
    table = words / "dataset.toml"
    text = table.read_text(encoding="utf-8")
    table.write_text(f'{text}trigger_word = "blub"\nshuffle_caption = true\n', encoding="utf-8")
    code, printed = printed_by(WORD, *typed, "--token_string", "blub", folder=words)
    assert code == 0
    assert "lack the word" not in printed


def test_a_check_reads_the_file_to_start_from(pairs: Path) -> None:
    typed = lllite_words(pairs, "--check", "--network_weights", "sdxl.safetensors")

    assert "is not a ControlNet-LLLite" in pairs_refusal(LLLITE, pairs, *typed)
