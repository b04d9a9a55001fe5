"""Files of MOSS-Image in all layouts, the small decoder, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.opening import open_checkpoint
from flux_2.vae import load_vae, read_vae
from modules.errors import CheckpointError
from moss_image.files import find_sft, identify, load_dit
from protocols.loading import Placement
from tests.faults.messages import succeed_here
from tests.tiny.hunyuan_encoders import save
from tests.tiny.moss_image import (
    SMALL_DECODER,
    in_comfyui_names,
    tiny_state,
    vae_state,
    with_bands,
    write_dit,
)

CPU = Placement(torch.device("cpu"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
def test_queries_keys_and_values_may_be_stacked_behind_any_prefix(
    tmp_path: Path, prefix: str, stacked: bool
) -> None:
    state = tiny_state()
    stored = with_bands(in_comfyui_names(state) if stacked else state)
    path = save(tmp_path / "dit.safetensors", {prefix + name: tensor for name, tensor in stored.items()})

    loaded = load_dit(path, CPU)

    torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0)


def test_frequencies_in_a_file_are_not_used(tmp_path: Path) -> None:
    """They are computed here: those of a file may be rounded."""
    stored = with_bands(tiny_state())
    stored["rope.bands"] = torch.full_like(stored["rope.bands"], 7.0)
    loaded = load_dit(save(tmp_path / "dit.safetensors", stored), CPU)
    assert not any("bands" in name for name in loaded.state_dict())


def test_time_and_modulation_stay_in_float32(tmp_path: Path) -> None:
    loaded = load_dit(write_dit(tmp_path, tiny_state(dtype=torch.bfloat16)), CPU)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    starts = ("time_embedding.", "shared_block_modulation.", "video_head_modulation.")
    assert {dtype for name, dtype in dtypes.items() if name.startswith(starts)} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith(starts)} == {torch.bfloat16}


def test_weights_that_were_rescaled_for_float16_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "moss_fp16_fix.safetensors"
    save_file(tiny_state(), path, metadata={"kohakumoss_fp16_fix": "16"})
    with pytest.raises(CheckpointError, match="rescaled for float16.*needs no rescaled file"):
        load_dit(path, CPU)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.q_norm.weight", (24,)),
        ("layers.0.proj.ffn_down.weight", (64, 90)),
        ("shared_block_modulation.weight", (64, 64)),
        ("video_head_modulation.weight", (64, 64)),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    path = write_dit(tmp_path, {**tiny_state(), name: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match="do not fit a MOSS-Image transformer"):
        load_dit(path, CPU)


def test_a_file_is_recognised(tmp_path: Path) -> None:
    for dialect in ("safetensors", "comfyui"):
        path = write_dit(tmp_path / dialect, tiny_state(), dialect)
        assert identify(path) == "it is a MOSS-Image transformer (--dit)"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/moss_image_sft_bf16.safetensors", "moss_image_sft_bf16.safetensors"),
        ("MOSS-Image-SFT/transformer/model.safetensors", "MOSS-Image-SFT"),
        ("models/moss_image_base_bf16.safetensors", None),
        ("models/softly.safetensors", None),
    ],
)
def test_names_say_that_a_file_is_sft(path: str, name: str | None) -> None:
    assert find_sft(Path(path)) == name


def test_a_smaller_decoder_is_read_off_the_tensors(tmp_path: Path) -> None:
    """The encoder is the same, so latents are too."""
    path = save(tmp_path / "vae.safetensors", vae_state())
    with open_checkpoint(path) as checkpoint:
        config = read_vae(checkpoint).config
    assert config.widths == SMALL_DECODER.widths
    assert config.decoder_widths == SMALL_DECODER.decoder_widths

    vae = load_vae(path, torch.device("cpu"), torch.float32)
    latents = vae.encode(torch.zeros(1, 3, 1, 32, 48))
    assert latents.shape == (1, 128, 1, 2, 3)
    assert vae.decode(latents).shape == (1, 3, 1, 32, 48)


def test_the_small_decoder_decodes_as_diffusers_does() -> None:
    """With decoder_block_out_channels, statistics and their eps of 1e-4."""
    diffusers = pytest.importorskip("diffusers")
    from tests.tiny.flux_2 import vae_diffusers

    state = vae_state()
    assert SMALL_DECODER.decoder_widths
    their_vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=SMALL_DECODER.widths,
        decoder_block_out_channels=SMALL_DECODER.decoder_widths,
        layers_per_block=2,
        latent_channels=32,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).eval()
    missing, unexpected = their_vae.load_state_dict(vae_diffusers(state), strict=False)
    assert not unexpected
    assert all("bn" in name for name in missing)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(1, 128, 2, 3, generator=generator)
    deviation = (state["bn.running_var"] + 1e-4).sqrt()[:, None, None]
    raw = packed * deviation + state["bn.running_mean"][:, None, None]
    unpacked = raw.unflatten(1, (32, 2, 2)).permute(0, 1, 4, 2, 5, 3).reshape(1, 32, 4, 6)
    with torch.no_grad():
        expected = their_vae.decode(unpacked).sample.clamp(-1, 1)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "vae.safetensors", state)
        pixels = load_vae(path, torch.device("cpu"), torch.float32).decode(packed[:, :, None])[:, :, 0]

    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "maximum"), [("convrot", 0.02), ("int8", 0.02), ("fp8", 0.1), ("q8_0", 0.02)]
)
def test_stacked_files_in_8_and_4_bits_are_read(tmp_path: Path, form: str, maximum: float) -> None:
    """Rows and scales of queries, keys and values come apart as those of plain weights do."""
    state = tiny_state(dtype=torch.bfloat16, dim=128, ffn_dim=192)
    plain = save(tmp_path / "plain.safetensors", in_comfyui_names(state))
    small = tmp_path / ("small.gguf" if form == "q8_0" else "small.safetensors")
    succeed_here("tools/quantise.py", plain, "--form", form, "--output", small, folder=tmp_path)

    loaded = load_dit(small, CPU)

    inputs = draw_inputs()
    with torch.no_grad():
        velocity, exact = (network(**inputs).float() for network in (loaded, load_dit(plain, CPU)))
    error = float((velocity - exact).abs().max() / exact.abs().max())
    assert 1e-4 < error < maximum


def pack_four_bits(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The linear layers of the blocks as bitsandbytes saves them, with levels of their own."""
    levels, block, packed = torch.linspace(-1, 1, 16), 64, dict(state)
    for name, weight in state.items():
        if not name.startswith("layers.") or ".proj." not in name:
            continue
        rows = weight.float().reshape(-1, block)
        largest = rows.abs().amax(1)
        codes = (rows / largest[:, None] - levels.view(16, 1, 1)).abs().argmin(0).reshape(-1, 2)
        packed[name] = (16 * codes[:, :1] + codes[:, 1:]).to(torch.uint8)
        packed[f"{name}.absmax"], packed[f"{name}.quant_map"] = largest, levels
        info = {"quant_type": "nf4", "blocksize": block, "shape": list(weight.shape), "dtype": "bfloat16"}
        packed[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor([*json.dumps(info).encode()]).byte()
    return packed


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
def test_files_in_four_bits_of_bitsandbytes_are_read(tmp_path: Path, stacked: bool) -> None:
    state = tiny_state(dtype=torch.bfloat16, dim=128, ffn_dim=192)
    stored = in_comfyui_names(state) if stacked else state
    path = save(tmp_path / "nf4.safetensors", pack_four_bits(stored))

    loaded, exact = (load_dit(file, CPU) for file in (path, save(tmp_path / "plain.safetensors", stored)))

    assert loaded.layers[0].proj["q"].form.name == "nf4"
    with torch.no_grad():
        found, expected = (network(**draw_inputs()).float() for network in (loaded, exact))
    assert 1e-4 < float((found - expected).abs().max() / expected.abs().max()) < 0.2


def without_states(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of bitsandbytes in a trainer's own cache, which has no state that says their shape."""
    return {name: tensor for name, tensor in pack_four_bits(state).items() if ".quant_state." not in name}


def in_entropack(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear layers as EntroPack's `CompressedLinear` saves them: bytes of their own codec."""
    linear = [name for name in state if name.endswith(".weight") and state[name].ndim == 2]
    packed = {name: tensor for name, tensor in state.items() if name not in linear}
    return packed | {f"{name}.entropack_quant_state": torch.zeros(99, dtype=torch.uint8) for name in linear}


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (without_states, "4 bits of bitsandbytes without a state: it has layers.0.proj.*absmax"),
        (in_entropack, "EntroPack: it has .*entropack_quant_state"),
    ],
)
def test_forms_of_other_programs_are_refused_by_name(
    tmp_path: Path, pack: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str
) -> None:
    for stacked in (False, True):
        state = tiny_state(dtype=torch.bfloat16, dim=128, ffn_dim=192)
        path = save(tmp_path / "small.safetensors", pack(in_comfyui_names(state) if stacked else state))
        with pytest.raises(CheckpointError, match=rf"not supported \({said}.*\. Pass the bf16"):
            load_dit(path, CPU)


def draw_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    return {
        "noisy": torch.randn(1, 128, 1, 4, 4, generator=generator),
        "timesteps": torch.tensor([500.0]),
        "text": torch.randn(1, 5, 64, generator=generator),
        "text_mask": torch.ones(1, 5),
    }
