"""fpack_train_network.py from the command line to its files: what is said of a LoRA, its start, samples, and
what is refused.
"""

import json
from pathlib import Path

from safetensors import safe_open

from tests.faults.messages import assert_one_message, run_here
from tests.frame_pack.projects import OUTPUT, ProjectOf, train
from tests.tiny.families import TinyFamily


def without(command: list[str], option: str) -> list[str]:
    """A command without an option and its value."""
    place = command.index(option)
    return command[:place] + command[place + 2 :]


def refused(family: TinyFamily, folder: Path, *arguments: object, command: list[str] | None = None) -> str:
    """The message of a training that ends before its first step."""
    words = (
        *(command or family.train),
        *OUTPUT,
        "--output_dir",
        folder / "never",
        "--max_train_steps",
        1,
        *arguments,
    )
    code, said = run_here(*words, folder=folder)
    assert "Loading model/dit.safetensors" not in said
    return assert_one_message(code, said)


def test_a_lora_says_what_it_was_trained_on(project_of: ProjectOf, tmp_path: Path) -> None:
    """Without --network_module it is FramePack's own."""
    family, folder = project_of("framepack")
    unnamed = TinyFamily(**{**vars(family), "train": without(family.train, "--network_module")})
    metadata = ("--metadata_title", "A cat", "--training_comment", "for a test", "--guidance_scale", "8")
    train(folder, unnamed, tmp_path, *metadata, "--min_timestep", "100")

    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
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


# --- caches
# ------------------------------------------------------------------------------------------------------------
