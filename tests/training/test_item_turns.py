"""Turns of items: who rests, who is set aside, by loss and by request; resumed to the bit."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.errors import OptionError
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.runs import make_project
from tests.training.toy import Killed, ToyTextEncoder, killed_at, same, train_toy, write_caches
from training.features.item_turns_acting import SHARE_WHILE_RESTING, decide
from training.features.item_turns_options import ItemTurnsOptions, ItemTurnsProgress
from training.reports.item_losses import read_draws
from training.reports.item_turns import make_section, read_changes, read_items
from training.reports.sections import turns_path

KEYS = [f"clip{index}_0032x0032_toy" for index in range(5)]
WATCHED = ("--watch_items", "--item_losses")
STATES = ("--save_state", "--save_every_n_steps", 4, "--max_train_steps", 24)


def list_families() -> list[object]:
    return [
        pytest.param(family, id=family.name, marks=[] if family.name == "flux" else pytest.mark.slow)
        for family in FAMILIES
        if family.name in ("wan t2v-1.3B", "flux", "qwen_image", "z_image")
    ]


def drawn(folder: Path, since: int = 0) -> Counter[str]:
    """How often each item was learned after a step."""
    return Counter(draw.key for draw in read_draws(folder / "output", "x") if draw.step > since)


def ask(folder: Path, *lines: str) -> None:
    (folder / "output").mkdir(exist_ok=True)
    (folder / "output" / "x.items").write_text("\n".join(lines), encoding="utf-8")


def measured(losses: dict[str, list[float]], **turns: float) -> ItemTurnsProgress:
    """Progress of items that began at a loss of 1."""
    return ItemTurnsProgress(dict.fromkeys(losses, 1.0), losses, dict(turns))


def decided(
    progress: ItemTurnsProgress, groups: dict[str, tuple[int, ...]] | None = None, **options: Any
) -> dict[str, float]:
    if groups is None:
        groups = dict.fromkeys(progress.item_start_losses, (0,))
    found = decide(progress, ItemTurnsOptions.from_defaults(**options), groups)
    return {decision.key: decision.share for decision in found}


FALLING, LEARNED, NOISY = [0.9, 0.8, 0.7], [0.61, 0.6, 0.6], [1.1, 1.0, 1.2]


def test_an_item_that_stays_flat_below_its_start_rests() -> None:
    losses = {"a": LEARNED, "b": FALLING, "c": [0.8, 0.6, 0.6], "d": [0.6, 0.6], "e": [0.75, 0.75, 0.75]}
    assert decided(measured(losses), rest_learned=0.3) == {"a": SHARE_WHILE_RESTING}
    assert decided(measured(losses), rest_learned=0.5) == {}
    assert decided(measured(losses)) == {}


def test_an_item_that_forgets_comes_back() -> None:
    progress = measured({"a": [0.6, 0.7, 0.9], "b": FALLING}, a=SHARE_WHILE_RESTING)
    assert decided(progress, rest_learned=0.3) == {"a": 1.0}
    assert decided(measured({"a": LEARNED, "b": FALLING}, a=SHARE_WHILE_RESTING), rest_learned=0.3) == {}


def test_an_item_that_does_not_fall_is_set_aside_if_most_do() -> None:
    losses = {"a": NOISY, "b": FALLING, "c": FALLING, "d": [1.1, 0.9, 1.2]}
    assert decided(measured(losses), set_aside_noisy=True) == {"a": 0.0}
    still = dict.fromkeys("bcd", [1.0, 1.0, 0.99])
    assert decided(measured({"a": NOISY, **still}), set_aside_noisy=True) == {}


def test_the_floor_keeps_items_and_of_each_group_one() -> None:
    losses = dict.fromkeys("abcdefgh", LEARNED)
    assert len(decided(measured(losses), rest_learned=0.3)) == 4
    assert len(decided(measured(losses), rest_learned=0.3, items_floor=0.8)) == 2
    groups = {key: (index // 2,) for index, key in enumerate("abcdefgh")}
    assert len(decided(measured(losses), groups, rest_learned=0.3, items_floor=0.1)) == 4
    assert decided(measured({"a": LEARNED, "b": FALLING}), {"a": (0,), "b": (1,)}, rest_learned=0.3) == {}


def test_what_a_user_decided_stays() -> None:
    progress = measured({"a": LEARNED, "b": FALLING, "c": FALLING})
    progress.items_of_user.append("a")
    assert decided(progress, rest_learned=0.3) == {}


def test_items_are_set_aside_and_taken_back_by_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)
    ask(tmp_path, "aside clip1", "aside clip2.png", "# a comment", "aside clip9", "remove clip3")

    train_toy(tmp_path, *WATCHED, *STATES)

    counts = drawn(tmp_path, since=1)
    assert set(counts) == {KEYS[0], KEYS[3], KEYS[4]}
    assert counts.total() == 23
    assert not (tmp_path / "output" / "x.items").exists()
    changes = read_changes(turns_path(tmp_path / "output", "x"))
    assert [(one.step, one.key, one.change) for one in changes] == [
        (1, KEYS[1], "aside"),
        (1, KEYS[2], "aside"),
    ]
    section = make_section(tmp_path / "output", "x")
    assert section is not None
    assert section.rows[0] == ("1", KEYS[1], "set aside", "requested")
    assert "no item of this run has the name clip9" in caplog.text
    assert "'remove clip3': write aside NAME, back NAME or caption NAME: TEXT" in caplog.text

    ask(tmp_path, "back clip1")
    train_toy(tmp_path, *WATCHED, *STATES, "--resume", tmp_path / "output" / "x-step00000008-state")
    assert set(drawn(tmp_path, since=9)) == {KEYS[0], KEYS[1], KEYS[3], KEYS[4]}


def test_the_last_item_of_its_size_is_not_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_caches(tmp_path, count=2)
    caplog.set_level(logging.INFO)
    ask(tmp_path, "aside clip0", "aside clip1")

    train_toy(tmp_path, *WATCHED)

    assert "clip1_0032x0032_toy is not set aside: no other item of its size" in caplog.text
    assert set(drawn(tmp_path, since=1)) == {KEYS[1]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_obeys_the_same_requests_at_the_same_steps(tmp_path: Path, workers: int) -> None:
    """From a state after the request, and from one before it, as after a kill; workers read ahead."""
    write_caches(tmp_path)
    words = (*WATCHED, *STATES, "--max_data_loader_n_workers", workers)
    with pytest.raises(Killed):
        train_toy(tmp_path, *words, family=killed_at(6))
    ask(tmp_path, "aside clip1")
    state = tmp_path / "output" / "x-step00000004-state"
    whole = train_toy(tmp_path, *words, "--resume", state)
    changes = read_changes(turns_path(tmp_path / "output", "x"))
    assert [one.step for one in changes] == [5]

    for step in (4, 12):
        resumed = train_toy(tmp_path, *words, "--resume", tmp_path / "output" / f"x-step{step:08d}-state")

        assert same(whole, resumed)
        assert read_changes(turns_path(tmp_path / "output", "x")) == changes
    assert KEYS[1] not in drawn(tmp_path, since=5)


def test_a_recaptioned_item_is_learned_as_from_a_cache_of_that_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is resumed at step 4 and gets the request after step 5; no other cache is read or written."""
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)
    words = ("--watch_items", *STATES[:1], "--save_every_n_steps", 1, "--max_train_steps", 16)
    plain = train_toy(tmp_path, *words, "--output_dir", tmp_path / "plain")
    cache = tmp_path / "cache" / "clip1_toy_te.safetensors"
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    caption = "a cat: on a mat"
    with pytest.raises(Killed):
        train_toy(tmp_path, *words, family=killed_at(4))
    ask(tmp_path, f"caption clip1.png: {caption}")

    state = tmp_path / "output" / "x-step00000004-state"
    recaptioned = train_toy(tmp_path, *words, "--resume", state)

    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    assert not same(plain, recaptioned)
    (change,) = read_changes(turns_path(tmp_path / "output", "x"))
    assert change == (5, KEYS[1], "caption", caption)
    (file,) = (tmp_path / "output" / "x-captions").iterdir()
    assert load_file(file)["varlen_letters_float32"].item() == pytest.approx(len(caption) / 100)
    for step in (4, 9):  # before the request, which is obeyed again, and after it
        resumed = train_toy(tmp_path, *words, "--resume", tmp_path / "output" / f"x-step{step:08d}-state")
        assert same(recaptioned, resumed)

    save_file({"varlen_letters_float32": torch.full((1, 1), len(caption) / 100)}, cache)
    later = tmp_path / "plain" / "x-step00000005-state"
    from_cache = train_toy(tmp_path, *words, "--output_dir", tmp_path / "plain", "--resume", later)
    assert same(recaptioned, from_cache)


