"""HunyuanImage's text encoders against recorded vectors: template, tokens, states, glyph texts."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.opening import open_checkpoint
from encoders.tiles import posterior_generator
from hunyuan_image.configs import LATENT
from hunyuan_image.text_encoders import (
    AFTER,
    BEFORE,
    NUM_TEMPLATE_TOKENS,
    GlyphTextEncoder,
    QwenTextEncoder,
    find_quoted_texts,
    make_glyph_prompt,
)
from hunyuan_image.vae import HunyuanImageVae, HunyuanImageVaeConfig, compute_in_rows, load_vae, read_vae
from modules.errors import CheckpointError
from protocols.data import Conditions
from protocols.requests import Prompt
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_image import (
    CHANNELS,
    VAE,
    byt5_state,
    diffusers_vae,
    vae_state,
    write_vae,
)

CPU = torch.device("cpu")
CASE, TENSORS = read_case("hunyuan_image_text")


def encode(encoder: QwenTextEncoder | GlyphTextEncoder, *prompts: str | Prompt) -> list[Conditions]:
    encoder.load(CPU)
    with torch.inference_mode():
        return encoder.encode([Prompt(one) if isinstance(one, str) else one for one in prompts])


def golden_qwen(folder: Path) -> QwenTextEncoder:
    model = CASE["models"]["text_encoder"]
    weights = make_weights(model["weights_model_key"], model["weights"], CASE["salt"])
    save(folder / "model.safetensors", weights)
    names = ("hidden_size", "num_attention_heads", "rms_norm_eps", "rope_theta")
    told = {name: model["config"][name] for name in names}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **told}), encoding="utf-8")
    tokenizer = json.dumps(CASE["tokenizers"]["text_encoder"])
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return QwenTextEncoder(folder, torch.float32)


def test_states_of_the_language_model_equal_the_recorded_ones(tmp_path: Path) -> None:
    encoder = golden_qwen(tmp_path)
    found = encode(encoder, *CASE["prompts"])

    assert f"{BEFORE}{{}}{AFTER}" == CASE["template"]
    assert CASE["dropped_tokens"] == NUM_TEMPLATE_TOKENS
    assert encoder.state is None  # which no cache of this family names
    for one, states, mask in zip(found, TENSORS["vlm_states"], TENSORS["vlm_mask"], strict=True):
        (ours,), (real,), count = one["vlm_embed"], one["vlm_mask"], int(mask.sum())
        assert len(ours) == count
        assert real.dtype == torch.int64
        assert bool(real.all())
        torch.testing.assert_close(ours, states[:count], rtol=0, atol=2e-5)


def test_what_is_to_be_written_equals_the_recorded_texts() -> None:
    assert [make_glyph_prompt(prompt) for prompt in CASE["prompts"]] == CASE["glyph_texts"]
    assert [bool(find_quoted_texts(prompt)) for prompt in CASE["prompts"]] == CASE["ocr_mask"]


def test_states_of_glyphs_equal_the_recorded_ones(tmp_path: Path) -> None:
    model = CASE["models"]["byt5"]
    weights = make_weights(model["weights_model_key"], model["weights"], CASE["salt"])
    encoder = GlyphTextEncoder(save(tmp_path / "byt5.safetensors", weights), torch.float32)

    found = encode(encoder, *CASE["prompts"])

    for index, one in enumerate(found):
        assert torch.equal(one["byt5_mask"], TENSORS["byt5_mask"][index])
        assert one["ocr_mask"].tolist() is CASE["ocr_mask"][index]
        torch.testing.assert_close(one["byt5_embed"], TENSORS["byt5_states"][index], rtol=0, atol=2e-5)


def test_glyphs_are_cut_at_128_bytes_and_keep_their_end(tmp_path: Path) -> None:
    encoder = GlyphTextEncoder(save(tmp_path / "byt5.safetensors", byt5_state()), torch.float32)

    (long,) = encode(encoder, f'"{"x" * 200}"')
    counted = encoder.token_counter()(f'"{"x" * 200}"')

    assert int(long["byt5_mask"].sum()) == 128
    assert counted.is_cut
    assert counted.tokens > 128
    assert encoder.token_counter()("nothing to write").tokens == 0


NEAR = 1e-5


def as_matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The 1x1 convolutions of a file as the linear layers that they are here."""
    return {
        name: value.flatten(1) if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else value
        for name, value in state.items()
    }


