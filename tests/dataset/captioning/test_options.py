"""Which options go together."""

from pathlib import Path

import pytest

from modules.errors import OptionError
from tests.dataset.captioning.making import options_of

TOML = Path("data.toml")
SERVER = ("--api_base", "http://localhost:8000/v1", "--api_model", "m")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--model or --api_base is missing"),
        (("--model", "m", *SERVER), "exclude each other"),
        ((*SERVER, "--batch_size", "2"), "--batch_size is for --model"),
        (("--api_base", "localhost:8000", "--api_model", "m"), "give an address such as"),
        (("--api_base", "http://me:secret@host/v1", "--api_model", "m"), "a password"),
        (("--model", "m", "--prompt", " "), "--prompt is empty"),
        (("--model", "m", "--replace", "", "b"), "say what to replace"),
        (("--model", "m", "--replace_regex", "(", "b"), "re.sub"),
        (("--model", "m", "--replace_regex", "a", r"\1"), "re.sub"),
        (("--model", "m", "--trigger_word", "a\nb"), "one line"),
        (("--edit_only",), "--edit_only changes nothing by itself"),
        (("--edit_only", "--trigger_word", "a", "--model", "m"), "leave out --model"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        options_of(TOML, *words)
    assert error.value.exit_code == 2
    assert "secret" not in str(error.value)


def test_a_dry_run_needs_no_model_and_replacements_keep_their_order() -> None:
    words = ("--replace", "480x832", "512x512", "--replace", "a b", "", "--replace_regex", r"(\d)p", r"\1")
    wording = options_of(TOML, "--dry_run", *words).wording

    assert wording.replace == (("480x832", "512x512"), ("a b", ""))
    assert wording.replace_regex == ((r"(\d)p", r"\1"),)
