"""The texts of LTX-2.5: Gemma 4 out of one file, connectors beside the transformer, and which of them fit."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from encoders.language_models import ALL_STATES, build_language_model, read_language_model
from ltx_2.connectors import TextConnectors, open_connectors, read_connectors
from ltx_2.files import Ltx2Files
from ltx_2.gemma_4 import GEMMA_4, GEMMA_4_USE
from ltx_2.model_options import GEMMA
from ltx_2.text_encoder import MASK
from modules.errors import CheckpointError, OptionError
from tests.ltx_2.test_text import AUDIO, CPU, PROMPTS, VIDEO, assert_close, encoded
from tests.ltx_2.tiny_text import (
    GEMMA_VERSION,
    text_connectors,
    text_gemma,
    text_gemma_4,
    text_official_names,
    text_tokenizer,
    text_write_gemma,
    text_write_gemma_4,
)
from tests.manifests import fit, tensor_list, write_hollow

NAMED = {"gemma_source_checkpoint": json.dumps({"gemma_version": GEMMA_VERSION, "ltx_version": "2.5.0"})}


@pytest.fixture(scope="module")
def gemma() -> Any:
    return text_gemma_4()


def write_transformer(path: Path, record: dict[str, str]) -> Path:
    """Write the connectors as the file of the transformer has them: without projections."""
    connectors = text_official_names(text_connectors("2.5").state_dict())
    save_file({name: one for name, one in connectors.items() if "aggregate_embed" not in name}, path, record)
    return path


def files_in(folder: Path, gemma: Any, record: dict[str, str] = NAMED, **told: Any) -> Ltx2Files:
    return Ltx2Files(
        checkpoint=write_transformer(folder / "dit.safetensors", record),
        gemma=GEMMA,
        connectors=text_write_gemma_4(folder / "text.safetensors", gemma, text_connectors("2.5"), **told),
        text_dtype=torch.float32,
        streams=("video", "audio"),
    )


@functools.cache
def expected() -> list[dict[str, Tensor]]:
    """What diffusers' pipeline gives the transformer for the prompts."""
    from diffusers.pipelines.ltx2.pipeline_ltx2 import LTX2Pipeline
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text_tokenizer(), pad_token="<pad>")
    names = ("scheduler", "vae", "audio_vae", "transformer", "vocoder")
    parts = {"text_encoder": text_gemma_4(), "tokenizer": tokenizer, "connectors": text_connectors("2.5")}
    pipeline: Any = LTX2Pipeline(**parts, **dict.fromkeys(names))
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            states, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device=CPU)
            video, audio, seen = pipeline.connectors(states, mask, padding_side="left")
            found.append({VIDEO: video[0], AUDIO: audio[0], MASK: seen[0]})
    return found


def test_texts_are_those_of_diffusers(gemma: Any, tmp_path: Path) -> None:
    encoder = files_in(tmp_path, gemma).text_encoder()

    found = encoded(encoder, *PROMPTS)

    for ours, theirs in zip(found, expected(), strict=True):
        assert_close(ours[VIDEO], theirs[VIDEO])
        assert_close(ours[AUDIO], theirs[AUDIO])
        assert torch.equal(ours[MASK], theirs[MASK])
    assert encoder.token_counter()("").tokens == 1  # <bos>, which the tokenizer's file does not put there
    assert encoder.identity["gemma4_tokenizer"] == "inside the checkpoint"
    assert not any("vision" in name for name in encoder.network.state_dict())