@pytest.mark.parametrize("family", list_families())
def test_a_new_caption_has_the_outputs_that_caching_makes_of_it(tmp_path: Path, family: TinyFamily) -> None:
    """The item's caption file and cache are changed afterwards, and compared with what the run has made."""
    made = make_project(family, tmp_path)
    file = sorted((tmp_path / "clips").glob("*.txt"))[0]
    ask(tmp_path, f"caption {file.stem}: a red barge in fog")

    made.train("output", "--watch_items")

    (recaptioned,) = (tmp_path / "output" / "x-captions").iterdir()
    file.write_text("a red barge in fog", encoding="utf-8")
    made.run(*family.cache_texts)
    cached = tmp_path / "cache" / recaptioned.name.partition("-")[2]
    assert same(load_file(cached), load_file(recaptioned))


def test_a_caption_that_cannot_be_encoded_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)
    plain = train_toy(tmp_path)

    def refuse(self: ToyTextEncoder, prompts: object) -> None:
        raise OptionError("--t5 is missing")

    monkeypatch.setattr(ToyTextEncoder, "encode", refuse)
    ask(tmp_path, "caption clip1: a dog")
    assert same(plain, train_toy(tmp_path, *WATCHED, "--overwrite"))
    assert f"{KEYS[1]} keeps its caption: --t5 is missing" in caplog.text


