"""The form of the page New: its command, what it refuses, and names that are free."""

from dataclasses import replace
from pathlib import Path

import pytest

from browser.folders.captioning import CaptionForm, make_caption_argv
from browser.folders.described_folder import change_steps
from browser.folders.new_form import (
    NewForm,
    check_form,
    hint_at_word,
    list_fitting_recipes,
    list_key_changes,
    make_new_argv,
    read_steps,
)
from browser.pages.new.new_pages import find_free_name
from modules.errors import OptionError
from project.options import MODELS

FORM = NewForm(
    folder="/x/my clips",
    family="wan",
    task="t2v-1.3B",
    trigger="ohwx",
    name="own",
    steps="20",
    model_files={"dit": "/m/a=b.safetensors"},
)


def test_a_form_and_its_command_stand_for_each_other() -> None:
    words = make_new_argv(FORM, Path("models"))
    assert words[:3] == ["reelsmith", "new", "/x/my clips"]
    assert words[-2:] == ["--model_file", "dit=/m/a=b.safetensors"]
    assert NewForm.from_argv(words) == FORM
    assert NewForm.from_argv(make_new_argv(FORM, Path("other"), dry_run=True)) == FORM
    assert NewForm.from_argv(make_new_argv(FORM, Path("models"), overwrite=True)) == FORM
    full = replace(FORM, train="whole")
    assert "--train" in make_new_argv(full, Path("models"))
    assert NewForm.from_argv(make_new_argv(full, Path("models"), dry_run=True)) == full
    assert NewForm.from_address(full.address) == full


def test_where_pairs_could_be_learned_a_lora_is_named() -> None:
    form = replace(FORM, family="stable_diffusion", task="xl", model_files={})
    words = make_new_argv(form, Path("models"))
    assert words[words.index("--train") + 1] == "lora"
    assert NewForm.from_argv(words) == form
    assert "--train" not in make_new_argv(FORM, Path("models"))
    paired = replace(form, train="lllite")
    assert NewForm.from_argv(make_new_argv(paired, Path("models"))) == paired
    assert NewForm.from_address(paired.address) == paired


