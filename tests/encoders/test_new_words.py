"""Words that text encoders read as further rows: tokens, states, gradients, files that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from encoders.language_encoder import LanguageModelEncoder
from encoders.new_words import GrowingEmbedding, ModelWord, give_words
from encoders.t5 import T5TextEncoder
from modules.errors import CheckpointError
from protocols.requests import Prompt
from tests.encoders.test_language_models import CPU, Z_IMAGE
from tests.encoders.test_text_encoders import KINDS, Encoder, encoded
from tests.encoders.their_t5 import their_t5
from tests.ltx_2.test_text import text_gemma, tiny_encoder
from tests.tiny.language_models import qwen3, write_model, write_qwen_tokenizer
from tests.tiny.picture_encoders import t5xxl_config, t5xxl_tensors, write_t5xxl

MAKERS: dict[str, Callable[[Path], Any]] = {
    **KINDS,
    "Gemma 3": lambda folder: tiny_encoder(folder, text_gemma()),
}
SLOW = ("FramePack's CLIP-L", "FramePack's Llama", "Llama without begin", "umT5 by pieces", "Gemma 3")


def table_of(encoder: Encoder) -> Tensor:
    return encoder.network.get_parameter(encoder.embedding).detach().float()


@pytest.mark.slow_cases(*SLOW)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_word_with_the_vectors_of_known_tokens_is_read_as_these(kind: str, tmp_path: Path) -> None:
    """So blanks, tokens around a text, positions and scales of embeddings are right."""
    made = MAKERS[kind](tmp_path)
    made.load(CPU)
    text = "a rabbit in the rabbit grass"
    vectors = table_of(made)[made.tokenize_word("rabbit")]
    expected = encoded(made, text)
    counted = made.token_counter()(text).tokens
    made.free()
    word = ModelWord("zorb", content={made.word_keys[0]: vectors}, source=Path("zorb.safetensors"))
    give_words([made], [word])
    made.load(CPU)

    found = encoded(made, "a zorb in the embedding:Zorb.pt grass")

    assert isinstance(made.network.get_submodule(made.embedding.removesuffix(".weight")), GrowingEmbedding)
    assert made.token_counter()("a zorb in the zorb grass").tokens == counted
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs.keys() - {"input_ids"}:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-5)


def test_weights_of_parts_count_the_tokens_of_a_word(tmp_path: Path) -> None:
    encoder = KINDS["Qwen"](tmp_path)
    width = encoder._config.dim
    give_words([encoder], [ModelWord("zorb", content={"x": torch.ones(3, width)}, source=Path("zorb.pt"))])
    encoder.load(CPU)
    text = "a zorb in"

    plain, weighed = encoded(encoder, Prompt(text), Prompt(text, weighted_spans=((2, 6, 2.0),)))

    states, heavy = plain["vlm_embed"], weighed["vlm_embed"]
    ratios = (heavy / states).mean(dim=1)
    assert ratios.eq(2).sum() == 3
    assert ratios.eq(1).sum() == len(ratios) - 3


def test_gradients_of_rows_are_those_of_transformers(tmp_path: Path) -> None:
    """Of T5 and Qwen3, whose networks are given rows of cat(table, rows)."""
    t5 = T5TextEncoder(write_t5xxl(tmp_path / "t5"), torch.float32, max_length=16, uses_mask=True)
    path = write_model(tmp_path / "model.safetensors", qwen3())
    qwen = LanguageModelEncoder(Z_IMAGE, path, torch.float32, write_qwen_tokenizer(tmp_path / "tokenizer"))
    for encoder, key, index in ((t5, "t5_out", -1), (qwen, "llm_embed", -2)):
        give_words([encoder], [ModelWord("zorb", 2)])
        encoder.load(CPU)
        encoder.network.requires_grad_(False)
        table = encoder.network.get_submodule(encoder.embedding.removesuffix(".weight"))
        assert isinstance(table, GrowingEmbedding)
        torch.manual_seed(0)
        rows = torch.nn.Parameter(torch.randn(2, table.embedding_dim))
        table.get_new_vectors = lambda rows=rows: rows
        (conditions,) = encoder.encode([Prompt("a zorb in the grass")])
        states: Any = conditions[key]
        states = states[0] if isinstance(states, list) else states
        weights = torch.randn_like(states)
        (ours,) = torch.autograd.grad((states * weights).sum(), rows)

        templated = encoder.apply_template(Prompt("a zorb in the grass"))
        ids = torch.tensor([encoder._loaded.get()[1].read(templated.text).ids])
        if encoder is t5:
            ids = torch.nn.functional.pad(ids, (0, 16 - ids.shape[1]))
        embeds = torch.cat([table.weight, rows])[ids]
        their: Any = their_t5(t5xxl_config(), t5xxl_tensors()) if encoder is t5 else qwen3()
        settings = {"attention_mask": conditions["t5_attn_mask"][None]} if encoder is t5 else {}
        out = their(inputs_embeds=embeds, output_hidden_states=True, **settings)
        their_states = out.last_hidden_state if index == -1 else out.hidden_states[index]
        (expected,) = torch.autograd.grad((their_states[0] * weights).sum(), rows)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert ours.abs().min(dim=1).values.gt(0).all()


def test_files_of_other_programs_and_models(tmp_path: Path) -> None:
    t5 = T5TextEncoder(write_t5xxl(tmp_path / "t5"), torch.float32)
    width = t5xxl_config().dim

    def give(content: Any, *encoders: Any) -> Any:
        given = [replace_words(encoder) for encoder in (encoders or (t5,))]
        word = ModelWord("zorb", content=content, source=Path("zorb.pt"), option="--lora_weight")
        give_words(given, [word])
        return given[0]

    for content in (
        {"t5": torch.ones(2, width), "clip_l": torch.ones(2, 8)},  # OneTrainer
        {"t5xxl": torch.ones(2, width)},
        {"string_to_param": {"*": torch.ones(2, width)}},  # the Web UI
        {"zorb": torch.ones(2, width)},  # diffusers
    ):
        (word,) = give(content).added_words
        assert (word.word.text, word.word.count) == ("zorb", 2)
    clip = KINDS["CLIP-L"](tmp_path / "clip")
    assert not give({"t5xxl": torch.ones(2, width)}, clip, t5).added_words  # CLIP reads it as text
    for content, why in (
        ({"qwen3_4b": torch.ones(1, 8), "clip_g": torch.ones(1, 8)}, "clip_g, qwen3_4b. .*take t5xxl"),
        ({"t5xxl": torch.ones(1, 2, 3)}, "not a row of vectors"),
        ({"t5xxl": torch.full((1, width), torch.nan)}, "NaN"),
    ):
        with pytest.raises(CheckpointError, match=why):
            give(content)
    wide = give({"t5xxl": torch.ones(1, width + 1)})
    with pytest.raises(CheckpointError, match=f"have width {width + 1}, but .* takes width {width}"):
        wide.load(CPU)


def replace_words(encoder: Any) -> Any:
    encoder.added_words = ()
    return encoder