def test_a_folder_of_a_release_in_the_layout_of_diffusers_gives_the_same_texts(
    gemma: Any, tmp_path: Path
) -> None:
    """Names as transformers writes them, a tokenizer beside them, projections beside the connectors."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    tensors = {name: one.clone() for name, one in gemma.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(gemma.config.to_dict()), encoding="utf-8")
    text_tokenizer().save(str(folder / "tokenizer.json"))
    connectors = tmp_path / "connectors"
    connectors.mkdir()
    save_file(text_connectors("2.5").state_dict(), connectors / "model.safetensors")

    files = Ltx2Files(
        checkpoint=tmp_path, gemma=tmp_path, text_dtype=torch.float32, streams=("video", "audio")
    )
    found = encoded(files.text_encoder(), *PROMPTS[:2])

    for ours, theirs in zip(found, expected(), strict=False):
        assert_close(ours[VIDEO], theirs[VIDEO])


def test_published_files_fit_at_full_size(tmp_path: Path) -> None:
    text = write_hollow(tmp_path / "text.safetensors", tensor_list("ltx2.5-text-encoder"))
    network = fit(text, lambda one: read_language_model(one, GEMMA_4, ALL_STATES), build_language_model)
    told = network.config
    assert (told.num_hidden_layers, told.num_attention_heads) == (48, 16)
    assert told.layer_types.count("full_attention") == 8
    connectors = write_hollow(tmp_path / "dit.safetensors", tensor_list("ltx2.5-connectors"))
    with open_connectors(connectors, text) as opened:
        plan = read_connectors(opened)
        found = load_planned(plan, TextConnectors, torch.device("meta"), lambda _, stored: stored, "")
    assert sum(one.numel() for one in found.parameters()) == 3172227584


def test_connectors_may_be_without_biases_of_their_feed_forward_layers(gemma: Any, tmp_path: Path) -> None:
    files = files_in(tmp_path, gemma)
    assert files.checkpoint is not None
    tensors = {name: one for name, one in load_file(files.checkpoint).items() if ".ff.net" not in name}
    biases = {name: one for name, one in load_file(files.checkpoint).items() if ".ff.net" in name}
    kept = {name: one for name, one in biases.items() if name.endswith(".weight")}
    zeros = {name: torch.zeros_like(one) for name, one in biases.items() if name not in kept}
    found = []
    for more in (kept, kept | zeros):
        save_file({**tensors, **more}, files.checkpoint, NAMED)
        found.append(encoded(files.text_encoder(), "a rabbit")[0])

    assert torch.equal(found[0][VIDEO], found[1][VIDEO])


# Files that do not fit


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"gemma_version": "gemma4-12b"}, "this is gemma4-12b"),
        ({"gemma_version": None}, "this is one that does not say"),
    ],
)
def test_another_gemma_4_is_refused_in_one_sentence(
    told: dict[str, Any], said: str, gemma: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"is not the Gemma of LTX-2.5: .*{GEMMA_VERSION}, {said}"):
        files_in(tmp_path, gemma, **told).text_encoder()


def test_stock_gemma_is_refused_too(gemma: Any, tmp_path: Path) -> None:
    files = files_in(tmp_path, gemma)
    stock = text_write_gemma(tmp_path / "stock", text_gemma())
    with pytest.raises(CheckpointError, match="is not the Gemma of LTX-2.5: .* does not say which"):
        Ltx2Files(checkpoint=files.checkpoint, gemma=stock).text_encoder()
    with pytest.raises(OptionError, match=r"dit.safetensors is of LTX-2\.5.*--ltx2_text_encoder_checkpoint"):
        Ltx2Files(checkpoint=files.checkpoint, gemma=GEMMA).text_encoder()


def test_a_second_text_encoder_is_refused(gemma: Any, tmp_path: Path) -> None:
    files = replace(files_in(tmp_path, gemma), gemma=text_write_gemma(tmp_path / "stock", text_gemma()))
    with pytest.raises(OptionError, match=r"stock: the text encoder of LTX-2\.5 is in .*text\.safetensors"):
        files.text_encoder()


def test_a_transformer_that_does_not_say_its_gemma_takes_any_with_projections(
    gemma: Any, tmp_path: Path
) -> None:
    files = files_in(tmp_path, gemma, {}, gemma_version=None)
    assert files.text_encoder().settings is GEMMA_4_USE
    stock = text_write_gemma(tmp_path / "stock", text_gemma())
    with pytest.raises(CheckpointError, match="without projections.*--ltx2_text_encoder_checkpoint"):
        Ltx2Files(checkpoint=files.checkpoint, gemma=stock, streams=("video",)).text_encoder().check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 7}, "layer_types"),
        ({"sliding_window": 0}, "sliding_window 0"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rotary frequencies"),
        ({"rope_parameters": {"full_attention": 3}}, "cannot be read"),
        ({"rms_norm_eps": "x"}, "cannot be read"),
    ],
)
def test_a_configuration_without_sense_is_one_message(
    change: dict[str, Any], message: str, gemma: Any, tmp_path: Path
) -> None:
    text = gemma.config.to_dict()["text_config"]
    files = files_in(tmp_path, gemma, text_config={**text, **change})
    with pytest.raises(CheckpointError, match=message):
        files.text_encoder().check()


def test_a_tokenizer_inside_that_is_none_is_one_message(gemma: Any, tmp_path: Path) -> None:
    files = files_in(tmp_path, gemma)
    assert files.connectors is not None
    tensors = load_file(files.connectors) | {"tokenizer_json": torch.ones(9, dtype=torch.uint8)}
    record = {"gemma_config": json.dumps({**gemma.config.to_dict(), "gemma_version": GEMMA_VERSION})}
    save_file(tensors, files.connectors, record)
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        files.text_encoder().load(CPU)


def test_metadata_that_cannot_be_read_are_one_message(gemma: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gemma_source_checkpoint in its metadata cannot be read"):
        files_in(tmp_path, gemma, {"gemma_source_checkpoint": "{"}).text_encoder()


def test_an_old_transformers_is_named(gemma: Any, tmp_path: Path) -> None:
    file = files_in(tmp_path, gemma).connectors
    assert file is not None
    with open_checkpoint(file) as opened:  # "Absent": as in a version that has no such classes
        plan = read_language_model(opened, replace(GEMMA_4, class_prefix="Absent"), ALL_STATES)
    with pytest.raises(OptionError, match=r"Gemma 4 language model needs transformers 5\.15 or later"):
        build_language_model(plan.config)


def test_parts_that_are_not_there_are_named_and_the_diffusion_decoder_is_refused(tmp_path: Path) -> None:
    dit, vae = tmp_path / "dit.safetensors", tmp_path / "vae.safetensors"
    save_file({"model.diffusion_model.audio_patchify_proj.weight": torch.ones(2, 2)}, dit)
    save_file({"vae.decoder.det_stages.0.0.attn.to_q.weight": torch.ones(2, 2)}, vae)
    with pytest.raises(OptionError, match="Pass ltx-2.5-video-vae-conv-bf16.safetensors to --vae"):
        _ = Ltx2Files(checkpoint=dit).vae_path
    with pytest.raises(OptionError, match="Pass ltx-2.5-audio-vae-bf16.safetensors to --audio_vae"):
        Ltx2Files(checkpoint=dit).audio_path("vocoder")
    with pytest.raises(CheckpointError, match="diffusion decoder of LTX-2.5.*video-vae-conv"):
        Ltx2Files(checkpoint=dit, vae=vae).check_vae()
