"""Files of LTX-2 transformers: every layout, full size, fp8, and what is refused by name."""

import math
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.model_files import read_once
from ltx_2.checkpoints import FORMAT, SILENT
from ltx_2.files import Ltx2Files
from ltx_2.model_options import STREAMS
from modules.errors import CheckpointError, OptionError
from modules.speed_options import Quantization
from protocols import families
from protocols.loading import Placement
from qwen_image.files import load_dit as load_qwen
from tests.ltx_2.release import write_release
from tests.ltx_2.tiny_dit import DIT_CONFIGS, dit_state, write_dit
from tests.manifests import tensor_list, write_hollow
from tests.tiny import qwen_image

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))


@pytest.mark.slow_cases("2.0-diffusers-False", "2.0-official-True")
@pytest.mark.parametrize(
    ("version", "layout", "with_audio"),
    [
        ("2.3", "safetensors", True),
        ("2.3", "sharded", False),
        ("2.3", "prefixed", True),
        ("2.3", "official", False),
        ("2.3", "diffusers_sharded", True),
        # the tiny model has another number of heads than the released ones: files need a record of it
        ("2.0", "official", True),
        ("2.0", "diffusers", False),
        ("2.5", "official", True),
        ("2.5", "safetensors", False),
        ("2.5", "diffusers_sharded", True),
    ],
)
def test_every_layout_gives_the_same_weights_and_dimensions(
    tmp_path: Path, version: str, layout: str, with_audio: bool
) -> None:
    config = DIT_CONFIGS[version]
    expected = dit_state(version, audio=config.audio if with_audio else None)
    path = write_dit(tmp_path / "größer als", version, layout)

    dit = (FORMAT if with_audio else SILENT).load(path, CPU)

    assert read_once(path, FORMAT.read_header).config == config
    assert dit.config == (config if with_audio else replace(config, audio=None))
    loaded = dit.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    said = str(families.identify(path))
    assert said.startswith(
        f"it is an LTX-2 transformer (version {version}) (--dit). Its scripts are ltx2_train"
    )


def test_settings_that_no_tensor_shows_are_read(tmp_path: Path) -> None:
    told = {"rope_type": "interleaved", "positional_embedding_max_pos": [10, 1024, 1024]}
    official = write_dit(tmp_path / "one", "2.0", "official", **told, av_ca_timestep_scale_multiplier=1)
    told = {"rope_type": "interleaved", "base_height": 1024, "cross_attn_timestep_scale_multiplier": 500}
    other = write_dit(tmp_path / "two", "2.0", "diffusers_sharded", **told)

    first, second = (read_once(path, FORMAT.read_header).config for path in (official, other))

    expected = replace(DIT_CONFIGS["2.0"], rotates_halves=False)
    assert first == replace(expected, gate_timestep_scale=0.001, max_positions=(10.0, 1024.0, 1024.0))
    assert second == replace(expected, max_positions=(20.0, 1024.0, 2048.0), gate_timestep_scale=1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "other"},
        {"num_attention_heads": 5},
        {"num_attention_heads": math.inf},
        {"timestep_scale_multiplier": math.nan},
        {"positional_embedding_max_pos": [0, 2048, 2048]},
        {"positional_embedding_theta": -1},
        {"vae_scale_factors": [8, 32]},
        {"ff_bias": 1},
    ],
)
def test_settings_without_sense_are_one_message(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="again"):
        FORMAT.load(write_dit(tmp_path, "2.0", "official", **settings), CPU)


def test_files_in_8_bits_load(tmp_path: Path) -> None:
    dit = FORMAT.load(write_dit(tmp_path, layout="fp8_weight_scale"), CPU)

    assert dit.compute_dtype == torch.bfloat16
    for name, tensor in dit_state().items():
        found = dit.state_dict()[name]
        assert found.dtype.itemsize > 1
        assert (found.float() - tensor).abs().max() < 0.1 * tensor.abs().max(), name


