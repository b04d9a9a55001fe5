"""Samples of a training on raw that are made on Turbo, under what is trained."""

import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import krea2_train_network
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import OUTPUT, family_called
from tests.tiny.krea2 import tiny_state, write_dit
from tests.tiny.runs import make_project


@pytest.mark.slow
@pytest.mark.parametrize("swap", [(), ("--blocks_to_swap", "1")], ids=["plain", "swapped"])
def test_samples_are_what_turbo_makes_with_the_lora(tmp_path: Path, swap: tuple[str, ...]) -> None:
    family = family_called("krea2")
    make_project(family, tmp_path)
    write_dit(tmp_path / "model", tiny_state(seed=5), name="turbo")
    (tmp_path / "prompts.txt").write_text("a cat --w 32 --h 32 --d 7", encoding="utf-8")
    sampled = ("--turbo_dit", "model/turbo.safetensors", "--turbo_dit_cache")
    prompts = ("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "2")
    words = (*family.train, *OUTPUT, "--max_train_steps", "2")

    succeed_here(*words, *sampled, *prompts, *swap, folder=tmp_path)
    found = load_file(tmp_path / "output" / "lora.safetensors")
    succeed_here(*words, "--overwrite", folder=tmp_path)
    alone = load_file(tmp_path / "output" / "lora.safetensors")

    assert all(torch.equal(found[name], alone[name]) for name in alone)
    (sample,) = (tmp_path / "output" / "sample").glob("*_7.png")
    models = ["--dit", "model/turbo.safetensors", *family.generate[3:-2]]
    asked = ("--prompt", "a cat", "--image_size", "32", "32", "--seed", "7", "--save_path", "made")
    lora = ("--lora_weight", "output/lora.safetensors")
    succeed_here(family.generate[0], *models, *asked, *lora, folder=tmp_path)
    (made,) = (tmp_path / "made").glob("*.png")
    there, here = (numpy.asarray(Image.open(path), dtype=int) for path in (sample, made))
    assert abs(there - here).max() <= 1


def test_raw_is_refused_as_turbo_and_turbo_is_warned_of(tmp_path: Path) -> None:
    family = family_called("krea2")
    make_project(family, tmp_path)
    raw = write_dit(tmp_path / "model", tiny_state(), name="krea2_raw")
    turbo = write_dit(tmp_path / "model", tiny_state(), name="turbo")
    words = (*family.train, *OUTPUT, "--max_train_steps", "1")

    code, said = run_here(*words, "--turbo_dit", raw, folder=tmp_path)
    assert_one_message(code, said, "--turbo_dit", "is marked as raw", "turbo.safetensors")
    code, said = run_here(*words, "--dit", turbo, "--turbo_dit", turbo, folder=tmp_path)
    assert_one_message(code, said, "--turbo_dit", "this is what --dit trains")
    said = succeed_here(*words, "--dit", turbo, folder=tmp_path)
    assert "distilled for few steps" in said
    assert f"is Krea 2 Turbo: its name is {turbo.stem}" in said
    assert "Train on raw (raw.safetensors)" in said


@pytest.mark.slow
def test_a_plan_counts_turbo_and_commands_say_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both transformers have all their weights in host memory, also the one at work."""
    family = family_called("krea2")
    make_project(family, tmp_path)
    turbo = write_dit(tmp_path / "model", tiny_state(seed=5), name="other")
    (tmp_path / "prompts.txt").write_text("a cat --w 32 --h 32", encoding="utf-8")
    words = (*family.train, *OUTPUT, "--max_train_steps", "1", "--turbo_dit", turbo)
    prompts = ("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "1")

    monkeypatch.chdir(tmp_path)
    for more, is_loaded in ((prompts, True), ((), False)):
        capsys.readouterr()
        krea2_train_network.main([*map(str, words[1:]), *more, "--plan"])
        rows = re.findall("further transformers.*they take turns on the device", capsys.readouterr().out)
        assert len(rows) == is_loaded
    said = succeed_here(*words, folder=tmp_path)
    assert "--turbo_dit is ignored because there is no --sample_prompts" in said
    assert "other.safetensors --mu 1.15 --steps 8 --guidance_scale 1.0" in said
