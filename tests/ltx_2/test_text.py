"""Gemma 3 and the connectors against transformers and diffusers: layouts, streams, fp8, bad files."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset.cache_files import tensor_key
from encoders.language_models import ALL_STATES, SPEC, build_language_model, read_language_model
from ltx_2.connectors import TextConnectors, read_connectors
from ltx_2.text_encoder import GEMMA_3, MASK, ROWS, Ltx2TextEncoder
from modules.errors import CheckpointError
from protocols.family import DividedEncoder, LayeredEncoder
from protocols.requests import Prompt
from tests.ltx_2.tiny_text import (
    TEXT_DIM,
    text_connectors,
    text_gemma,
    text_tokenizer,
    text_write_connectors,
    text_write_gemma,
)
from tests.manifests import fit, tensor_list, write_hollow
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import swapped
from tests.tiny.hunyuan_encoders import scaled_fp8
from tests.tiny.pieces import train_pieces

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of the largest number, float32: the same operations on fewer rows, sums in another order
PROMPTS = ("a rabbit in the grass", "", "  日本 🐇 don't   blink\n", "the rabbit runs " * 400)
CONNECTOR = "model.diffusion_model.video_embeddings_connector"
VIDEO, AUDIO = "video_prompt_embeds", "audio_prompt_embeds"


@pytest.fixture(scope="module")
def gemma() -> Any:
    return text_gemma()


def tiny_encoder(
    folder: Path, gemma: Any, version: str = "2.3", dialect: str = "official", **settings: Any
) -> Ltx2TextEncoder:
    """An encoder of files that are written first."""
    connectors = text_write_connectors(folder / "ltx.safetensors", text_connectors(version), dialect)
    return Ltx2TextEncoder(text_write_gemma(folder / "gemma", gemma), connectors, torch.float32, **settings)


def encoded(encoder: Ltx2TextEncoder, *prompts: str) -> list[dict[str, Tensor]]:
    encoder.load(CPU)
    with torch.no_grad():
        found: Any = encoder.encode([Prompt(prompt) for prompt in prompts])
    return list(found)


@functools.cache
def expected(version: str) -> list[dict[str, Tensor]]:
    """What diffusers' pipeline gives the transformer for the prompts."""
    from diffusers.pipelines.ltx2.pipeline_ltx2 import LTX2Pipeline
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text_tokenizer(), pad_token="<pad>")
    names = ("scheduler", "vae", "audio_vae", "transformer", "vocoder")
    parts = {"text_encoder": text_gemma(), "tokenizer": tokenizer, "connectors": text_connectors(version)}
    pipeline: Any = LTX2Pipeline(**parts, **dict.fromkeys(names))
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            states, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device=CPU)
            video, audio, seen = pipeline.connectors(states, mask, padding_side="left")
            found.append({VIDEO: video[0], AUDIO: audio[0], MASK: seen[0]})
    return found


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.slow_cases("2.3-official")
@pytest.mark.parametrize(("version", "dialect"), [("2.0", "diffusers"), ("2.3", "official")])
def test_texts_are_those_of_diffusers(version: str, dialect: str, gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma, version, dialect)

    found = encoded(encoder, *PROMPTS)

    for ours, theirs in zip(found, expected(version), strict=True):
        assert ours.keys() == theirs.keys() == encoder.keys
        assert_close(ours[VIDEO], theirs[VIDEO])
        assert_close(ours[AUDIO], theirs[AUDIO])
        assert torch.equal(ours[MASK], theirs[MASK])
        assert len(ours[VIDEO]) == ROWS


