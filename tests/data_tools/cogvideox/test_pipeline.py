"""CogVideoX's own VAE and text encoder prepare clips as diffusers computes them."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import prepare_dataset
import wan_cache_latents
from data_tools.cogvideox.models import CogTextEncoder, usable_frames
from modules.errors import DatasetError
from modules.media.pixels import to_pixels
from modules.media.reading import video_frames
from tests.data_tools.cogvideox.making import NAMES, write_config, write_data
from tests.tiny.project import CAPTIONS
from tests.tiny.wan_encoders import vae_tensors, write_tokenizer


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cogvideox")
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=16
    )
    vae.save_pretrained(folder / "vae")
    config = transformers.T5Config(
        vocab_size=256,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    ("frames", "usable"), [(1, 1), (3, 1), (4, 4), (5, 5), (6, 4), (16, 16), (49, 49), (50, 48), (80, 80)]
)
def test_the_vae_takes_4n_or_4n_plus_1_frames(frames: int, usable: int) -> None:
    assert usable_frames(frames) == usable


def test_clips_and_captions_are_encoded_as_by_diffusers(pipeline: Path, tmp_path: Path) -> None:
    data, output = write_data(tmp_path / "data", count=2), tmp_path / "prepared"
    prepare_dataset.main(
        [
            *("--data_root", str(data), "--output_dir", str(output), "--model_id", str(pipeline)),
            *("--height_buckets", "32", "--width_buckets", "32", "--frame_buckets", "8"),
            *("--save_latents_and_embeddings", "--max_sequence_length", "20", "--batch_size", "2"),
            *("--device", "cpu", "--use_tiling"),
        ]
    )

    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(pipeline / "vae").eval()
    text_encoder = transformers.T5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    lines = (output / "data.jsonl").read_text(encoding="utf-8").splitlines()
    for record, name, caption in zip(map(json.loads, lines), NAMES[:2], CAPTIONS[:2], strict=True):
        frames = [torch.from_numpy(frame) for frame in video_frames(data / "videos" / f"{name}.mp4")]
        ids = tokenizer(
            caption, padding="max_length", max_length=20, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            moments = vae.encode(to_pixels(torch.stack(frames)[None, ::2])).latent_dist.parameters[0]
            embeds = text_encoder(ids)[0][0]
        found = torch.load(output / record["video_latent"])
        assert found.shape == (32, 2, 4, 4)
        torch.testing.assert_close(found, moments)
        stored = torch.load(output / record["prompt_embed"])
        assert stored.shape == (20, 32)
        torch.testing.assert_close(stored, embeds)

    torch.save(vae_tensors(), tmp_path / "wan.pth")  # its latents have as many channels
    config = write_config(tmp_path, output, "load_tensors = true")
    with pytest.raises(DatasetError, match="was made by the VAE of cogvideox .*this is wan"):
        wan_cache_latents.main(["--dataset_config", str(config), "--vae", str(tmp_path / "wan.pth")])


def test_captions_that_are_cut_are_told(pipeline: Path) -> None:
    encoder = CogTextEncoder(pipeline, torch.float32, max_tokens=4)
    count = encoder.token_counter()

    assert not count("a").is_cut
    cut = count("a red square moves right and a blue circle moves left")
    assert cut.is_cut
    assert cut.text.endswith(cut.cut_text)
    assert 0 < len(cut.cut_text) < len(cut.text)
