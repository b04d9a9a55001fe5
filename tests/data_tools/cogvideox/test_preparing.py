"""prepare_dataset.py, and what it writes read back as a dataset."""

import json
import logging
import os
import uuid
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import cache_latents
import cache_text_encoder_outputs
import prepare_dataset
import wan_cache_latents
import wan_cache_text_encoder_outputs
from data_tools.cogvideox.models import CogTextEncoder, round_down_frames
from dataset.cache import commands
from modules.errors import DatasetError, OptionError
from modules.media.pixels import to_pixels
from modules.media.reading import video_frames
from tests.data_tools.cogvideox.making import (
    NAMES,
    write_config,
    write_data,
    write_hunyuan_pipeline,
    write_lists,
    write_wan_pipeline,
)
from tests.tiny.project import CAPTIONS
from tests.tiny.wan_encoders import vae_tensors, write_tokenizer
from wan.vae import load_vae as load_wan_vae

SMALL = ["--height_buckets", "32", "--width_buckets", "32", "--frame_buckets", "13"]
FOLDERS = ("images", "image_latents", "videos", "video_latents", "prompts", "prompt_embeds")
Models = dict[str, Path]
HV_TEXTS = ("--text_encoder1", "{}/text_encoder", "--text_encoder2", "{}/text_encoder_2")
SCRIPTS = {
    "wan": (wan_cache_latents, wan_cache_text_encoder_outputs, ("--t5", "{}/text_encoder")),
    "hv": (cache_latents, cache_text_encoder_outputs, HV_TEXTS),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("pipelines")
    return {"wan": write_wan_pipeline(folder / "wan"), "hv": write_hunyuan_pipeline(folder / "hv")}


def run(data: Path, output: Path, *words: object) -> None:
    given = ["--data_root", data, "--output_dir", output, *SMALL, *words]
    prepare_dataset.main([*map(str, given), "--device", "cpu"])


def encode(data: Path, output: Path, model: Path, *words: object) -> None:
    run(data, output, "--model_id", model, "--save_latents_and_embeddings", *words)


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name, of videos the sizes of their pictures: x264 on a busy machine writes other bytes, up to
    6 of 255 apart; latents and first pictures beside them are compared whole.
    """
    return {
        path.relative_to(folder).as_posix(): str([frame.shape for frame in video_frames(path)]).encode()
        if path.suffix == ".mp4"
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != commands.NAME
    }


def test_the_folders_and_lists_are_those_of_the_form(models: Models, tmp_path: Path) -> None:
    data = write_data(tmp_path / "my data", frames=26)
    output = tmp_path / "prepared"

    encode(data, output, models["wan"], "--save_image_latents", "--id_token", "BW", "--target_fps", "12")

    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == sorted(FOLDERS)
    records = [json.loads(line) for line in (output / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == [f"BW {caption}" for caption in CAPTIONS[:3]]
    for key in ("prompt", "video"):
        lines = (output / f"{key}s.txt").read_text(encoding="utf-8").splitlines()
        assert lines == [record[key] for record in records]
    for record, name in zip(records, NAMES, strict=True):
        stems = {Path(record[key]).stem for key in ("video", "video_latent", "image", "prompt_embed")}
        assert len(stems) == 1
        assert uuid.UUID(stems.pop()).version == 4
        assert record["metadata"] == {"num_frames": 13, "height": 32, "width": 32}
        info = (output / record["video"]).with_suffix(".txt")
        assert json.loads(info.read_text(encoding="utf-8")) == record["metadata"]
        assert (output / "prompts" / info.name).read_text(encoding="utf-8") == record["prompt"]
        assert torch.load(output / record["video_latent"]).shape == (32, 4, 4, 4)
        assert torch.load(output / record["image_latent"]).shape == (32, 1, 4, 4)
        assert torch.load(output / record["prompt_embed"]).dtype == torch.float32
        original = list(video_frames(data / "videos" / f"{name}.mp4"))[:26:2]
        assert np.array_equal(np.asarray(Image.open(output / record["image"])), original[0])
        written = list(video_frames(output / record["video"]))
        assert len(written) == 13
        assert np.abs(np.stack(written).astype(int) - np.stack(original)).mean() < 3


@pytest.mark.slow
def test_the_moments_are_those_of_the_vae(models: Models, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", count=2)
    encode(data, tmp_path / "one", models["wan"], "--batch_size", 2, "--use_slicing")
    encode(data, tmp_path / "half", models["wan"], "--dtype", "bf16")

    vae = load_wan_vae(models["wan"] / "vae", torch.device("cpu"), torch.float32)
    lines = (tmp_path / "one" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    for record, name in zip(map(json.loads, lines), NAMES[:2], strict=True):
        frames = [torch.from_numpy(frame) for frame in video_frames(data / "videos" / f"{name}.mp4")]
        moments = vae.moments(to_pixels(torch.stack(frames)[None, :13]))[0]
        assert torch.equal(torch.load(tmp_path / "one" / record["video_latent"]), moments)
        half = torch.load(tmp_path / "half" / record["video_latent"])
        assert half.dtype == torch.bfloat16
        assert (half.float() - moments).abs().mean() < 0.05 * moments.abs().mean()


@pytest.mark.parametrize("family", ["wan", "hv"])
def test_caches_of_prepared_tensors_equal_those_of_the_clips_and_load_no_encoder(
    family: str, models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_data(tmp_path / "data", count=2)
    output = tmp_path / "prepared"
    encode(data, output, models[family], "--id_token", "BW", "--save_image_latents")
    # our own encoding of the clips that were prepared, under the names that they got
    clips = tmp_path / "clips"
    (clips / "videos").mkdir(parents=True)
    videos = (output / "videos.txt").read_text(encoding="utf-8").splitlines()
    for name, video in zip(NAMES, videos, strict=False):
        os.link(data / "videos" / f"{name}.mp4", clips / video)
    write_lists(clips, CAPTIONS[:2], videos)
    for path in (output / "videos").iterdir():
        path.unlink()
    own = write_config(
        tmp_path, clips, "target_frames = [13]", 'id_token = "BW"', name="own.toml", cache="own"
    )
    given = write_config(tmp_path, output, "load_tensors = true", name="given.toml", cache="given")
    latents, texts, words = SCRIPTS[family]

    def cache(config: Path) -> None:
        dataset, model = ["--dataset_config", str(config)], models[family]
        first_frames = ["--i2v"] if family == "hv" else []
        latents.main([*dataset, "--vae", str(model / "vae"), "--vae_dtype", "float32", *first_frames])
        texts.main([*dataset, *(word.format(model) for word in words)])

    cache(own)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        cache(given)

    assert "computing in" not in caplog.text  # what each encoder logs when it is loaded
    assert "says which VAE" not in caplog.text
    expected, found = contents(tmp_path / "own"), contents(tmp_path / "given")
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name in found:
        ours, theirs = load_file(tmp_path / "own" / name), load_file(tmp_path / "given" / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


def test_a_rerun_continues_what_was_stopped_and_equals_an_undisturbed_run(
    models: Models, tmp_path: Path
) -> None:
    data, output = write_data(tmp_path / "data"), tmp_path / "prepared"
    words = ("--random_flip", "0.5", "--video_reshape_mode", "random")
    encode(data, output, models["wan"], *words)
    full = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.pt")}
    encode(data, output, models["wan"], *words)
    assert contents(output) == full
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.pt")} == times

    names = sorted(path.stem for path in (output / "videos").glob("*.mp4"))
    (output / "videos" / f"{names[0]}.txt").unlink()  # stopped before it was done
    (output / "prompts" / f"{names[1]}.txt").unlink()
    (output / "video_latents" / f".{names[2]}.pt.0123abcd.tmp").write_bytes(b"half")
    for name in ("prompts.txt", "videos.txt", "data.jsonl"):
        (output / name).unlink()
    encode(data, output, models["wan"], *words)

    assert contents(output) == full
    again = {path: path.stat().st_mtime_ns for path in output.rglob("*.pt")}
    changed = {path.relative_to(output).as_posix() for path in times if again[path] != times[path]}
    assert changed == {f"video_latents/{names[0]}.pt", f"prompt_embeds/{names[1]}.pt"}


def test_a_changed_caption_or_clip_is_prepared_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    data, output = write_data(tmp_path / "data", count=2), tmp_path / "prepared"
    run(data, output)
    before = contents(output)
    write_lists(data, ("another text", CAPTIONS[1]), [f"videos/{name}.mp4" for name in NAMES[:2]])
    newer = (output / "data.jsonl").stat().st_mtime + 5
    os.utime(data / "videos" / f"{NAMES[1]}.mp4", (newer, newer))
    times = {path.name: path.stat().st_mtime_ns for path in (output / "videos").glob("*.mp4")}
    run(data, output)

    assert (output / "prompts.txt").read_text(encoding="utf-8") == f"another text\n{CAPTIONS[1]}\n"
    (record, _) = map(json.loads, (output / "data.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["video_latent"] is record["prompt_embed"] is None
    assert contents(output).keys() == before.keys()
    again = {path.name: path.stat().st_mtime_ns for path in (output / "videos").glob("*.mp4")}
    assert [times[name] != again[name] for name in sorted(times)].count(True) == 1
    with pytest.raises(OptionError, match="was begun with other settings: target_fps was 8, is now 9"):
        run(data, output, "--target_fps", 9)
    with pytest.raises(OptionError, match="is --data_root: its lists would be written over"):
        run(output, output)


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


@pytest.mark.parametrize(("frames", "usable"), [(3, 1), (4, 4), (5, 5), (6, 4), (50, 48)])
def test_the_vae_takes_4n_or_4n_plus_1_frames(frames: int, usable: int) -> None:
    assert round_down_frames(frames) == usable


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
