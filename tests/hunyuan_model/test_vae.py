"""The video VAE against recorded numbers and diffusers, whole and in tiles."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.model_files import read_once
from encoders import tiles as vae_tiles
from hunyuan_model.vae import LOG_VARIANCE, HunyuanVae, load_vae
from hunyuan_model.vae_blocks import HunyuanVaeConfig
from hunyuan_model.vae_checkpoints import read_vae
from modules.errors import CheckpointError, OptionError
from modules.media.pixels import byte_clips, to_pixels
from runtime.planning.dry_run import allocate_empty_weights, dry_run
from tests.golden_cases import make_weights, read_case
from tests.manifests import manifest_names, tensor_list, write_hollow
from tests.tiny.hunyuan_vae import vae_comfy_tensors, vae_config, vae_tensors
from tests.tiny.wan_encoders import vae_tensors as wan_vae_tensors

CPU = torch.device("cpu")
EXACT = 2e-5  # of the largest value: float32, sums in another order through 60 layers


def made(tmp_path: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> HunyuanVae:
    save_file(vae_tensors() if tensors is None else tensors, tmp_path / "vae.safetensors")
    return load_vae(tmp_path / "vae.safetensors", CPU, torch.float32, **settings)


@pytest.fixture
def vae(tmp_path: Path) -> HunyuanVae:
    return made(tmp_path)


def diffusers_vae(edge: int | None = None, frames: int | None = None) -> AutoencoderKLHunyuanVideo:
    """diffusers' VAE with the same weights, cut in space from `edge` pixels on and in time from `frames`
    on.
    """
    config = vae_config()
    theirs = AutoencoderKLHunyuanVideo(
        block_out_channels=config.encoder, norm_num_groups=config.groups
    ).eval()
    theirs.load_state_dict(vae_tensors())
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = frames is not None
    if edge is not None:
        strides = {"tile_sample_stride_height": edge * 3 // 4, "tile_sample_stride_width": edge * 3 // 4}
        theirs.enable_tiling(tile_sample_min_height=edge, tile_sample_min_width=edge, **strides)
    if frames is not None:
        theirs.tile_sample_min_num_frames, theirs.tile_sample_stride_num_frames = frames, frames * 3 // 4
    return theirs


def clip_of(frames: int, height: int = 32, width: int = 48, batch: int = 1) -> Tensor:
    return torch.randn(
        batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)
    ).clamp_(-1, 1)


def joined(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks), dim=2)


def posterior_of(vae: HunyuanVae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance."""
    mean, log_variance = vae.moments(pixels).chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(vae: HunyuanVae, theirs: AutoencoderKLHunyuanVideo, pixels: Tensor) -> None:
    """Mean and log variance of the posterior, and pixels of a sample of it."""
    mean, log_variance = posterior_of(vae, pixels)
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(0))
        decoded = theirs.decode(latents).sample
    assert relative_error(mean, posterior.mean) <= EXACT
    assert relative_error(log_variance, posterior.logvar) <= EXACT
    assert relative_error(joined(vae.decode_unclamped(latents)), decoded) <= EXACT


def test_recorded_latents_and_pixels_are_met(tmp_path: Path) -> None:
    description, tensors = read_case("hv_vae")
    vae = made(tmp_path, make_weights(description["weights_model_key"], description["weights"]))
    tolerance = {name: limit["atol"] for name, limit in description["tolerance"].items()}

    mean, log_variance = posterior_of(vae, tensors["video"])

    assert (mean - tensors["mean"]).abs().max() <= tolerance["mean"]
    assert (log_variance - tensors["logvar"]).abs().max() <= tolerance["logvar"]
    decoded = joined(vae.decode_unclamped(tensors["z"]))
    assert (decoded - tensors["decoded"]).abs().max() <= tolerance["decoded"]


RELEASE = ({"tiling": True}, (256, 64))  # 256 pixels, cut every 192; 64 frames, cut every 48
TILES, BOTH = ({"tile": 64}, (64, 64)), ({"tile": 32, "tile_frames": 16}, (32, 16))
SPANS = ({"tiling": True, "tile_frames": 16}, (256, 16))


