"""What each option and each key of a training means to each consumer of a run: `tests/pairs.toml`."""

import functools
import random
import re
import tomllib
from argparse import Action
from pathlib import Path
from typing import Any

import pytest

from dataset.config import KEYS, KNOWN_KEYS
from dataset.config_keys import LIST_PATH, PATH, PATHS
from dataset.subset_options import SUBSET_KEYS
from modules.options import HABIT, Options, option, options_with
from project.recipes.reading import list_allowed
from project.relocating import MachinePaths, relocate_toml
from protocols.families import with_scripts
from tests.commands import ROOT
from tests.dataset.making import subset_table
from tests.pairing import (
    IMAGE_SCRIPT,
    LIVE,
    REFUSED,
    SUBSETS,
    USED,
    WITHOUT,
    Trials,
    image_cells,
    refusal_of_processes,
    script_options,
    training_options,
    write_files,
    write_image_folders,
)
from tests.sweeping import info_of_option
from training.config_options import toml_value
from training.options import TrainingOptions
from training.resuming import recorded_values

TABLE = tomllib.loads((ROOT / "tests" / "pairs.toml").read_text(encoding="utf-8"))
COLUMNS: dict[str, str] = TABLE["columns"]
GROUPS: dict[str, dict[str, Any]] = TABLE["group"]
REFUSALS: dict[str, str] = TABLE["refused"]
MIN_WORDS = 4  # of a reason
SEED, SHARE = 7, 14  # of the options that are tried by default: one of so many
TOY_COLUMNS = {"validation", "best", "on_end", "resume", "metadata", "samples"}
VERDICTS = {"used": USED, "without": WITHOUT, "refused": REFUSED}
FACTS = {"identity": REFUSED, "habit": USED, "names": USED}  # of resuming
FOREIGN = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "project/foreign").glob("*.py"))


class Files(Options):
    """Options of a family that name files."""

    model: Path | None = option("a model", facts=HABIT)
    other_model: Path | None = option("another model", facts=HABIT)


@functools.cache
def family_options() -> dict[str, Action]:
    """The options of all training scripts, by name."""
    found: dict[str, Action] = {}
    for entry in with_scripts().values():
        found = script_options(f"{entry.training_script}.py") | found
    return found


@functools.cache
def resume_facts() -> dict[str, str]:
    """What a resumed run does with a changed option, as its record declares it."""
    records: list[Any] = [TrainingOptions, *(e.options_record("Training") for e in with_scripts().values())]
    return {
        name: kind
        for record in records
        for kind in ("free", "names", "habit", "identity")
        for name in options_with(record, "resume", kind)
    }


def list_rows() -> set[str]:
    return {*family_options(), *training_options(), *(f"key:{name}" for name in KNOWN_KEYS)}


@functools.cache
def cells_by_row() -> dict[str, dict[str, str]]:
    """The cells of each row, by column."""
    found: dict[str, dict[str, str]] = {}
    for group in GROUPS.values():
        cells = {column: verdict for key, verdict in VERDICTS.items() for column in group[key]}
        found |= {row: dict(cells) for row in group["rows"]}
        for name, rows in group.get("but", {}).items():
            column, verdict = name.split()
            for row in rows:
                found[row][column] = VERDICTS[verdict]
    return found


def actions() -> dict[str, Action]:
    return family_options() | training_options()


def wrong_cells(found: dict[str, dict[str, str]]) -> list[str]:
    """The cells that are not what the table says."""
    return [
        f"{row}: {column} is {verdict!r}, in tests/pairs.toml {cells_by_row()[row].get(column)!r}"
        for row, cells in found.items()
        for column, verdict in cells.items()
        if cells_by_row()[row].get(column) != verdict
    ]


def is_path(action: Action) -> bool:
    """Whether an option names a file or a folder, or several."""
    info = info_of_option(action)
    return "place" in info or info.get("kind") is Path or "FILE" in str(getattr(action, "metavar", ""))


# --- the table


def test_each_option_and_key_has_one_row() -> None:
    rows = [row for group in GROUPS.values() for row in group["rows"]]

    assert sorted(list_rows() - set(rows)) == [], "give them a place in tests/pairs.toml"
    assert sorted(set(rows) - list_rows()) == []
    assert sorted({row for row in rows if rows.count(row) > 1}) == []


