"""Which options go together."""

from pathlib import Path

from tests.data_tools.captions.making import options_of

TOML = Path("data.toml")
SERVER = ("--api_base", "http://localhost:8000/v1", "--api_model", "m")


def test_a_dry_run_needs_no_model_and_replacements_keep_their_order() -> None:
    words = ("--replace", "480x832", "512x512", "--replace", "a b", "", "--replace_regex", r"(\d)p", r"\1")
    wording = options_of(TOML, "--dry_run", *words).wording

    assert wording.replace == (("480x832", "512x512"), ("a b", ""))
    assert wording.replace_regex == ((r"(\d)p", r"\1"),)