@pytest.mark.slow_cases(
    "cuts1-5-48-32",
    "cuts2-33-24-40",
    "cuts3-1-64-88",
    "cuts4-9-32-136",
    "cuts5-5-112-80",
    "cuts6-25-32-48",
    "cuts7-33-56-40",
    "cuts8-1-264-32",
    "cuts9-65-16-24",
)
@pytest.mark.parametrize(
    ("cuts", "frames", "height", "width"),
    [
        *((({}, (None, None)), *size) for size in ((1, 32, 48), (5, 48, 32), (33, 24, 40))),
        (TILES, 1, 64, 88),  # an image, cut in one direction
        (TILES, 9, 32, 136),  # lower than a tile, five columns
        (TILES, 5, 112, 80),  # more than two rows and columns, none of full size at the end
        (SPANS, 25, 32, 48),  # another span would begin at the last frame
        (BOTH, 33, 56, 40),
        (RELEASE, 1, 264, 32),
        (RELEASE, 65, 16, 24),
    ],
)
def test_clips_whole_and_in_pieces_equal_those_of_diffusers(
    tmp_path: Path, cuts: tuple[dict[str, Any], tuple[int, int]], frames: int, height: int, width: int
) -> None:
    settings, there = cuts
    pixels = clip_of(frames, height, width, batch=2 if frames == 5 else 1)
    compare(made(tmp_path, **settings), diffusers_vae(*there), pixels)


@pytest.mark.slow_cases("settings1", "settings2")
@pytest.mark.parametrize("settings", [{}, {"tiling": True}, {"tile": 256}])
def test_a_clip_of_one_tile_is_not_cut(tmp_path: Path, vae: HunyuanVae, settings: dict[str, Any]) -> None:
    tiled, pixels = made(tmp_path, **settings), clip_of(13, 16, 256)
    latents = vae.encode(pixels)
    assert torch.equal(tiled.encode(pixels), latents)
    assert torch.equal(joined(tiled.decode(latents)), joined(vae.decode(latents)))


@pytest.mark.slow
def test_bytes_are_encoded_as_the_numbers_they_stand_for(tmp_path: Path) -> None:
    """And of a long clip no more at a time are numbers than are computed at a time."""
    vae = made(tmp_path, tile=32, tile_frames=16)
    frames = torch.randint(0, 256, (1, 37, 48, 40, 3), dtype=torch.uint8)
    assert byte_clips(frames).data_ptr() == frames.data_ptr()
    expected = vae.encode(to_pixels(frames))
    computed = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[2:]))

    assert torch.equal(vae.encode(byte_clips(frames)), expected)
    assert max(computed) <= (17, 32, 32)


@pytest.mark.slow_cases("3")
@pytest.mark.parametrize("chunk", [1, 3])
def test_frames_computed_a_few_at_a_time_give_the_same(tmp_path: Path, vae: HunyuanVae, chunk: int) -> None:
    few, pixels = made(tmp_path, chunk_size=chunk), clip_of(17, batch=2)
    mean, log_variance = posterior_of(vae, pixels)
    few_mean, few_log_variance = posterior_of(few, pixels)
    assert relative_error(few_mean, mean) <= EXACT
    assert relative_error(few_log_variance, log_variance) <= EXACT
    assert relative_error(joined(few.decode_unclamped(mean)), joined(vae.decode_unclamped(mean))) <= EXACT


@pytest.mark.slow
def test_no_piece_is_larger_than_a_tile(tmp_path: Path) -> None:
    """What bounds the memory: however long and large the clip, the networks see 4 + 1 latent frames of 4 x
    4.
    """
    vae, seen = made(tmp_path, tile=32, tile_frames=16), []
    for half in (vae.encoder, vae.decoder):
        half.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    latents = vae.encode(clip_of(41, 40, 56))
    assert max(seen) == (17, 32, 32)
    seen.clear()
    list(vae.decode(latents))
    assert max(seen) == (5, 4, 4)