@pytest.mark.parametrize("name", GROUPS)
def test_no_cell_is_empty(name: str) -> None:
    group = GROUPS[name]
    columns = [column for verdict in VERDICTS for column in group[verdict]]
    assert sorted(columns) == sorted(COLUMNS)


@pytest.mark.parametrize("name", [name for name, group in GROUPS.items() if "but" in group])
def test_exceptions_are_rows_of_their_group_that_differ(name: str) -> None:
    group = GROUPS[name]
    for key, rows in group["but"].items():
        column, verdict = key.split()
        assert column not in group[verdict]
        assert set(rows) < set(group["rows"])


def test_what_is_refused_has_a_reason() -> None:
    refused = {
        column for cells in cells_by_row().values() for column, cell in cells.items() if cell == REFUSED
    }
    assert refused == {*REFUSALS}


def test_reasons_are_sentences() -> None:
    texts = [*COLUMNS.values(), *REFUSALS.values(), *TABLE["untried"].values()]
    assert [text for text in texts if len(text.split()) < MIN_WORDS] == []


# --- cells that declarations decide, of all rows


def test_resuming_is_what_options_declare() -> None:
    """A state may refuse more than that: what follows from an option that may change."""
    for row, fact in resume_facts().items():
        cell = cells_by_row().get(row, {}).get("resume")
        if cell is not None and fact in FACTS:
            assert cell in (FACTS[fact], REFUSED), row


def test_paths_of_all_families_are_compared_by_name() -> None:
    """What a state compares has no paths of a machine; of shared options, `names` says so."""
    wrong = [
        name
        for kind in ("habit", "identity")
        for name in options_with(TrainingOptions, "resume", kind)
        if name in actions() and info_of_option(actions()[name]).get("kind") is Path
    ]
    assert wrong == []
    assert recorded_values(Files.from_defaults(model=Path("/mine/clip.safetensors")), "habit") == {
        "model": "clip.safetensors",
        "other_model": None,
    }


def test_what_a_resumed_run_compares_is_recorded_in_files() -> None:
    rows = [row for row, fact in resume_facts().items() if fact in FACTS and row in cells_by_row()]
    assert [row for row in rows if cells_by_row()[row]["metadata"] != USED] == []


def test_recipes_have_what_they_may() -> None:
    allowed = set().union(*(list_allowed(f"{entry.training_script}.py") for entry in with_scripts().values()))
    found = {
        row: {"recipes": USED if row in allowed and not is_path(action) else REFUSED}
        for row, action in actions().items()
    }
    assert wrong_cells(found) == []


def test_packing_relocates_what_names_a_file() -> None:
    folder = Path("/somewhere/of mine")
    found = {row: {"pack": USED if is_path(action) else WITHOUT} for row, action in actions().items()}
    for name, key in KEYS.items():
        found[f"key:{name}"] = {"pack": USED if key.value_type in (PATH, PATHS, LIST_PATH) else WITHOUT}
    assert wrong_cells(found) == []

    for row, cells in found.items():
        if cells["pack"] == USED:
            value = (folder / "a file.bin").as_posix()
            moved = relocate_toml(f"{row.removeprefix('key:')} = {toml_value(value)}", MachinePaths(folder))
            assert tomllib.loads(moved.text) == {row.removeprefix("key:"): "a file.bin"}


def test_folders_of_other_trainers_set_what_the_table_says() -> None:
    named = set(re.findall(r"""["']([a-z0-9_]+)["']""", FOREIGN))
    found = {row: {"new": USED if row.removeprefix("key:") in named else WITHOUT} for row in list_rows()}
    assert wrong_cells(found) == []


