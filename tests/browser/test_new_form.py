"""The form of the page New: its command, what it refuses, and names that are free."""

from pathlib import Path

import pytest

from browser.captioning import caption_words
from browser.new_form import NewForm, check_form, list_key_changes, new_words, read_steps
from browser.new_pages import find_free_name
from modules.errors import OptionError

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
    words = new_words(FORM, Path("models"))
    assert words[:3] == ["reelsmith", "new", "/x/my clips"]
    assert words[-2:] == ["--model_file", "dit=/m/a=b.safetensors"]
    assert NewForm.of_words(words) == FORM
    assert NewForm.of_words(new_words(FORM, Path("other"), dry_run=True)) == FORM
    assert NewForm.of_words(new_words(FORM, Path("models"), overwrite=True)) == FORM


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"family": ""}, "Model: choose one"),
        ({"family": "nothing"}, "Model nothing: choose one of wan"),
        ({"task": ""}, "Task: choose one of t2v-1.3B"),
        ({"task": "t9v"}, "Task t9v: choose one of t2v-1.3B"),
        ({"trigger": "a\tb"}, "Trigger word 'a\\tb' holds a tab"),
        ({"name": "a/b"}, "Name"),
        ({"name": "aux.txt"}, "Name 'aux.txt': on Windows aux is a device"),
        ({"name": 'a"b'}, 'names on Windows cannot have the character "'),
        ({"name": "own."}, "Name 'own.': it ends in a dot"),
        ({"steps": "0"}, "Steps 0: give a whole number"),
        ({"steps": "-5"}, "Steps -5: give a whole number"),
        ({"steps": "2.5"}, "Steps 2.5: give a whole number"),
        ({"steps": "many"}, "Steps many: give a whole number"),
        ({"steps": "9" * 5000}, "Steps 999"),
        ({"steps": "²"}, "Steps ²"),
    ],
)
def test_wrong_fields_are_refused_by_their_labels(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(OptionError) as error:
        check_form(NewForm(**{**FORM.__dict__, **changes}))
    assert reason in str(error.value)


def test_a_complete_form_is_taken() -> None:
    check_form(FORM)
    assert read_steps("2000") == 2000


def test_only_changed_keys_are_written() -> None:
    other = NewForm(**{**FORM.__dict__, "steps": "30", "name": ""})
    assert list_key_changes(other, FORM) == {"max_train_steps": 30}
    assert list_key_changes(FORM, FORM) == {}


def test_a_name_that_a_lora_has_gets_a_number(tmp_path: Path) -> None:
    (tmp_path / "cat.run-history.jsonl").touch()
    assert find_free_name(tmp_path, "cat") == ""  # a run that has no LoRA yet
    (tmp_path / "cat.safetensors").touch()
    assert find_free_name(tmp_path, "cat") == "cat-2"
    (tmp_path / "cat-2-history.jsonl").touch()
    assert find_free_name(tmp_path, "cat") == "cat-3"


def test_captions_are_written_by_a_repository_a_folder_or_a_server() -> None:
    start = ["python", "tools/caption_dataset.py", "--dataset_config", "dataset.toml"]
    assert caption_words("", "") == [*start, "--model", "Qwen/Qwen2-VL-2B-Instruct"]
    assert caption_words("/m/vision", " what\nis it? ", 3) == [
        *start,
        *("--model", "/m/vision", "--prompt", "what is it?", "--try_on", "3"),
    ]
    server = caption_words("http://localhost:8000/v1 qwen", "")
    assert server == [*start, "--api_base", "http://localhost:8000/v1", "--api_model", "qwen"]
    with pytest.raises(OptionError, match="behind the address"):
        caption_words("http://localhost:8000/v1", "")
