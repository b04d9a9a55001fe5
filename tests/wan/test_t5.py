"""The umT5 encoder against recorded numbers and transformers, and what the prompts go through before it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from encoders.t5_network import T5Network, load_t5, relative_bucket
from protocols.requests import Prompt
from tests.golden_cases import make_weights, read_case
from tests.tiny.wan_encoders import T5_FILE, TEXT_DIM, t5_config, t5_tensors, write_tokenizer
from wan.t5 import TOKENIZER, UMT5, WanTextEncoder, clean_spans, clean_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release's text encoder with both forms of its tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    torch.save(t5_tensors(), folder / T5_FILE)
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def encoded(encoder: WanTextEncoder, *texts: str) -> list[Tensor]:
    return [conditions["t5"][0] for conditions in encoder.encode([Prompt(text) for text in texts])]


def test_recorded_embeddings_are_met(tmp_path: Path) -> None:
    description, tensors = read_case("umt5_encoder")
    save_file(
        make_weights(description["weights_model_key"], description["weights"]), tmp_path / "t5.safetensors"
    )
    t5 = load_t5(tmp_path / "t5.safetensors", CPU, UMT5)
    lengths = tensors["attention_mask"].sum(1).tolist()

    with torch.no_grad():
        ours = t5([ids[:length] for ids, length in zip(tensors["input_ids"], lengths, strict=True)])

    for index, embeds in enumerate(ours):
        assert (embeds - tensors[f"out_{index}_trimmed"]).abs().max() <= description["tolerance"]["out_*"][
            "atol"
        ]


def test_recorded_buckets_are_met_exactly() -> None:
    _, tensors = read_case("umt5_encoder")
    assert torch.equal(relative_bucket(tensors["relative_position"], 32), tensors["bucket"])


def test_an_embedding_is_as_long_as_its_prompt_and_at_most_512(folder: Path) -> None:
    encoder = WanTextEncoder(folder / T5_FILE)
    encoder.load(CPU)
    empty, long = encoded(encoder, "", "rabbit " * 600)
    assert empty.shape == (1, TEXT_DIM)  # the end token
    assert long.shape == (512, TEXT_DIM)
    assert empty.untyped_storage().nbytes() == empty.nbytes  # not a view that holds the others


def test_a_float32_file_computes_in_float32_and_a_bfloat16_one_in_bfloat16(folder: Path) -> None:
    assert load_t5(folder / T5_FILE, CPU, UMT5).norm.weight.dtype == torch.float32
    torch.save(t5_tensors(dtype=torch.bfloat16), folder / "half.pth")
    encoder = WanTextEncoder(folder / "half.pth")
    encoder.load(CPU)
    exact = WanTextEncoder(folder / T5_FILE)
    exact.load(CPU)
    half, full = encoded(encoder, TEXT)[0], encoded(exact, TEXT)[0]
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_float16_activations_stay_finite() -> None:
    t5 = T5Network(t5_config()).half()
    tensors = {name: tensor.half() for name, tensor in t5_tensors().items()}
    tensors["blocks.0.ffn.fc2.weight"] *= 60000
    t5.load_state_dict(tensors)
    with torch.no_grad():
        assert t5([torch.tensor([5, 6, 1])])[0].isfinite().all()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n\t b  ", "a b"),
        ("a &amp;amp; b", "a & b"),
        ("schÃ¶n", "schön"),
        ("一，二", "一,二"),  # ftfy turns full-width punctuation into plain
        ("", ""),
    ],
)
def test_text_is_cleaned(text: str, clean: str) -> None:
    assert clean_text(text).strip() == clean


TEXT = "the sun rises over the hills while a squirrel laughs"
LONG = "rabbit " * 600
# texts whose characters move when they are cleaned: blanks, entities, full width, mojibake, accents
UNCLEAN = "  a \n red &amp;&amp; blue\t\tcar  ＡＢＣ cafÃ©  &lt;b&gt; "


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
            assert len(tokenizer(text).char_spans) == len(tokenizer(text).ids)
            assert tokenizer(text).char_spans[-1] is None
    assert json(TEXT).char_spans == pieces(TEXT).char_spans


def test_characters_that_sentencepiece_joins_keep_their_places(folder: Path) -> None:
    """Its own rules make two letters of the one that joins f and i."""
    tokenizer = TOKENIZER.load(folder / "google" / "umt5-xxl" / "spiece.model", folder / T5_FILE, "umT5").read
    text = "the ﬁne rabbit"
    places = [place for place in tokenizer(text).char_spans if place is not None]
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
    assert cleaned == clean_text(UNCLEAN).strip()
    assert [cleaned[start:end] for start, end, _ in found] == list(words.values())


def test_an_accent_behind_a_part_moves_no_other_part_by_more_than_itself() -> None:
    text = "cafe\u0301 noir"
    cleaned, ((start, end, _), (first, last, _)) = clean_spans(text, ((0, 4, 2.0), (6, 10, 2.0)))
    assert cleaned == "café noir"
    assert (start, end) == (0, 4)
    assert abs(first - 5) <= 1
    assert last <= len(cleaned)
