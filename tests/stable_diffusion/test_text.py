"""Weights of prompts, and states of texts: those of diffusers, or of a plain loop."""

import json
import logging
import random
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from encoders.clip_layers import ClipText
from modules.errors import OptionError
from modules.script_options import parse_options
from stable_diffusion.contract import Model
from stable_diffusion.sdxl.family import family_for_text_caching
from stable_diffusion.sdxl.options import SdxlTextCachingOptions
from stable_diffusion.text import PromptEncoder
from stable_diffusion.text_checkpoints import read_folder_text
from stable_diffusion.tokenizers import (
    MAX_WEIGHT,
    WeightedText,
    cut_into_chunks,
    find_cut_off_text,
    parse_weights,
)
from tests.stable_diffusion.loaded import load, make_towers, options
from tests.tiny import stable_diffusion as tiny
from tests.tiny.hunyuan_encoders import save
from tests.tiny.stable_diffusion import tokenizer_folder, write_sdxl

CPU = torch.device("cpu")
KINDS = ("sd1", "sd2", "sdxl")
LONG = " ".join(["a red cat, an old house in the forest,"] * 12)  # more than 75 tokens
PLAIN = ("A  cat, of a girl's 2 dogs.", "", "naïve 日本語 🙂: | <|endoftext|> x", "x" * 400, LONG)
# a text, and what it says in words: its parts with their weights; None: BREAK
WEIGHTED: dict[str, list[tuple[str, float] | None]] = {
    "a (red:1.4) [old] cat": [("a ", 1), ("red", 1.4), (" ", 1), ("old", 1 / 1.1), (" cat", 1)],
    f"{LONG} (cat:0)": [(f"{LONG} ", 1), ("cat", 0)],
    f"(a cat BREAK {LONG}:1.2) dog": [("a cat ", 1.2), None, (LONG, 1.2), (" dog", 1)],
}


@cache
def opened(kind: str, folder: Path) -> tuple[Any, Model, Model]:
    """The text half of diffusers' pipeline, and our models of its folder and of a single file."""
    path = tiny.write_folder(kind, folder / "folder")
    pipeline = getattr(diffusers, tiny.KINDS[kind].pipeline).from_pretrained(path, unet=None, vae=None)
    tokenizers = tiny.tokenizer_folder(folder / "tokenizers")
    of_folder, of_file = (
        load(one, "--tokenizer_cache_dir", tokenizers) for one in (path, tiny.WRITERS[kind](folder))
    )
    return pipeline, of_folder, of_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.mark.slow_cases("sd1-False", "sd2-False", "sdxl-False")
@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_text_has_the_states_of_diffusers(folder: Path, kind: str, is_file: bool) -> None:
    """A single file of SD 2 has one layer more, which does not count."""
    pipeline, *models = opened(kind, folder / kind)
    model = models[is_file]
    texts = PromptEncoder(model.text_encoders, model.kind, options().text)
    alone = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    for text in PLAIN:
        theirs = pipeline.encode_prompt(text, **alone)
        context, pooled = theirs[0][0], theirs[2][0] if len(theirs) == 4 else None
        found = texts.encode(text)
        torch.testing.assert_close(found.context, context, atol=1e-6, rtol=0)
        assert (found.pooled is None) == (pooled is None) == (kind != "sdxl")
        if found.pooled is not None:
            torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_clip_skip_counts_from_the_last_layer(folder: Path, kind: str) -> None:
    pipeline, model, _ = opened(kind, folder / kind)
    given = pipeline.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    encoder = pipeline.text_encoder
    with torch.no_grad():
        states = encoder(given, output_hidden_states=True).hidden_states
        for skip in (1, 2, 3):
            texts = PromptEncoder(model.text_encoders, model.kind, options("--clip_skip", skip).text)
            state = states[-skip] if kind == "sdxl" else encoder.final_layer_norm(states[-skip])
            found = texts.encode("a cat").context[:, : state.shape[-1]]
            torch.testing.assert_close(found, state[0], atol=1e-5, rtol=0)
    with pytest.raises(OptionError, match=r"--clip_skip 4: the text encoder .* has 3 layers"):
        PromptEncoder(model.text_encoders, model.kind, options("--clip_skip", 4).text)