def test_a_sample_is_drawn_from_the_generators_given(vae: HunyuanVae) -> None:
    pixels = clip_of(5, batch=2)
    with torch.no_grad():
        posterior = diffusers_vae().encode(pixels).latent_dist

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    sampled = vae.encode(pixels, generators())

    assert relative_error(sampled, posterior.sample(generators())) <= EXACT
    assert torch.equal(sampled, vae.encode(pixels, generators()))
    assert relative_error(vae.encode(pixels[1:], generators()[1:]), sampled[1:]) <= EXACT
    assert (sampled - vae.encode(pixels)).abs().max() > 0.1
    with pytest.raises(ValueError, match="1 generators for 2 clips"):
        vae.encode(pixels, generators()[:1])


def test_log_variances_are_limited(tmp_path: Path) -> None:
    tensors = vae_tensors()
    tensors["quant_conv.bias"][16:] = torch.linspace(-100, 100, 16)
    _, log_variance = posterior_of(made(tmp_path, tensors), clip_of(1))
    assert log_variance.min() == -30
    assert log_variance.max() == 20


@pytest.mark.parametrize("settings", [{}, {"tile": 32, "tile_frames": 16}])
def test_pixels_come_in_playing_order_one_frame_and_then_four_at_a_time(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    latents = torch.randn(1, 16, 9, 5, 4, generator=torch.Generator().manual_seed(0)) * 3
    chunks = list(made(tmp_path, **settings).decode(latents))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 3, 1, 40, 32)] + [(1, 3, 4, 40, 32)] * 8
    assert max(float(chunk.abs().max()) for chunk in chunks) <= 1
    # a chunk keeps no more than itself in memory
    assert all(chunk.untyped_storage().nbytes() == chunk.nbytes for chunk in chunks)


@pytest.mark.parametrize(
    ("settings", "option"), [({"chunk_size": 0}, "--vae_chunk_size 0"), ({"tile": 24}, "min_size 24")]
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, int], option: str) -> None:
    with pytest.raises(OptionError, match=option):
        made(tmp_path, **settings)


# 8 and 11 bits through 60 layers
@pytest.mark.slow_cases("dtype0-0.1")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_16_bit_weights_give_float32_results_near_the_exact_ones(
    tmp_path: Path, vae: HunyuanVae, dtype: torch.dtype, limit: float
) -> None:
    half, pixels = load_vae(tmp_path / "vae.safetensors", CPU, dtype), clip_of(5)
    latents = half.encode(pixels)
    assert half.dtype == dtype
    assert latents.dtype == torch.float32
    assert relative_error(latents, vae.encode(pixels)) < limit
    assert (
        relative_error(joined(half.decode_unclamped(latents)), joined(vae.decode_unclamped(latents))) < limit
    )


@pytest.mark.slow
def test_a_rehearsal_computes_one_tile_and_finds_the_memory_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(vae_tensors(), tmp_path / "vae.safetensors")
    tiles: list[tuple[int, ...]] = []

    def peak() -> int:
        tiled = load_vae(tmp_path / "vae.safetensors", torch.device("meta"), torch.float32, tile=32)
        pixels = tiled._pixels
        monkeypatch.setattr(
            tiled, "_pixels", lambda latents: tiles.append(tuple(latents.shape)) or pixels(latents)
        )
        with dry_run() as ledger, torch.no_grad():
            allocate_empty_weights(tiled, ledger)
            for _ in tiled.decode(torch.empty(1, 16, 1, 6, 4)):
                pass
            return max(sum(moment.values()) for moment in ledger.peaks.values())

    found = peak()
    assert tiles == [(1, 16, 1, 4, 4)]
    monkeypatch.setattr(vae_tiles, "compute_piece", lambda compute, piece: compute(piece))
    assert found == pytest.approx(peak(), rel=0.01)  # sizes are rounded up to what an allocator gives
    assert len(tiles) == 1 + 2 * 2


def loaded(path: Path) -> HunyuanVae:
    return load_vae(path, CPU, torch.float32)


def assert_same(vae: HunyuanVae, tensors: dict[str, Tensor]) -> None:
    torch.testing.assert_close(vae.state_dict(), tensors, rtol=0, atol=0)