# keys of subsets whose value no rule makes; `enable_bucket` and others stand for what a key needs
VALUES: dict[str, Any] = {
    "cache_directory": "other",
    "cache_format": "shards",
    "caption_extension": ".words",
    "caption_prefix": "word",
    "caption_separator": ";",
    "caption_suffix": "word",
    "class_tokens": "cat",
    "conditioning_data_dir": "other",
    "custom_attributes": {"diff_output_preservation": True},
    "discrete_flow_shift": 5.0,
    "face_crop_aug_range": [1.0, 2.0],
    "image_dir": "other",
    "keep_tokens_separator": "|||",
    "mask_directory": "other",
    "max_bucket_reso": 128,
    "max_timestep": 500,
    "metadata_file": "other.json",
    "min_bucket_reso": 32,
    "min_timestep": 100,
    "resize_interpolation": "area",
    "resolution": 128,
    "secondary_separator": ";;;",
    "trigger_word": "word",
    "validation_split": 0.5,
}
NEEDED: dict[str, dict[str, Any]] = {
    "enable_bucket": {"min_bucket_reso": 32, "max_bucket_reso": 128},
    "min_bucket_reso": {"enable_bucket": True, "max_bucket_reso": 128, "min_bucket_reso": 64},
    "max_bucket_reso": {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 64},
    "bucket_reso_steps": {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128},
    "bucket_no_upscale": {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128},
    "prior_loss_weight": {"is_reg": True},
}
COUNTED = (
    "num_repeats",
    "batch_size",
    "validation_split",
    "validation_seed",
)
LORA_OF_ONE_STRENGTH = "network_multiplier"  # other strengths are for tables of the plain layout


@pytest.mark.parametrize("name", [name for name in SUBSET_KEYS if name != LORA_OF_ONE_STRENGTH])
def test_keys_of_subsets_are_compared_and_recorded_as_the_table_says(name: str, tmp_path: Path) -> None:
    for folder in ("pics", "other"):
        (tmp_path / folder).mkdir()
    default = SUBSET_KEYS[name].default
    value = VALUES.get(name)
    if value is None:
        value = not default if isinstance(default, bool) else (default or 0) + 1
    if isinstance(default, float) and name not in VALUES:
        value = 0.5
    needed = NEEDED.get(name, {})

    plain, changed = (subset_table(tmp_path, **(needed | given)) for given in ({}, {name: value}))

    cells = {"metadata": USED if plain.describe() != changed.describe() else WITHOUT}
    if name not in COUNTED:
        cells["resume"] = REFUSED if plain.learning_keys != changed.learning_keys else WITHOUT
    assert wrong_cells({f"key:{name}": cells}) == []


# --- cells that a toy's training shows


def tried_by_toy() -> list[str]:
    return [name for name in training_options() if name not in TABLE["untried"]]


def tried_by_pictures() -> list[str]:
    named = script_options(IMAGE_SCRIPT)
    return [
        name
        for name in named
        if name not in TABLE["untried"] and name not in TABLE["untried_by_pictures"]["rows"]
    ]


def choose(names: list[str], number: int) -> list[str]:
    return random.Random(SEED).sample(names, number)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with what the values of options name."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


def test_some_options_are_to_a_training_what_the_table_says(folder: Path) -> None:
    trials = Trials()
    names = choose(tried_by_toy(), len(tried_by_toy()) // SHARE)
    assert wrong_cells({name: trials.cells(name) for name in names}) == []


@pytest.mark.slow
def test_all_options_are_to_a_training_what_the_table_says(folder: Path) -> None:
    trials = Trials()
    found = {name: trials.cells(name) for name in tried_by_toy()}
    assert [name for name, cells in found.items() if cells.keys() != TOY_COLUMNS] == []
    assert wrong_cells(found) == []


def test_some_options_go_with_live_texts_and_subsets_as_the_table_says(folder: Path) -> None:
    write_image_folders(folder)
    names = choose(tried_by_pictures(), len(tried_by_pictures()) // SHARE)
    assert wrong_cells({name: image_cells(name, folder) for name in names}) == []


@pytest.mark.slow
def test_all_options_go_with_live_texts_and_subsets_as_the_table_says(folder: Path) -> None:
    write_image_folders(folder)
    found = {name: image_cells(name, folder) for name in tried_by_pictures()}
    assert [name for name, cells in found.items() if cells.keys() != {LIVE, SUBSETS}] == []
    assert wrong_cells(found) == []


@pytest.mark.slow
def test_several_processes_train_with_the_options_that_the_table_says(folder: Path) -> None:
    """Some that a training reads, of groups that differ; those that only save or log are alike."""
    chosen = choose([name for name in tried_by_toy() if cells_by_row()[name]["metadata"] == USED], SHARE)
    found = {name: refusal_of_processes(name, folder) for name in chosen}
    verdicts = {name: {"processes": REFUSED if refusal else USED} for name, refusal in found.items()}
    assert wrong_cells(verdicts) == [], "\n".join(found.values())