def test_losses_decide_and_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """The toy learns: items fall below their start, and half of them may rest."""
    write_caches(tmp_path)
    words = ("--rest_learned", 0.3, "--items_every", 8, "--items_floor", 0.4, "--set_aside_noisy")
    words += ("--item_losses", "--learning_rate", 0.03, *STATES[:-1], 96)
    whole = train_toy(tmp_path, *words)
    changes = read_changes(turns_path(tmp_path / "output", "x"))
    assert {one.change for one in changes} >= {"aside", "rests"}
    (aside,) = [one for one in changes if one.change == "aside"]
    assert drawn(tmp_path, since=aside.step)[aside.key] == 0
    assert drawn(tmp_path)[aside.key] > 0
    first = min(one.step for one in changes)
    plain = train_toy(tmp_path, *words[8:], "--output_dir", tmp_path / "plain")
    assert not same(whole, plain)

    for step in (4, first + 4):
        state = tmp_path / "output" / f"x-step{step:08d}-state"
        assert same(whole, train_toy(tmp_path, *words, "--resume", state))
        assert read_changes(turns_path(tmp_path / "output", "x")) == changes


def test_measuring_alone_changes_nothing(tmp_path: Path) -> None:
    write_caches(tmp_path)
    plain = train_toy(tmp_path, *STATES)
    measured = train_toy(tmp_path, *STATES, "--rest_learned", 0.99, "--items_every", 3)
    assert same(plain, measured)
    assert read_changes(turns_path(tmp_path / "output", "x")) == []
    assert [*read_items(turns_path(tmp_path / "output", "x"))] == KEYS
