"""Weights of a prompt's parts in the rows of the language model, in HunyuanVideo and FramePack."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from frame_pack.text_encoders import FramePackClip, FramePackLlama
from hunyuan_model.text_encoders import LLAMA_TOKENIZER, LlavaTextEncoder, clip_text_encoder
from modules.contract.requests import Prompt, Spans
from tests.tiny.hunyuan_encoders import write_llama_tokenizer, write_text_encoders

CPU = torch.device("cpu")
TEXT = "the sun rises over the hills while a squirrel laughs 😀 twice"
LONG = "rabbit " * 300
SUN = (4, 13, 1.5)
FACE = (TEXT.index("😀"), TEXT.index("😀") + 1, 0.5)


@pytest.fixture(scope="module", params=[True, False], ids=["adds begin", "leaves begin out"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_text_encoders(folder)
    for path in folder.rglob("tokenizer.json"):
        if b"begin_of_text" in path.read_bytes():
            write_llama_tokenizer(path.parent, request.param)
    return folder


@pytest.fixture(scope="module", params=["HunyuanVideo", "FramePack"])
def rows_of(folder: Path, request: pytest.FixtureRequest) -> "Rows":
    is_first = request.param == "HunyuanVideo"
    encoder = LlavaTextEncoder(folder, torch.float16) if is_first else FramePackLlama(folder, torch.float16)
    encoder.load(CPU)
    return Rows(encoder, "llm" if is_first else "llama_vec")


class Rows:
    """The rows of a text."""

    def __init__(self, encoder: object, key: str) -> None:
        self.encoder, self.key = encoder, key

    def __call__(self, text: str, spans: Spans = ()) -> Tensor:
        (conditions,) = self.encoder.encode([Prompt(text, spans)])  # type: ignore[attr-defined]
        return conditions[self.key]


def test_a_weight_of_one_changes_no_bit(rows_of: Rows) -> None:
    for text in (TEXT, LONG, ""):
        assert torch.equal(rows_of(text, ((0, len(text), 1.0),)), rows_of(text))


def test_the_rows_of_the_parts_tokens_are_multiplied(rows_of: Rows, folder: Path) -> None:
    tokenizer = LLAMA_TOKENIZER.load(None, folder / "text_encoder", "Llama")

    def tokens_in(text: str) -> int:
        return len(tokenizer.read(text).ids) - 1  # without the begin token

    plain, weighed = rows_of(TEXT), rows_of(TEXT, (SUN, FACE))

    expected = plain.clone()
    for start, end, weight in (SUN, FACE):
        # the blank in front of a word is the first character of its token
        rows = slice(tokens_in(TEXT[:start].rstrip()), tokens_in(TEXT[:end]))
        expected[rows] = (expected[rows].float() * weight).half()
    # the blank in front of the face is a token by itself, outside of the part
    face = tokens_in(TEXT[: FACE[0]].rstrip())
    if tokens_in(TEXT[: FACE[0]]) > face:
        expected[face] = plain[face]
    assert torch.equal(weighed, expected)
    assert (weighed != plain).any(dim=1).sum() >= 4


def test_a_weight_of_all_the_text_spares_what_the_template_adds(rows_of: Rows) -> None:
    text = "a rabbit"
    plain, weighed = rows_of(text), rows_of(text, ((0, len(text), 2.0),))
    changed = (weighed != plain).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(len(changed)))  # the end of the turn and what is masked stay
    assert torch.equal(weighed[: len(changed)], 2 * plain[: len(changed)])
    assert 0 < len(changed) < int(plain.any(dim=1).sum())


@pytest.mark.parametrize("kind", [clip_text_encoder, FramePackClip])
def test_clips_vector_has_no_weights(folder: Path, kind: type[clip_text_encoder]) -> None:
    encoder = kind(folder, torch.float16)
    encoder.load(CPU)
    plain, weighed = encoder.encode([Prompt(TEXT), Prompt(TEXT, (SUN,))])
    assert all(torch.equal(plain[key], weighed[key]) for key in encoder.keys)