@pytest.mark.slow_cases("transformers 5")
@pytest.mark.parametrize("layout", ["transformers 5", "comfy"])
def test_other_files_of_gemma_give_the_same_texts(layout: str, gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    other = text_write_gemma(tmp_path / layout, gemma, layout)

    alone = Ltx2TextEncoder(other / "model.safetensors", encoder.connectors, torch.float32, encoder.path)

    for ours, theirs in zip(encoded(alone, *PROMPTS[:3]), encoded(encoder, *PROMPTS[:3]), strict=True):
        assert torch.equal(ours[VIDEO], theirs[VIDEO])
    assert not any("vision" in name for name in alone.network.state_dict())


def test_the_tokenizer_inside_comfyuis_file_begins_texts_too(gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    pieces = torch.frombuffer(bytearray(train_pieces(tokens=60)), dtype=torch.uint8)
    other = text_write_gemma(tmp_path / "comfy", gemma, "comfy", spiece_model=pieces)
    (other / "tokenizer.json").unlink()
    inside = Ltx2TextEncoder(other / "model.safetensors", encoder.connectors, torch.float32)

    (found,) = encoded(inside, "a red cat")

    assert found[VIDEO].isfinite().all()
    count = inside.token_counter()
    assert count("").tokens == count(" ").tokens == 1
    assert inside.identity["gemma3_tokenizer"] == "inside the checkpoint"


def test_one_stream_has_its_text_alone_and_loads_no_other(gemma: Any, tmp_path: Path) -> None:
    both = tiny_encoder(tmp_path, gemma)
    (full,) = encoded(both, "a rabbit")
    for stream, key, other in (("video", VIDEO, "audio"), ("audio", AUDIO, "video")):
        encoder = Ltx2TextEncoder(both.path, both.connectors, torch.float32, streams=(stream,))
        (found,) = encoded(encoder, "a rabbit")
        assert found.keys() == {key, MASK} == encoder.keys
        assert torch.equal(found[key], full[key])
        assert not any(other in name for name in encoder.network.state_dict())
        encoder.check()
        both.check()
        assert encoder._count_connector_bytes() < both._count_connector_bytes()


def test_weights_of_parts_multiply_the_rows_of_their_tokens(gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    (plain,) = encoded(encoder, "a rabbit")
    text = "  a rabbit"
    with torch.no_grad():
        found: Any = encoder.encode([Prompt(text, ((text.index("rabbit"), len(text), 1.5),))])[0]
    factors = torch.ones(ROWS, 1)
    factors[2 : encoder.token_counter()("a rabbit").tokens] = 1.5  # behind <bos> and "a"
    for key in (VIDEO, AUDIO):
        assert torch.equal(found[key], plain[key] * factors)


def test_tokens_are_counted_as_they_are_read(gemma: Any, tmp_path: Path) -> None:
    count = tiny_encoder(tmp_path, gemma).token_counter()
    assert (count("").tokens, count(PROMPTS[0]).limit) == (1, ROWS)
    long = count(PROMPTS[3])
    assert long.tokens > ROWS
    assert 0 < long.num_read < len(PROMPTS[3])


def test_identity_follows_both_files_and_the_dtype(gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    other = text_write_connectors(tmp_path / "other.safetensors", text_connectors("2.0"))
    stretched = text_write_gemma(tmp_path / "stretched", text_gemma(rope_scaling=None))
    found = [
        encoder,
        Ltx2TextEncoder(encoder.path, encoder.connectors),
        Ltx2TextEncoder(encoder.path, other, torch.float32),
        Ltx2TextEncoder(stretched, encoder.connectors, torch.float32),
    ]
    assert len({json.dumps(dict(one.identity), sort_keys=True) for one in found}) == 4
    silent = Ltx2TextEncoder(encoder.path, encoder.connectors, torch.float32, streams=("video",))
    assert silent.identity == encoder.identity


@pytest.mark.parametrize("form", [None, "fp8"], ids=["multiplied out", "kept"])
def test_an_fp8_file_of_gemma_serves(form: str | None, gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma, form=form)
    file = encoder.path / "model.safetensors"
    stored, meant = scaled_fp8(load_file(file))
    save_file(meant, file)
    exact = Ltx2TextEncoder(encoder.path, encoder.connectors, torch.float32)
    (theirs,) = encoded(exact, "a rabbit")
    save_file(stored, file)

    (ours,) = encoded(encoder, "a rabbit")

    assert_close(ours[VIDEO], theirs[VIDEO])
    dtypes = {one.dtype for one in encoder.network.get_submodule("connectors").parameters()}
    assert dtypes == {torch.float32}  # never rounded


def test_layers_that_wait_in_host_memory_give_the_same_texts(gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    layered: LayeredEncoder = encoder
    divided: DividedEncoder = encoder
    (theirs,) = encoded(encoder, "a rabbit")
    assert swapped(divided.network, SPEC, 3, FakeDevice()) is not None

    (ours,) = encoded(encoder, "a rabbit")

    assert torch.equal(ours[VIDEO], theirs[VIDEO])
    room = 10**12
    assert layered.offloaded_bytes(room) == 0 < layered.offloaded_bytes(0)


def test_published_files_fit_at_full_size(tmp_path: Path) -> None:
    """Loading raises for every tensor that is left over."""
    path = write_hollow(tmp_path / "gemma.safetensors", tensor_list("gemma3-12b-it"))
    network = fit(path, lambda one: read_language_model(one, GEMMA_3, ALL_STATES), build_language_model)
    told = network.config
    assert (told.num_hidden_layers, told.num_attention_heads, told.head_dim) == (48, 16, 256)
    assert told.layer_types.count("full_attention") == 8
    assert (told.sliding_window, told.query_pre_attn_scalar) == (1024, 256)
    assert told.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert told.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    for manifest in ("ltx2.3-connectors", "ltx2.3-connectors-diffusers"):
        path = write_hollow(tmp_path / f"{manifest}.safetensors", tensor_list(manifest))
        connectors = fit(path, read_connectors, TextConnectors)
        assert sum(one.numel() for one in connectors.parameters()) == 3172227584
        video, audio = connectors.config.streams.values()
        assert (video.num_heads, video.num_layers, audio.num_heads, audio.dim) == (32, 8, 32, 2048)
        assert connectors.config.max_position == 4096


def test_names_of_the_known_caches_are_ours() -> None:
    names = ("video_prompt_embeds_bfloat16", "audio_prompt_embeds_float32", "prompt_attention_mask")
    assert [tensor_key(name) for name in names] == [VIDEO, AUDIO, MASK]


# Files that do not fit


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8}}, "rotary frequencies of type"),
        ({"sliding_window": 0}, "values"),
        ({"layer_types": ["full_attention"]}, "of 7 layers"),
        ({"layer_types": ["other"] * 7}, "layer_types"),
        ({"rope_parameters": {"full_attention": 3}}, "config.json"),
    ],
)
def test_a_configuration_of_gemma_without_sense_is_one_message(
    told: dict[str, Any], message: str, gemma: Any, tmp_path: Path
) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    told = {"model_type": "gemma3_text", "hidden_size": TEXT_DIM, **told}
    (encoder.path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        encoder.load(CPU)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"config": "{"}, {}, "settings in its metadata cannot be read"),
        ({"config": json.dumps({"transformer": 3})}, {}, "settings in its metadata cannot be read"),
        ({"config": json.dumps({"transformer": {"rope_type": "interleaved"}})}, {}, "rope_type interleaved"),
        ({}, {f"{CONNECTOR}.more": torch.ones(1)}, "unexpected: .*more"),
        ({}, {f"{CONNECTOR}.learnable_registers": torch.ones(3)}, "sizes"),
        ({}, {f"{CONNECTOR}.learnable_registers": torch.ones(7, 24)}, "number of registers"),
        ({}, {"text_embedding_projection.video_aggregate_embed.weight": torch.ones(24, 5)}, "takes width 5"),
    ],
)
def test_connectors_that_do_not_fit_are_one_message(
    metadata: dict[str, str], tensors: dict[str, Tensor], message: str, gemma: Any, tmp_path: Path
) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    save_file({**load_file(encoder.connectors), **tensors}, encoder.connectors, metadata)
    with pytest.raises(CheckpointError, match=message):
        encoder.load(CPU)


def test_files_of_another_kind_are_refused_by_name(gemma: Any, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, gemma)
    file = encoder.path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"not a file with LTX-2's text connectors; it looks like"):
        Ltx2TextEncoder(encoder.path, file).check()
    with pytest.raises(CheckpointError, match="not a Gemma 3 language model; it looks like"):
        Ltx2TextEncoder(encoder.connectors, encoder.connectors).check()