@pytest.mark.parametrize("manifest", manifest_names("hunyuanvideo-vae"))
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_published_files_fit_tensor_for_tensor(tmp_path: Path, manifest: str, prefix: str) -> None:
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list(manifest), prefix)
    vae = load_vae(path, torch.device("meta"), torch.float16)
    config = HunyuanVaeConfig(16, 32, (128, 256, 512, 512), 2, (512, 512, 256, 128), 3)
    assert read_once(path, read_vae).config == config
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float16}


@pytest.mark.parametrize("layout", ["pickled", "wrapped", "comfyui", "all-in-one"])
def test_every_layout_gives_the_same_weights(tmp_path: Path, layout: str) -> None:
    tensors, path = vae_tensors(), tmp_path / "vae.safetensors"
    prefixed = {f"vae.{name}": tensor for name, tensor in tensors.items()}
    match layout:
        case "pickled":
            torch.save(tensors, path := path.with_suffix(".pt"))
        case "wrapped":
            torch.save({"state_dict": prefixed}, path := path.with_suffix(".pt"))
        case "comfyui":
            save_file(vae_comfy_tensors(tensors), path)
        case _:
            others = {
                "model.model.img_in.proj.bias": torch.zeros(4),
                "text_encoders.x.weight": torch.zeros(4),
            }
            save_file({**prefixed, **others}, path)
    assert_same(loaded(path), tensors)


def test_a_folder_of_diffusers_loads_with_the_groups_it_states(tmp_path: Path) -> None:
    config = vae_config()
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=config.encoder, norm_num_groups=8).eval()
    theirs.load_state_dict(vae_tensors())
    theirs.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)).clamp_(-1, 1)

    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        vae = loaded(path)
        assert_same(vae, vae_tensors())
        with torch.no_grad():
            torch.testing.assert_close(
                vae.encode(pixels), theirs.encode(pixels).latent_dist.mean, rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("width", [8, 128])
def test_without_a_config_two_channels_form_a_group_and_at_most_32_are(tmp_path: Path, width: int) -> None:
    path = write_hollow(
        tmp_path / "vae.safetensors",
        {name: ("F32", tuple(t.shape)) for name, t in meta_tensors(width).items()},
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "Another", "norm_num_groups": 1}), encoding="utf-8"
    )
    assert read_once(path, read_vae).config == vae_config(width)


def meta_tensors(width: int = 8, z: int = 16) -> dict[str, Tensor]:
    with torch.device("meta"):
        return HunyuanVae(vae_config(width, z)).state_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"_class_name": "AutoencoderKLCausal3D", "norm_num_groups": 3}',
            "8 channels cannot be divided into 3 norm groups",
        ),
        ('{"_class_name": "AutoencoderKLCausal3D", "norm_num_groups": 0}', "is 0; it must be at least 1"),
        ('{"_class_name": ', "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    save_file(vae_tensors(), tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path / "vae.safetensors")


def test_another_vae_is_named(tmp_path: Path) -> None:
    save_file(wan_vae_tensors(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"is not a HunyuanVideo VAE; it looks like a Wan2.1 VAE"):
        loaded(tmp_path / "vae.safetensors")


def test_missing_levels_and_tensors_are_named(tmp_path: Path) -> None:
    tensors = {
        name: tensor for name, tensor in vae_tensors().items() if not name.startswith("decoder.up_blocks.3.")
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.up_blocks has 3 levels, HunyuanVideo's has 4"):
        loaded(tmp_path / "vae.safetensors")
    tensors = vae_tensors()
    del tensors["encoder.mid_block.attentions.0.to_q.weight"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: encoder\.mid_block\.attentions\.0\.to_q\.weight"):
        loaded(tmp_path / "vae.safetensors")


def test_another_number_of_latent_channels_is_refused(tmp_path: Path) -> None:
    save_file(
        {name: torch.zeros(tensor.shape) for name, tensor in meta_tensors(z=8).items()},
        tmp_path / "vae.safetensors",
    )
    with pytest.raises(CheckpointError, match="8 latent channels"):
        loaded(tmp_path / "vae.safetensors")
