"""What the box at the start of a run and --check say of targets: the passes are those that run."""

import logging
import re
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.training import toy
from tests.training.test_preferences import write_pairs
from tests.training.test_sliders import FILE, write_slider
from tests.training.test_speed import KINDS, write_file
from tests.training.test_targets import write_project
from training.features.contract import EMPTY_PROMPT
from training.features.step_targets import PassCounts
from training.run import train_network

pytestmark = pytest.mark.usefixtures("nothing_compiled")

ONE_SLIDER = FILE.partition('[[sliders]]\npositive = "longer"')[0]
PLAIN_SLIDER = '[[sliders]]\npositive = "longer"\nnegative = "s"\nneutral = "it"\n'
BLANK = ("--blank_prior_weight", 0.5)
DELTA = ("--teacher", "dit", "--teacher_delta")
WAYS = {
    "plain": ((), PassCounts(), ""),
    "guided": (("--guided_target", 3), PassCounts(1, 1), "prediction for the empty prompt, 3 times as far"),
    "teacher": (
        ("--teacher", "base"),
        PassCounts(1, 1),
        "0.5 of the loss from the model without the network",
    ),
    "delta": (DELTA, PassCounts(1, 3), "the change by 1 LoRA in the model itself"),
    "blank": (BLANK, PassCounts(2, 1), "for the empty prompt as the model without the network, weight 0.5"),
    "guided blank": (("--guided_target", 3, *BLANK), PassCounts(2, 2), "3 times as far"),
    "slider": ((), PassCounts(2, 3), "slider.toml at strength 1 and -1"),
    "anchored slider": ((), PassCounts(4, 4), "slider.toml at strength 1 and -1"),
    "preference": (
        ("--preference", 2000),
        PassCounts(1, 1, batch_factor=2),
        "the better one of each pair, beta 2000",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_passes_of_the_box_are_those_that_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    words, passes, description = WAYS[way]
    if way == "preference":
        write_pairs(tmp_path)
    else:
        write_project(tmp_path)
    if "slider" in way:
        words = ("--slider", write_slider(tmp_path, PLAIN_SLIDER if way == "slider" else ONE_SLIDER))
    if way == "delta":
        words = (*words, "--teacher_lora", write_file(tmp_path, KINDS["LoRA"]))
    caplog.set_level(logging.INFO)
    family = toy.ToyFamily()
    toy.train_toy(tmp_path, *words, family=family)

    options = toy.toy_options(tmp_path, *words)
    assert options.features.count_passes() == passes
    assert family.passes.count(True) == 8 * passes.with_gradients
    assert family.passes.count(False) == 8 * passes.without_gradients
    (start,) = (text for text in caplog.messages if text.startswith("Training x"))
    assert train_network(family, toy.toy_options(tmp_path, *words, "--check")) == 0
    checked = " ".join(capsys.readouterr().out.split())
    if way == "plain":
        assert "targets:" not in start
        assert "Targets:" not in checked
        return
    for text in (description, f"passes in a step: {passes.description}"):
        assert text in start
        assert text in checked.replace(f"{tmp_path}/", "")


def test_times_are_those_of_the_page() -> None:
    assert PassCounts(1, 1).description == (
        "1 with gradients, 1 without: about 1.3 to 1.5 times a plain step"
    )
    assert PassCounts(1, 1, batch_factor=2).description == (
        "1 with gradients, 1 without of batches twice as large: about 2.7 to 3.0 times a plain step"
    )


def test_bands_masks_and_tokens_are_described(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    words = ("--teacher", "base", "--teacher_max_timestep", 750, "--mask_prior_weight", 0.5)
    lines = toy.toy_options(tmp_path, *words, "--tread", 0.25).features.describe_targets()

    assert lines == [
        "0.5 of the loss from the model without the network, which knows more from 0 to 750 thousandths of "
        "noise",
        "outside masks as the model without the network, weight 0.5",
        "passes in a step: 1 with gradients, 2 without: about 1.7 to 2.0 times a plain step",
        "25 % of the tokens bypass the blocks 2 to -2, in passes with gradients",
    ]


ROW = re.compile(r"^\|[^|]*\| (?:.* and )?`--(\w+) ([^`|]*)`[^|]*\| ([^|]*?) \| (yes|no) \|$", re.MULTILINE)


def test_the_table_of_the_page_has_the_times_that_the_box_tells(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    rows = [match.groups() for match in ROW.finditer(page)]
    assert len(rows) == 7
    (tmp_path / "slider.toml").write_text(PLAIN_SLIDER, encoding="utf-8")

    for option, rest, time, needs_empty in rows:
        value = tmp_path / rest if option == "slider" else rest.split()[0]
        lora = write_file(tmp_path, KINDS["LoRA"])
        delta = ["--teacher_delta", "--teacher_lora", lora] if "--teacher_delta" in rest else []
        options = toy.toy_options(tmp_path, f"--{option}", value, *delta)
        low_high = re.search(r"about ([\d.]+ to [\d.]+) times", options.features.count_passes().description)
        assert low_high is not None
        assert time.startswith(low_high[1]), option
        if option != "teacher":  # whose empty prompt is that of dropped captions
            assert (EMPTY_PROMPT in options.features.needs) == (needs_empty == "yes"), option
    anchored = PassCounts(4, 4).description.partition("about ")[2].partition(" times")[0]
    assert f"with an anchor {anchored}" in page
