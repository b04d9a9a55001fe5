"""fpack_train_network.py from the command line to what its file says."""

import json
from pathlib import Path

from safetensors import safe_open

from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, OUTPUT


def test_a_lora_says_what_it_was_trained_on(tmp_path: Path) -> None:
    """Without --network_module it is FramePack's own."""
    family = next(one for one in FAMILIES if one.name == "framepack")
    family.prepare(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    place = family.train.index("--network_module")
    unnamed = (*family.train[:place], *family.train[place + 2 :])
    metadata = ("--metadata_title", "A cat", "--training_comment", "for a test", "--guidance_scale", "8")
    more = ("--max_train_steps", 1, "--min_timestep", "100", *metadata)
    succeed_here(*unnamed, *OUTPUT, *more, folder=tmp_path)

    with safe_open(tmp_path / "output" / "lora.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_base_model_version"] == "framepack"
    assert found["ss_network_module"] == "networks.lora_framepack"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "1.0")
    assert (found["ss_sd_model_name"], found["ss_vae_name"]) == ("dit.safetensors", "vae.safetensors")
    assert (found["ss_guidance_scale"], found["ss_training_comment"]) == ("8.0", "for a test")
    # sections of clips of 5 and 9 frames
    assert (found["ss_num_train_items"], found["ss_num_batches_per_epoch"]) == ("12", "6")
    (dataset,) = json.loads(found["ss_datasets"])
    assert (dataset["video_directory"], dataset["target_frames"]) == ("clips", [5, 9])
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "framepack/lora"
    assert found["reelsmith_trained_for"] == "videos of FramePack"
    assert found["modelspec.implementation"] == "https://github.com/lllyasviel/FramePack"
    assert (found["modelspec.title"], found["modelspec.resolution"]) == ("A cat", "1280x720")
    assert found["modelspec.timestep_range"] == "100,1000"
    assert len(found["sshs_model_hash"]) == 64