def golden_vae(tile: int | None = None) -> HunyuanImageVae:
    case, _ = read_case("hunyuan_image_vae")
    sizes = case["config"]
    config = HunyuanImageVaeConfig(sizes["latent_channels"], tuple(sizes["block_out_channels"]), 2, 3)
    vae = HunyuanImageVae(config, tile)
    weights = make_weights(case["weights_model_key"], case["weights"], case["salt"])
    vae.load_state_dict(as_matrices(weights))
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [None, 5])
def test_encoding_and_decoding_equal_the_recorded_values(rows: int | None) -> None:
    case, tensors = read_case("hunyuan_image_vae")
    vae = golden_vae()
    if rows is not None:
        compute_in_rows(vae, rows)

    mean, logvar = vae.moments(tensors["image"].unsqueeze(2)).squeeze(2).chunk(2, dim=1)
    pixels = vae.decode(tensors["z"].unsqueeze(2))

    tolerance = case["tolerance"]
    torch.testing.assert_close(mean, tensors["mean"], rtol=0, **tolerance["mean"])
    torch.testing.assert_close(logvar, tensors["logvar"], rtol=0, **tolerance["logvar"])
    expected = tensors["decoded"].clamp(-1, 1).unsqueeze(2)
    torch.testing.assert_close(pixels, expected, rtol=0, **tolerance["decoded"])


def test_tiles_equal_the_recorded_ones() -> None:
    _, tensors = read_case("hunyuan_image_vae")
    vae = golden_vae(128)

    pixels = vae.decode(tensors["z_tiled"].unsqueeze(2))
    moments = vae.moments(tensors["image_tiled"].float().unsqueeze(2)).squeeze(2)

    torch.testing.assert_close(pixels.squeeze(2), tensors["decode_tiled"].clamp(-1, 1), rtol=0, atol=1e-3)
    # the recorded picture was rounded to float16 after it was encoded, by up to 1e-3: a tile by itself, which
    # nothing was blended into, differs by as much
    alone = vae.encoder(tensors["image_tiled"][..., :128, :128].float())[..., :3, :3]
    allowed = 1.5 * (alone - tensors["encode_tiled"][..., :3, :3]).abs().max()
    assert (moments - tensors["encode_tiled"]).abs().max() <= allowed
    torch.testing.assert_close(moments[..., :3, :3], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["published", "diffusers"])
def test_a_file_gives_what_diffusers_class_gives(layout: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLHunyuanImage

    theirs = AutoencoderKLHunyuanImage(
        3, 3, CHANNELS, VAE.widths, 2, spatial_compression_ratio=32, sample_size=384
    )
    state = vae_state()
    theirs.load_state_dict(diffusers_vae(state))
    path = save(tmp_path / "vae.safetensors", state if layout == "published" else diffusers_vae(state))
    ours = load_vae(path, CPU, torch.float32, chunk_size=7)
    torch.manual_seed(0)
    pixels, latents = torch.rand(1, 3, 64, 32) * 2 - 1, torch.randn(1, CHANNELS, 2, 1)

    with torch.no_grad():
        moments, decoded = theirs._encode(pixels), theirs.decode(latents).sample
    ours_moments = ours.moments(pixels.unsqueeze(2)).squeeze(2)
    ours_decoded = ours.decode(latents.unsqueeze(2))

    assert (ours_moments - moments).abs().max() <= NEAR * moments.abs().max()
    assert (ours_decoded.squeeze(2) - decoded.clamp(-1, 1)).abs().max() <= 1e-4


def test_latents_are_samples_of_the_posterior_seeded_by_a_name(tmp_path: Path) -> None:
    vae = load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.float32)
    image = torch.randint(0, 256, (1, 3, 1, 32, 64), dtype=torch.uint8)

    first, again, other = (vae.encode(image, [posterior_generator(name)]) for name in ("a", "a", "b"))

    assert first.shape == (1, CHANNELS, 1, 1, 2) == LATENT.shape(1, 32, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    mean, logvar = vae.moments(image).chunk(2, dim=1)
    noise = torch.randn(mean.shape[1:], generator=posterior_generator("a"))
    expected = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
    torch.testing.assert_close(first, expected)
    assert torch.equal(vae.encode(image), mean)


def test_the_published_vae_loads_at_full_size(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list("hunyuanimage2.1-vae"))

    vae = load_vae(path, torch.device("meta"), torch.float16)

    assert sum(each.numel() for each in vae.parameters()) == 405575491


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "HunyuanVideo VAE"),
        ({"decoder.conv_in.weight": torch.zeros(128, 16, 3, 3)}, "16 latent channels"),
        ({"encoder.down.6.block.0.conv1.weight": torch.zeros(4)}, "7"),
        ({"encoder.down.4.block.0.conv1.weight": torch.zeros(48, 48, 3, 3)}, "do not fit"),
    ],
)
def test_another_vae_is_refused_by_name(change: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    state = {"encoder.conv_in.conv.weight": torch.zeros(2)} if says == "HunyuanVideo VAE" else vae_state()
    path = save(tmp_path / "vae.safetensors", {**state, **change})

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=says):
        read_vae(checkpoint)
