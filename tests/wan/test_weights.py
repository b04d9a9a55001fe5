"""Weights of a prompt's parts in umT5's rows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.contract.requests import Prompt, Spans
from tests.tiny.wan_encoders import T5_FILE, t5_tensors, write_tokenizer
from wan.t5 import TOKENIZER, WanTextEncoder, clean_spans, clean_text

CPU = torch.device("cpu")
TEXT = "the sun rises over the hills while a squirrel laughs"
LONG = "rabbit " * 600
# texts whose characters move when they are cleaned: blanks, entities, full width, mojibake, accents
UNCLEAN = "  a \n red &amp;&amp; blue\t\tcar  ＡＢＣ cafÃ©  &lt;b&gt; "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    torch.save(t5_tensors(), folder / T5_FILE)
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(scope="module", params=["tokenizer.json", "spiece.model"])
def encoder(folder: Path, request: pytest.FixtureRequest) -> WanTextEncoder:
    encoder = WanTextEncoder(folder / T5_FILE, folder / "google" / "umt5-xxl" / request.param)
    encoder.load(CPU)
    return encoder


def rows_of(encoder: WanTextEncoder, text: str, spans: Spans = ()) -> Tensor:
    ((rows,),) = [conditions["t5"] for conditions in encoder.encode([Prompt(text, spans)])]
    return rows


def part(text: str, words: str, weight: float) -> tuple[int, int, float]:
    start = text.index(words)
    return start, start + len(words), weight


def test_both_forms_of_the_tokenizer_place_tokens_alike(folder: Path) -> None:
    json, pieces = (
        TOKENIZER.load(folder / "google" / "umt5-xxl" / name, folder / T5_FILE, "umT5").read
        for name in ("tokenizer.json", "spiece.model")
    )
    for text in (TEXT, "", "日本語 and 😀 in the hills", LONG):
        for tokenizer in (json, pieces):
            assert len(tokenizer(text).places) == len(tokenizer(text).ids)
            assert tokenizer(text).places[-1] is None
    assert json(TEXT).places == pieces(TEXT).places


def test_characters_that_sentencepiece_joins_keep_their_places(folder: Path) -> None:
    """Its own rules make two letters of the one that joins f and i."""
    tokenizer = TOKENIZER.load(folder / "google" / "umt5-xxl" / "spiece.model", folder / T5_FILE, "umT5").read
    text = "the ﬁne rabbit"
    places = [place for place in tokenizer(text).places if place is not None]
    assert "".join(text[start:end] for start, end in places) == text


def test_parts_are_found_in_the_cleaned_text() -> None:
    words = {
        "red &amp;&amp; blue": "red && blue",
        "car": "car",
        "ＡＢＣ cafÃ©": "ABC café",
        "&lt;b&gt;": "<b>",
    }
    spans = tuple(part(UNCLEAN, raw, 1.5) for raw in words)
    cleaned, found = clean_spans(UNCLEAN, spans)
    assert cleaned == clean_text(UNCLEAN)
    assert [cleaned[start:end] for start, end, _ in found] == list(words.values())


def test_an_accent_behind_a_part_moves_no_other_part_by_more_than_itself() -> None:
    text = "cafe\u0301 noir"
    cleaned, ((start, end, _), (first, last, _)) = clean_spans(text, ((0, 4, 2.0), (6, 10, 2.0)))
    assert cleaned == "café noir"
    assert (start, end) == (0, 4)
    assert abs(first - 5) <= 1
    assert last <= len(cleaned)