@pytest.mark.parametrize(("layers", "loaded"), [(3, 3), (23, 23), (24, 23)])
def test_a_folder_of_sd2_with_all_layers_of_open_clip_is_loaded_without_the_last(
    tmp_path: Path, layers: int, loaded: int
) -> None:
    """Released folders have 23 of 24; what counts is the state before the 24th."""
    with torch.device("meta"):
        network = ClipText(tiny.text_config("gelu", layers))
    tensors = {name: torch.ones(tensor.shape) for name, tensor in network.state_dict().items()}
    save(tmp_path / "model.safetensors", {f"text_model.{name}": value for name, value in tensors.items()})
    config = tiny.text_config_json("CLIPTextModel", "gelu", layers)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with open_checkpoint(tmp_path) as checkpoint:
        plan = read_folder_text(checkpoint, is_open_clip=True, is_projected=False).load_plan
        found = load_planned(plan, ClipText, CPU, torch.float32, "it")
    assert found.num_layers == loaded


def plain_loop(
    pipeline: Any, parts: list[tuple[str, float] | None], mode: str
) -> tuple[Tensor, Tensor | None]:
    """The specification, step by step, with transformers' tokenizers and networks."""
    contexts, pooled = [], None
    encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
    is_xl = hasattr(pipeline, "text_encoder_2")
    if is_xl:
        encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    for tokenizer, encoder in encoders:
        tokens: list[int | None] = []  # None: filled up
        weights: list[float] = []
        for part in parts:
            ids = (
                [None] * (-len(tokens) % 75)
                if part is None
                else tokenizer(part[0], add_special_tokens=False)["input_ids"]
            )
            tokens += ids
            weights += [1.0 if part is None else part[1]] * len(ids)
        filled = -len(tokens) % 75
        tokens, weights = tokens + [None] * filled, weights + [1.0] * filled
        states = []
        for start in range(0, len(tokens), 75):
            own = [token for token in tokens[start : start + 75] if token is not None]
            own = [tokenizer.bos_token_id, *own, tokenizer.eos_token_id]
            row = own + [tokenizer.pad_token_id] * (77 - len(own))
            with torch.no_grad():
                out = encoder(torch.tensor([row]), output_hidden_states=True)
            states.append(out.hidden_states[-2][0] if is_xl else out.last_hidden_state[0])
            if is_xl and start == 0:
                pooled = out[0][0]
        rows = [states[0][:1], *(state[1:76] for state in states), states[-1][76:]]
        context = torch.cat(rows)
        weighted = context * torch.tensor([1.0, *weights, 1.0])[:, None]
        if mode == "original":
            weighted *= context.mean() / weighted.mean()
        elif mode == "abs":
            weighted *= context.abs().mean() / weighted.abs().mean()
        contexts.append(weighted)
    return torch.cat(contexts, dim=1), pooled


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("sd1", "original"), ("sd1", "abs"), ("sd1", "none"), ("sd2", "original"), ("sdxl", "original")],
)
def test_weighted_and_long_texts_are_those_of_a_plain_loop(folder: Path, kind: str, mode: str) -> None:
    pipeline, _, model = opened(kind, folder / kind)
    given = options("--max_embeddings_multiples", 9, "--emb_normalize_mode", mode).text
    texts = PromptEncoder(model.text_encoders, model.kind, given)
    for text, parts in WEIGHTED.items():
        context, pooled = plain_loop(pipeline, parts, mode)
        found = texts.encode(text)
        assert found.context.shape == (75 * texts.count_chunks(text) + 2, context.shape[1])
        scale = max(1.0, float(context.abs().max()))  # a mean near zero makes a large factor
        torch.testing.assert_close(found.context / scale, context / scale, atol=2e-5, rtol=0)
        if pooled is not None:
            torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=0)


def test_a_text_that_is_too_long_is_cut_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    texts = PromptEncoder(*make_towers("sdxl"), options().text)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert texts.count_chunks("a " * 75 + "red (cat:2)") == 1
            found = texts.encode("a " * 75 + "red (cat:2)")
    assert torch.equal(found.context, texts.encode("a " * 75).context)
    (record,) = caplog.records
    message = record.getMessage()
    assert "after 75 tokens; the rest is not read: red cat\n" in message
    assert message.endswith("Pass --max_embeddings_multiples 2 to read all of it")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_each_encoder_runs_once_for_a_text_and_then_never(kind: str) -> None:
    towers, sort = make_towers(kind)
    shapes: list[torch.Size] = []
    for tower in towers:
        tower.network.embeddings.register_forward_hook(lambda _, given, out: shapes.append(given[0].shape))
    texts = PromptEncoder(towers, sort, options("--max_embeddings_multiples", 3).text)
    for _ in range(3):
        texts.encode("a (red:1.3) cat " * 50)
    assert shapes == [(2, 77)] * len(towers)
    texts.encode("a (red:1.3) cat " * 50, networks=(0.5,))  # with other LoRAs it is another state
    assert len(shapes) == 2 * len(towers)


UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("a cat, 8k: sharp", [("a cat, 8k: sharp", 1)]),
        ("(x: 0.5 )", [("x", 0.5)]),
        ("(x:.5) (y:-1.) (z:+2)", [("x", 0.5), (" ", 1), ("y", -1), (" ", 1), ("z", 2)]),
        ("[[a]]", [("a", DOWN * DOWN)]),
        ("[(a)] b", [("a b", 1)]),
        ("(a (b:2) [c]:3)", [("a ", 3), ("b", 6), (" ", 3), ("c", 3 * DOWN)]),
        ("((a:0) b)", [("a", 0), (" b", UP)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        (r"back\slash \{x\}", [(r"back\slash \{x\}", 1)]),
        ("(a (b", [("a ", UP), ("b", UP * UP)]),
        ("a) b] :1.3)", [("a) b] :1.3)", 1)]),
        ("[a:1.3]", [("a:1.3", DOWN)]),
        ("(a [b) c]", [("a ", UP), ("b", UP * DOWN), (" c", DOWN)]),
        ("() [] (:1.3)", [("  ", 1)]),
        (f"(a:{'9' * 400})", [("a", MAX_WEIGHT)]),
    ],
)
def test_weights_are_read(text: str, parts: list[tuple[str, float]]) -> None:
    found = parse_weights(text)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])
    assert not any(part.begins_chunk for part in found)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a BREAK b", [WeightedText("a "), WeightedText(" b", begins_chunk=True)]),
        ("(a BREAK b:2)", [WeightedText("a ", 2), WeightedText(" b", 2, begins_chunk=True)]),
        ("BREAK a", [WeightedText(" a", begins_chunk=True)]),
        ("BREAKFAST break a_BREAK", [WeightedText("BREAKFAST break a_BREAK")]),
    ],
)
def test_break_begins_a_chunk(text: str, parts: list[WeightedText]) -> None:
    assert list(parse_weights(text)) == parts


def test_no_text_is_an_error_and_one_without_marks_is_itself() -> None:
    source = random.Random(4)
    for _ in range(1000):
        text = "".join(source.choices([*r"()[]:\1.9-+a é", "BREAK", " BREAK "], k=source.randint(0, 30)))
        assert all(part.text and abs(part.weight) <= MAX_WEIGHT for part in parse_weights(text))
        plain = "".join(source.choices(r":1.9-+a éß,;{}|$", k=source.randint(1, 30)))
        assert parse_weights(plain) == (WeightedText(plain),)
    assert parse_weights("(a" * 200)[-1].weight == MAX_WEIGHT


def tokenize(text: str) -> list[int]:
    """A token for each word: its length."""
    return [len(word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("BREAK b", [1]),
        ("a BREAK BREAK  BREAK b BREAK ", [1, 1]),
        ("a " * 75 + "BREAK b", [75, 1]),
        ("a " * 80 + "BREAK b", [75, 5, 1]),
    ],
)
def test_break_and_the_75th_token_end_a_chunk(text: str, expected: list[int]) -> None:
    chunks = cut_into_chunks(parse_weights(text), tokenize)
    assert [len(chunk.ids) for chunk in chunks] == expected


@pytest.mark.parametrize(
    ("text", "maximum", "rest"),
    [
        ("a " * 73 + "b (c d:2) e", 1, "d e"),
        ("a " * 75 + "(b c:1.5) d", 1, "b c d"),
        ("a BREAK b BREAK c", 2, "c"),
    ],
)
def test_what_is_cut_is_named(text: str, maximum: int, rest: str) -> None:
    assert find_cut_off_text(parse_weights(text), tokenize, maximum) == rest


def test_the_tokenizer_of_each_encoder_is_read_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_sdxl(tmp_path)
    cache = tokenizer_folder(tmp_path / "tokenizers")
    words = ["--ckpt", str(model), "--tokenizer_cache_dir", str(cache)]
    options = parse_options("", words, SdxlTextCachingOptions)[0]
    caplog.set_level(logging.INFO)

    for encoder in family_for_text_caching(options).text_encoders():
        encoder.load(torch.device("cpu"))

    lines = [record.getMessage() for record in caplog.records if "tokenizer: " in record.getMessage()]
    assert len(lines) == 2
    assert len({*lines}) == 2
