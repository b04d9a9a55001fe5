"""Which tables FramePack caches, what lies in memory while it does, and what a LoRA says of its training.

Numbers: tests/parity/test_framepack_caches.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import fpack_cache_latents
from encoders.siglip import load_siglip
from frame_pack.caching import clip_entries, clip_sections, count_sections
from frame_pack.family import FramePack, family_for_latent_caching
from frame_pack.options import FramePackLatentCachingOptions
from frame_pack.sections import ANTI_DRIFTING, F1, GenerationOrder
from hunyuan_model.vae import load_vae
from modules.errors import DatasetError
from modules.script_options import parse_options
from protocols.data import MediaBatch, MediaEncoders, MediaTable
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, OUTPUT
from tests.tiny.framepack import write_siglip, write_tiny_framepack
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.project import CAPTIONS, write_clips, write_dataset, write_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> MediaEncoders:
    folder = tmp_path_factory.mktemp("encoders")
    vae = load_vae(write_vae(folder / "vae.safetensors"), CPU, torch.float32, tile=256)
    return MediaEncoders(vae, load_siglip(write_siglip(folder / "siglip.safetensors"), CPU, torch.float32))


# Tables


@pytest.mark.parametrize(
    ("window", "frames", "sections"),
    [(9, 37, 1), (9, 72, 1), (9, 73, 2), (1, 5, 1)],
)
def test_sections_are_counted_by_the_window(window: int, frames: int, sections: int) -> None:
    assert count_sections(MediaTable(window=window), frames) == sections


# The family


def family_of(*words: object) -> FramePack:
    (options,) = parse_options("", [str(word) for word in words], FramePackLatentCachingOptions)
    return family_for_latent_caching(options)


def test_every_switch_that_changes_caches_is_part_of_what_they_were_made_from(tmp_path: Path) -> None:
    models = ["--vae", write_vae(tmp_path / "vae.safetensors")]
    models += ["--image_encoder", write_siglip(tmp_path / "siglip.safetensors")]
    less = ("--one_frame_no_2x", "--one_frame_no_4x")
    switches = [(), ("--f1",), *(("--one_frame", *some) for some in ((), less[:1], less[1:], less))]
    found = [dict(family_of(*models, *given).media_identity) for given in switches]
    assert len({str(sorted(identity.items())) for identity in found}) == len(switches)
    assert all(
        identity.keys() == {"vae", "vae_dtype", "tile", "tile_frames", "image_encoder", "sections"}
        for identity in found
    )


def test_the_vae_is_tiled_unasked_and_in_time_from_six_seconds_on() -> None:
    files = family_of().files
    assert (files.vae_tile, files.vae_tile_frames) == (256, 192)


# What lies in memory


@pytest.mark.slow_cases("order0")
@pytest.mark.parametrize("order", [ANTI_DRIFTING, F1])
def test_items_encoded_together_equal_those_encoded_alone(
    encoders: MediaEncoders, order: GenerationOrder
) -> None:
    """As a GPU encodes them; each has its own sample of the posterior."""
    frames = torch.randint(0, 256, (2, 21, 16, 16, 3), dtype=torch.uint8)
    media = MediaBatch(frames, ("one", "two"), ((0, 21),) * 2, table=MediaTable(window=2))

    together = clip_entries(encoders, media, order)

    alone = [clip_entries(encoders, one, order)[0] for one in media.split_for(CPU)]
    for entries, others in zip(together, alone, strict=True):
        for entry, other in zip(entries, others, strict=True):
            assert (entry.section, entry.grid) == (other.section, other.grid)
            # float32: a batch sums in another order
            torch.testing.assert_close(entry.tensors, other.tensors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [ANTI_DRIFTING, F1])
def test_a_section_says_where_in_the_clip_its_target_is(order: GenerationOrder) -> None:
    """Masks of the loss are cut by it."""
    latents = torch.randn(1, 16, 1 + 3 * 9, 2, 2)

    entries = clip_sections(latents, torch.zeros(3, 4), order, 9)

    assert sorted(entry.start for entry in entries) == [1, 10, 19]
    for entry in entries:
        assert torch.equal(entry.tensors["latents"], latents[0, :, entry.start : entry.start + 9])


CLIPS = """
[[datasets]]
video_directory = "FOLDER/clips"
cache_directory = "FOLDER/cache"
resolution = [32, 32]
caption_extension = ".txt"
"""
IMAGES = CLIPS.replace("video_directory", "image_directory").replace("clips", "pictures")
# sections of two latent frames, one or two of them
SHORT = "target_frames = [9, 17]\nfp_latent_window_size = 2"
CONTROL = 'control_directory = "FOLDER/control"'


@pytest.mark.parametrize(
    ("dataset", "switches", "message"),
    [
        (CLIPS, (), r"target_frames = \[1\], but clips of 1 frames are too short: a section needs 37"),
        (CLIPS + "target_frames = [33, 73]", ("--f1",), "of 33 frames are too short: a section needs 37"),
        (CLIPS + SHORT, ("--one_frame",), "these are videos"),
        (CLIPS + SHORT + '\ncontrol_directory = "FOLDER/clips"', (), "FramePack takes no control media"),
        (IMAGES, (), "these are images"),
        (
            IMAGES,
            ("--one_frame",),
            "needs control images, from which each image is generated. Set control_directory",
        ),
        (IMAGES + CONTROL + "\nfp_1f_clean_indices = [0, 10]", ("--one_frame",), "pic_0.png, pic_1.png"),
    ],
)
def test_what_cannot_be_cached_is_named_before_anything_is_loaded(
    tmp_path: Path, dataset: str, switches: tuple[str, ...], message: str
) -> None:
    write_clips(tmp_path / "clips", 1)
    for name in ("pictures", "control"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "pic.png", 32, 32)
    (tmp_path / "pictures" / "pic.txt").write_text("an image", encoding="utf-8")
    config = tmp_path / "dataset.toml"
    config.write_text(dataset.replace("FOLDER", tmp_path.as_posix()), encoding="utf-8")
    models = ("--vae", "gone.safetensors", "--image_encoder", "gone.safetensors")  # cannot be loaded
    with pytest.raises(DatasetError, match=message) as caught:
        fpack_cache_latents.main(["--dataset_config", str(config), "--device", "cpu", *models, *switches])
    assert "dataset.toml, [[datasets]] 1" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_text_caches_are_those_of_the_known_tuners(tmp_path: Path) -> None:
    files = write_tiny_framepack(tmp_path / "models")
    write_clips(tmp_path / "clips")
    write_dataset(tmp_path, frames="37", batch_size=3)
    encoders = ("--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2)
    script = "fpack_cache_text_encoder_outputs.py"
    succeed_here(script, "--dataset_config", tmp_path / "dataset.toml", *encoders, folder=tmp_path)

    names = {f"clip {index}_fp_te.safetensors": caption for index, caption in enumerate(CAPTIONS)}
    assert {path.name for path in (tmp_path / "cache").glob("*.safetensors")} == names.keys()
    for name, caption in names.items():
        with safe_open(tmp_path / "cache" / name, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == {
            "llama_vec_float16": (torch.float16, (512, LLM_DIM)),
            "llama_attention_mask": (torch.bool, (512,)),
            "clip_l_pooler_float16": (torch.float16, (CLIP_DIM,)),
        }
        known = {key: text for key, text in metadata.items() if not key.startswith("reelsmith")}
        assert known == {"architecture": "framepack", "format_version": "1.0.1", "caption1": caption}


@pytest.mark.slow
def test_a_lora_says_what_it_was_trained_on(tmp_path: Path) -> None:
    """Without --network_module it is FramePack's own."""
    family = next(one for one in FAMILIES if one.name == "framepack")
    family.prepare(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    place = family.train.index("--network_module")
    unnamed = (*family.train[:place], *family.train[place + 2 :])
    more = ("--max_train_steps", 1, "--metadata_title", "A cat", "--training_comment", "for a test")
    succeed_here(*unnamed, *OUTPUT, *more, "--guidance_scale", 8, folder=tmp_path)

    with safe_open(tmp_path / "output" / "lora.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_base_model_version"] == "framepack"
    assert found["ss_network_module"] == "networks.lora_framepack"
    assert (found["ss_sd_model_name"], found["ss_vae_name"]) == ("dit.safetensors", "vae.safetensors")
    assert (found["ss_guidance_scale"], found["ss_training_comment"]) == ("8.0", "for a test")
    # sections of clips of 5 and 9 frames
    assert (found["ss_num_train_items"], found["ss_num_batches_per_epoch"]) == ("12", "6")
    (dataset,) = json.loads(found["ss_datasets"])
    assert (dataset["video_directory"], dataset["target_frames"]) == ("clips", [5, 9])
    assert found["modelspec.architecture"] == "framepack/lora"
    assert found["reelsmith_trained_for"] == "videos of FramePack"
    assert found["modelspec.implementation"] == "https://github.com/lllyasviel/FramePack"
    assert (found["modelspec.title"], found["modelspec.resolution"]) == ("A cat", "1280x720")