def test_what_another_model_cannot_have_is_not_kept() -> None:
    fields = {"family": ["wan"], "task": ["t2v-1.3B"]}
    for train in ("controlnet", "lllite", "nonsense", "lora"):
        assert not NewForm.from_fields({**fields, "train": [train]}).train
    assert NewForm.from_fields({**fields, "train": ["whole"]}).train == "whole"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"family": ""}, "Model: choose one"),
        ({"family": "nothing"}, "Model nothing: choose one of wan"),
        ({"task": ""}, "Version: choose one of t2v-1.3B"),
        ({"task": "t9v"}, "Version t9v: choose one of t2v-1.3B"),
        ({"trigger": "a\tb"}, "Trigger word 'a\\tb' holds a tab"),
        ({"name": "a/b"}, "Name"),
        ({"name": "aux.txt"}, "Name 'aux.txt': on Windows aux is a device"),
        ({"name": 'a"b'}, 'names on Windows cannot have the character "'),
        ({"name": "own."}, "Name 'own.': it ends in a dot"),
        ({"train": "embedding", "trigger": ""}, "Trigger word: an embedding is a new word"),
        ({"steps": "0"}, "Training steps 0: use a whole number"),
        ({"steps": "-5"}, "Training steps -5: use a whole number"),
        ({"steps": "2.5"}, "Training steps 2.5: use a whole number"),
        ({"steps": "many"}, "Training steps many: use a whole number"),
        ({"steps": "9" * 5000}, "Training steps 999"),
        ({"steps": "²"}, "Training steps ²"),
        ({"steps": "10000001"}, "Training steps 10000001: use a whole number from 1 to 10,000,000"),
        ({"steps": "000000000001999999999"}, "Training steps 000000000001999999999: use a whole number"),
    ],
)
def test_wrong_fields_are_refused_by_their_labels(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(OptionError) as error:
        check_form(NewForm(**{**FORM.__dict__, **changes}))
    assert reason in str(error.value)


def test_a_complete_form_is_taken() -> None:
    check_form(FORM)
    assert (read_steps("2000"), read_steps("0000000000000020")) == (2000, 20)


@pytest.mark.parametrize(
    ("word", "is_known"), [("cat", True), (" Woman ", True), ("mrsfluff", False), ("", False)]
)
def test_a_word_that_models_know_is_taken_with_a_hint(word: str, is_known: bool) -> None:
    assert ("Every model already knows" in hint_at_word(word)) == is_known
    check_form(NewForm(**{**FORM.__dict__, "trigger": word.strip()}))


def test_only_changed_keys_are_written() -> None:
    other = NewForm(**{**FORM.__dict__, "steps": "30", "name": ""})
    values = {"max_train_steps": 20}
    assert list_key_changes(other, FORM, values).new_values == {"max_train_steps": 30}
    assert list_key_changes(FORM, FORM, values).new_values == {}


def test_what_new_derives_from_the_steps_follows_them() -> None:
    values = {"max_train_steps": 2000, "save_every_n_steps": 200, "sample_every_n_steps": 200}
    values |= {"save_last_n_steps_state": 200}

    shorter = change_steps(values, 100)
    longer = change_steps({**values, **shorter.new_values}, 3000)

    times = dict.fromkeys(("save_every_n_steps", "save_last_n_steps_state", "sample_every_n_steps"), 50)
    assert shorter.new_values == {"max_train_steps": 100, **times}
    assert longer.new_values == {"max_train_steps": 3000, **dict.fromkeys(times, 300)}


def test_saves_of_a_whole_model_follow_its_steps_too() -> None:
    values = {"max_train_steps": 2000, "fused_backward_pass": True, "save_every_n_steps": 500}
    values |= {"save_last_n_steps": 500, "save_last_n_steps_state": 500, "sample_every_n_steps": 200}

    change = change_steps(values, 4000)

    saves = dict.fromkeys(("save_every_n_steps", "save_last_n_steps", "save_last_n_steps_state"), 1000)
    assert change.new_values == {"max_train_steps": 4000, **saves, "sample_every_n_steps": 400}
    assert not change.user_values


def test_what_somebody_changed_by_hand_stays_and_is_named() -> None:
    values = {"max_train_steps": 2000, "save_every_n_steps": 7, "save_last_n_steps_state": 200}

    change = change_steps(values, 100)

    assert change.new_values == {"max_train_steps": 100, "save_last_n_steps_state": 50}
    assert change.text == (
        "run.toml: max_train_steps = 100, save_last_n_steps_state = 50. "
        "save_every_n_steps = 7 stays: it was typed by hand"
    )


def test_steps_take_the_place_of_epochs() -> None:
    assert change_steps({"max_train_epochs": 8}, 100).new_values == {
        "max_train_steps": 100,
        "max_train_epochs": None,
    }


def test_a_name_that_a_lora_has_gets_a_number(tmp_path: Path) -> None:
    (tmp_path / "cat.run-history.jsonl").touch()
    assert find_free_name(tmp_path, "cat") == ""  # a run that has no LoRA yet
    (tmp_path / "cat.safetensors").touch()
    assert find_free_name(tmp_path, "cat") == "cat-2"
    (tmp_path / "cat-2-history.jsonl").touch()
    assert find_free_name(tmp_path, "cat") == "cat-3"


def test_captions_are_written_by_a_repository_a_folder_or_a_server() -> None:
    start = ["python", "tools/caption_dataset.py", "--dataset_config", "dataset.toml"]
    assert make_caption_argv(CaptionForm()) == [*start, "--model", "Qwen/Qwen2-VL-2B-Instruct"]
    assert make_caption_argv(CaptionForm("/m/vision", " what\nis it? "), 3) == [
        *start,
        *("--model", "/m/vision", "--prompt", "what is it?", "--try_on", "3"),
    ]
    server = make_caption_argv(CaptionForm("http://localhost:8000/v1 qwen"))
    assert server == [*start, "--api_base", "http://localhost:8000/v1", "--api_model", "qwen"]
    with pytest.raises(OptionError, match="after the address"):
        make_caption_argv(CaptionForm("http://localhost:8000/v1"))


def test_captions_are_written_as_objects_where_the_form_says_so() -> None:
    fields = {"engine": "/m", "caption_format": "fibo_2", "convert_plain": "yes"}
    words = make_caption_argv(CaptionForm.read(fields))
    assert words[-3:] == ["--caption_format", "fibo_2", "--convert_plain"]
    assert "--convert_plain" not in make_caption_argv(CaptionForm.read({**fields, "convert_plain": ""}))
    assert make_caption_argv(CaptionForm.read({**fields, "caption_format": ""}))[-2:] == ["--model", "/m"]
    with pytest.raises(OptionError, match="no such caption format"):
        make_caption_argv(CaptionForm(format="wan --model /x"))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("2,000", 2000),
        ("２０００", 2000),
        ("2 000", 2000),
        ("2.000", 2000),
        ("1'500", 1500),
        ("1,500,000", 1500000),
        ("2000", 2000),
    ],
)
def test_steps_may_have_marks_between_thousands(text: str, steps: int) -> None:
    assert read_steps(text) == steps


@pytest.mark.parametrize("text", ["2,00", "2,0000", "1,500.000", "0,200", "2,", "abc", "0", "1.5"])
def test_what_is_no_number_of_steps_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="use a whole number"):
        read_steps(text)


def test_the_only_task_of_a_model_is_chosen() -> None:
    assert NewForm.from_fields({"family": ["anima"]}).task == "base"
    assert NewForm.from_fields({"family": ["anima"], "task": [""]}).task == "base"
    assert NewForm.from_fields({"family": ["wan"]}).task == ""


def test_recipes_are_offered_for_their_model_and_kind_alone() -> None:
    names = [recipe.name for recipe in list_fitting_recipes("wan", "t2v-1.3B", "")]
    fields = {"family": ["wan"], "task": ["t2v-1.3B"], "recipe": ["pocket-shape"], "folder": ["clips"]}
    form = NewForm.from_fields(fields)

    assert "pocket-shape" in names
    assert list_fitting_recipes("wan", "t2v-1.3B", "whole") == []
    assert form.recipe == "pocket-shape"
    assert NewForm.from_address(form.address) == form
    words = make_new_argv(form, MODELS)
    assert words[words.index("--recipe") + 1] == "pocket-shape"
    assert NewForm.from_argv(words).recipe == "pocket-shape"
    for wrong in ("../x", "/etc/passwd", "x.toml", "pocket-shap"):
        assert NewForm.from_fields({**fields, "recipe": [wrong]}).recipe == ""
    assert NewForm.from_fields({**fields, "task": ["t2v-14B"]}).recipe == ""