def test_linear_layers_of_blocks_alone_are_kept_in_8_bits(tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    save_file(dit_state(dtype=torch.bfloat16), path)

    dit = FORMAT.load(path, Placement(torch.device("cpu"), quantization=Quantization("rows")))

    in_8_bits = {name for name, weight in dit.state_dict().items() if weight.dtype.itemsize == 1}
    assert {
        f"transformer_blocks.1.{one}.weight" for one in ("audio_attn2.to_k", "ff.net.0.proj")
    } <= in_8_bits
    assert all(name.startswith("transformer_blocks.") for name in in_8_bits)
    assert not any("gate_logits" in name for name in in_8_bits)


@pytest.mark.slow_cases(
    "2.3-dit-True-18988838144",
    "2.3-dit-diffusers-True-18988838144",
    "2.5-dit-True-18923347200",
    "2.5-dit-diffusers-True-18923347200",
)
@pytest.mark.parametrize(
    ("layout", "with_audio", "weights"),
    [
        ("2.3-dit", True, 18988838144),
        ("2.3-dit", False, 13124316288),
        ("2.3-dit-diffusers", True, 18988838144),
        ("2.5-dit", True, 18923347200),
        ("2.5-dit-diffusers", True, 18923347200),
    ],
)
def test_released_files_load_without_leftovers(
    tmp_path: Path, layout: str, with_audio: bool, weights: int
) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", tensor_list(f"ltx{layout}"))

    dit = (FORMAT if with_audio else SILENT).load(path, META)

    assert sum(weight.numel() for weight in dit.parameters()) == weights
    assert (dit.config.num_layers, dit.config.num_heads, dit.config.dim) == (48, 32, 4096)
    assert dit.config.kind == layout[:3]


@pytest.mark.slow
def test_a_file_of_the_first_release_loads_without_leftovers(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = diffusers.LTX2VideoTransformer3DModel()
    shapes = {name: ("BF16", tuple(one.shape)) for name, one in network.state_dict().items()}

    dit = FORMAT.load(write_hollow(tmp_path / "dit.safetensors", shapes), META)

    assert sum(weight.numel() for weight in dit.parameters()) == 18876174592
    assert (dit.config.kind, dit.config.num_heads, dit.config.projects_text) == ("2.0", 32, True)


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("1.ff.net.2.bias", "missing: transformer_blocks.1.ff.net.2.bias"),
        ("adaln_single.emb.timestep_embedder.linear_1.bias", "missing: .*adaln_single.emb.timestep_embedder"),
        ("audio_patchify_proj.weight", "incomplete.*audio_patchify_proj.weight"),
        ("attn1.to_q.bias", "missing: transformer_blocks.*attn1.to_q.bias"),
        ("av_ca_a2v_gate_adaln_single.linear.weight", "is not an LTX-2 transformer"),
    ],
)
def test_other_versions_and_incomplete_files_are_refused(tmp_path: Path, left_out: str, words: str) -> None:
    path = write_dit(tmp_path)
    save_file({name: one for name, one in load_file(path).items() if not name.endswith(left_out)}, path)

    with pytest.raises(CheckpointError, match=rf"(?s){words}"):
        FORMAT.load(path, CPU)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"ff_bias": True}, "missing: transformer_blocks.*ff.net"),
        ({"use_prompt_adaln_single": True}, "missing: .*prompt_adaln_single"),
        ({"use_keyframes_abs_pos_embedding": False}, "unexpected: keyframes_abs_pos_embedding"),
    ],
)
def test_a_switch_that_the_tensors_contradict_is_an_error(
    tmp_path: Path, told: dict[str, bool], words: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s){words}"):
        FORMAT.load(write_dit(tmp_path, "2.5", "official", **told), CPU)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.diffusion_model.patchify_proj.weight", "the transformer of LTX-Video 0.9"),
        ("post_upsample_res_blocks.0.conv1.weight", "a latent upscaler of LTX-Video or LTX-2"),
        ("diffusion_model.transformer_blocks.0.attn1.to_k.lora_A.weight", "it looks like a LoRA"),
        ("audio_embeddings_connector.learnable_registers", "the connectors of LTX-2"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(4, 4)}, path)

    with pytest.raises(CheckpointError, match=words):
        FORMAT.load(path, CPU)


def test_other_families_are_told_apart(tmp_path: Path) -> None:
    first = write_dit(tmp_path, layout="official")
    second = qwen_image.write_dit(tmp_path, qwen_image.tiny_state())

    with pytest.raises(CheckpointError, match="is not an LTX-2 transformer; it looks like a Qwen-Image"):
        FORMAT.load(second, CPU)
    with pytest.raises(CheckpointError, match="it looks like an LTX-2 transformer"):
        load_qwen(first, CPU)


def test_sound_of_caches_has_the_shape_of_the_releases_if_their_vae_is_not_there(tmp_path: Path) -> None:
    """A transformer of other sound cannot be trained without it."""
    full = write_hollow(tmp_path / "dit.safetensors", tensor_list("ltx2.5-dit"))
    other = write_release(tmp_path / "tiny", "2.5").checkpoint
    files = Ltx2Files(dit=full, checkpoint=full, streams=STREAMS)

    assert files.audio is not None
    assert files.audio.shape(121, 24.0) == (8, 126, 16)
    with pytest.raises(OptionError, match=r"--audio_vae: .* takes audio of 16 channels, .* has 128"):
        _ = replace(files, dit=other, checkpoint=other).audio
