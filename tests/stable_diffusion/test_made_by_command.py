"""Trainings of ControlNets, LLLites and words through their command lines: as solid as those of LoRAs."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.commands import ROOT, run_in_processes, run_python
from tests.faults.messages import ERROR, run_here, succeed_here
from tests.faults.runs import DYING
from tests.faults.test_kill_and_resume import KILLED
from tests.stable_diffusion import test_inversion_training as words_test
from tests.stable_diffusion import test_lllite_training as pairs_test
from tests.tiny.stable_diffusion import WRITERS
from tests.training.toy import same
from training.saving.states import SavedState, read_state

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


@pytest.mark.parametrize("option", ["--fp8_base", "--nf4_base", "--convrot_int8"])
def test_a_control_net_is_no_copy_of_rounded_weights(pairs: Path, option: str) -> None:
    typed = pairs_test.words_of(WRITERS["sd1"](pairs), option)

    assert f"{option} is refused: a ControlNet begins as a copy" in pairs_rejection(
        CONTROL_NET, pairs, *typed
    )


def pairs_rejection(script: str, folder: Path, *typed: str) -> str:
    code, told = run_here(script, *typed, folder=folder)
    assert code != 0
    assert "Traceback" not in told, told
    return told


# ten mistakes of newcomers: script, its model, what is typed, what the only message says
MISTAKES: dict[str, tuple[str, str, list[str], str]] = {
    "a LoRA's module": (
        LLLITE,
        "sdxl",
        ["--network_module", "networks.lora"],
        "is of LoRAs, and this script",
    ),
    "the wrong checkpoint": (CONTROL_NET, "sdxl", [], "is Stable Diffusion XL"),
    "the option of another script": (
        CONTROL_NET,
        "sd1",
        ["--network_weights", "x.safetensors"],
        "Pass the ControlNet to start from to --controlnet_model_name_or_path",
    ),
    "a file that is missing": (
        CONTROL_NET,
        "sd1",
        ["--controlnet_model_name_or_path", "none.safetensors"],
        "none.safetensors: no such file",
    ),
    "a checkpoint as the start": (LLLITE, "sdxl", ["--network_weights", "sdxl.safetensors"], "is not a Con"),
    "text encoders": (CONTROL_NET, "sd1", ["--text_encoder_lr", "1e-5"], "Text encoders have no part in it"),
    "blocks of a transformer": (CONTROL_NET, "sd1", ["--blocks_to_swap", "4"], "the parts of a U-Net"),
    "a sample without its image": (
        LLLITE,
        "sdxl",
        ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "1"],
        "--cn edges/none.png: no such image. Correct the path",
    ),
    "a strength that is not a number": (
        CONTROL_NET,
        "sd1",
        ["--sample_prompts", "strong.txt", "--sample_every_n_steps", "1"],
        "--am: 'much' does not begin with a number",
    ),
    "sizes that do not fit the file": (LLLITE, "sdxl", ["--cond_emb_dim", "5"], "is odd"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_a_newcomer_gets_one_true_sentence(mistake: str, pairs: Path) -> None:
    script, kind, typed, expected = MISTAKES[mistake]
    (pairs / "samples.txt").write_text("a cat --cn edges/none.png\n", encoding="utf-8")
    (pairs / "strong.txt").write_text("a cat --cn control/0.png --am much\n", encoding="utf-8")

    told = pairs_rejection(script, pairs, *pairs_test.words_of(WRITERS[kind](pairs), *typed))

    assert expected in told
    assert len([line for line in told.splitlines() if ERROR.match(line)]) == 1


def test_a_folder_of_control_pictures_that_is_missing_is_named(pairs: Path) -> None:
    typed = lllite_words(pairs)
    table = pairs / "dataset.toml"
    table.write_text(table.read_text(encoding="utf-8").replace('"control"', '"contorl"'), encoding="utf-8")
    assert "contorl" in pairs_rejection(LLLITE, pairs, *typed)


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

    assert "is not a ControlNet-LLLite" in pairs_rejection(LLLITE, pairs, *typed)


def test_latents_of_other_trainers_have_no_control_pictures_and_are_made_again(pairs: Path) -> None:
    typed = pairs_test.words_of(WRITERS["sd1"](pairs), "--cache_latents_to_disk", "--skip_cache_check")
    shared = [pairs / "pictures" / f"{number}_0064x0064_sd.npz" for number in range(3)]
    succeed_here(CONTROL_NET, *typed, folder=pairs)
    with np.load(shared[0]) as file:
        expected = dict(file)
    for path in shared:  # as other programs write them
        with np.load(path) as file:
            arrays = {name: file[name] for name in file if not name.startswith("reelsmith")}
        np.savez(path, **arrays)

    told = succeed_here(CONTROL_NET, *typed, folder=pairs)

    assert "it has no control image" in told
    with np.load(shared[0]) as file:
        found = dict(file)
    name = "reelsmith_control_pixels_flipped"
    assert np.array_equal(found[name], expected[name])
    assert np.array_equal(found["latents"], expected["latents"])


RESUMED = {
    "lllite": (LLLITE, [*SIZES, "--network_dropout", "0.1", "--gradient_accumulation_steps", "2"]),
    "word": (WORD, ["--use_style_template", "--ema_decay", "0.9"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_kill_inside_a_save_leaves_the_one_before_it_and_ends_as_without_it(case: str, pairs: Path) -> None:
    """In the second of four saves, when half of a tensor is written."""
    script, own = RESUMED[case]
    is_word = script == WORD
    model = WRITERS["sd1" if is_word else "sdxl"](pairs)
    typed = (words_test if is_word else pairs_test).words_of(model, *own, "--max_train_steps", "3")
    if is_word:
        table = pairs / "dataset.toml"
        text = table.read_text(encoding="utf-8").replace('conditioning_data_dir = "control"\n', "")
        table.write_text(text, encoding="utf-8")
    run = [ROOT / script, *typed, "--save_every_n_steps", "1", "--save_state", "--resume", "latest"]
    run_python(DYING, "count", "passed.json", *run, "--output_dir", "whole", folder=pairs)
    passes = json.loads((pairs / "passed.json").read_text(encoding="utf-8"))["mid_write"]

    killed = run_python(DYING, "mid_write", passes * 27 // 100, *run, folder=pairs, check=False)
    assert killed.returncode == KILLED, killed.stderr[-3000:]
    assert any(path.name.endswith(".tmp") for path in (pairs / "output").iterdir())
    run_python(*run, folder=pairs)

    places = [
        {path.relative_to(pairs / name): path for path in (pairs / name).rglob("*.safetensors")}
        for name in ("whole", "output")
    ]
    assert places[0].keys() == places[1].keys()
    for place, path in places[0].items():
        ours, resumed = load_file(path), load_file(places[1][place])
        assert ours.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in ours.items()), place
    states = [sorted((pairs / name).glob("*-state")) for name in ("whole", "output")]
    for ours, resumed in zip(*states, strict=True):
        first, second = read_state(ours), read_state(resumed)
        assert isinstance(first, SavedState)
        assert isinstance(second, SavedState)
        assert first.parts.keys() == second.parts.keys()
        assert all(same(part, second.parts[name]) for name, part in first.parts.items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")
@pytest.mark.parametrize("case", RESUMED)
def test_two_processes_learn_what_one_learns_with_twice_the_accumulation(case: str, pairs: Path) -> None:
    script = RESUMED[case][0]
    is_word = script == WORD
    model = WRITERS["sd1" if is_word else "sdxl"](pairs)
    table = pairs / "dataset.toml"
    text = table.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 1")
    if is_word:
        text = text.replace('conditioning_data_dir = "control"\n', 'trigger_word = "zorb"\n')
    table.write_text(text, encoding="utf-8")
    typed = (words_test if is_word else pairs_test).words_of(model, *([] if is_word else SIZES))
    typed += ["--optimizer_type", "SGD", "--max_grad_norm", "0", "--cache_latents_to_disk", "--no_page"]
    typed += ["--max_data_loader_n_workers", "0", "--output_name", "x"]

    succeed_here(script, *typed, "--gradient_accumulation_steps", "2", folder=pairs)
    run_in_processes(2, script, *typed, "--output_dir", "two", folder=pairs)

    one, two = (load_file(pairs / name / "x.safetensors") for name in ("output", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)
