"""Kandinsky 6: files in both layouts, what is refused, the scale of its sound, silent clips, its LoRAs."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.opening import open_checkpoint
from kandinsky.configs import TASKS
from kandinsky.family import Kandinsky6, family_for_generation, family_for_latent_caching
from kandinsky.files import KandinskyFiles, load_dit, read_audio_vae, read_dit_header, select_task
from kandinsky.model_6 import Kandinsky6Model
from kandinsky.options import (
    KandinskyDecodingOptions,
    KandinskyGenerationOptions,
    KandinskyLatentCachingOptions,
)
from modules.errors import CheckpointError, OptionError
from protocols.loading import Placement
from protocols.requests import Request
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.manifests import tensor_list, write_hollow
from tests.tiny.dit_files import draw_state, write_dialect
from tests.tiny.families import family_called
from tests.tiny.kandinsky import tiny_state as state_of_5
from tests.tiny.kandinsky_6 import (
    CONFIG,
    TinyKandinsky6,
    make_audio_vae,
    tiny_state,
    to_diffusers,
    write_release,
    write_sound,
    write_tiny_kandinsky_6,
)
from tests.tiny.project import write_image

TASK = "k6-lite-5s"
CPU = Placement(torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyKandinsky6:
    return write_tiny_kandinsky_6(tmp_path_factory.mktemp("model"))


def describe(files: TinyKandinsky6, task: str | None = TASK, **paths: Path | None) -> Kandinsky6:
    vae = KandinskyDecodingOptions(
        audio_vae=paths.get("audio_vae", files.audio_vae), vocoder=paths.get("vocoder", files.vocoder)
    )
    options = KandinskyGenerationOptions(task=task, dit=paths.get("dit", files.dit), vae=vae)
    family = family_for_generation(options)
    assert isinstance(family, Kandinsky6)
    return family


@pytest.mark.parametrize("dialect", ["safetensors", "sharded", "prefixed", "diffusers", "diffusers_sharded"])
def test_both_layouts_are_the_same_network(tmp_path: Path, dialect: str) -> None:
    path = write_dialect(tmp_path / "dit.safetensors", tiny_state(), dialect, to_diffusers)

    dit = load_dit(path, CPU)

    assert dit.config == CONFIG
    for name, tensor in tiny_state().items():
        assert torch.equal(dit.get_parameter(name), tensor), name


def test_a_release_is_found_below_its_folder(tmp_path: Path) -> None:
    write_release(tmp_path / "Kandinsky-6.0-Lite-5s-Diffusers")

    task = select_task(None, tmp_path / "Kandinsky-6.0-Lite-5s-Diffusers")

    assert task.name == TASK


@pytest.mark.parametrize("layout", ["", "-diffusers"])
@pytest.mark.parametrize(("size", "modules"), [("lite", 920), ("pro", 1728)])
def test_released_files_have_their_task_and_modules(
    tmp_path: Path, size: str, layout: str, modules: int
) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", tensor_list(f"kandinsky6-{size}-dit{layout}"))

    with open_checkpoint(path) as checkpoint:
        config = read_dit_header(checkpoint).config

    assert select_task(None, path).name == f"k6-{size}-5s"
    KandinskyFiles(path, task=TASKS[f"k6-{size}-5s"]).check_task()
    per_block, per_text_block = 28, 6
    assert per_block * config.num_layers + 2 * per_text_block * config.text_layers == modules


def test_a_network_distilled_with_piflow_is_refused_by_its_shape(tmp_path: Path) -> None:
    state = tiny_state()
    for name, rows in (("out_layer.out_layer", 640), ("audio_outLayer.out_layer", 400)):
        state[f"{name}.weight"] = torch.zeros(rows, state[f"{name}.weight"].shape[1])
        state[f"{name}.bias"] = torch.zeros(rows)
    save_file(to_diffusers(state), tmp_path / "dit.safetensors")

    with pytest.raises(CheckpointError, match="distilled with PiFlow: its output is 10 predictions"):
        select_task(None, tmp_path / "dit.safetensors")


def test_tasks_and_files_of_5_and_6_are_told_apart(tmp_path: Path, files: TinyKandinsky6) -> None:
    five = tmp_path / "five.safetensors"
    save_file(state_of_5(), five)

    with pytest.raises(OptionError, match=r"makes clips without sound. Use --task k5-lite-t2v-5s-sd"):
        KandinskyFiles(five, task=TASKS[TASK]).check_task()
    with pytest.raises(OptionError, match=r"makes clips with sound. Use --task k6-lite-5s"):
        KandinskyFiles(files.dit, task=TASKS["k5-lite-t2v-5s-sd"]).check_task()
    with pytest.raises(OptionError, match=r"--audio_vae: --task k5-lite-t2v-5s-sd makes no sound"):
        KandinskyFiles(task=TASKS["k5-lite-t2v-5s-sd"], audio_vae=files.audio_vae).check_audio()


def test_without_types_of_tokens_a_clip_begins_freely(tmp_path: Path, files: TinyKandinsky6) -> None:
    write_image(tmp_path / "start.png", 32, 32)
    path = tmp_path / "dit.safetensors"
    save_file(tiny_state(num_token_types=0), path)
    family = describe(files, dit=path)

    family.prepare(Request("a cat", 1, 32, 32, 5))
    with pytest.raises(OptionError, match="no types of tokens"):
        family.prepare(Request("a cat", 1, 32, 32, 5, image_path=tmp_path / "start.png"))


def test_a_clip_has_sound_if_its_networks_are_given(files: TinyKandinsky6) -> None:
    prepared = describe(files).prepare(Request("a cat", 1))

    assert prepared.audio_video_shapes is not None
    assert prepared.audio_video_shapes.audio == (40, 218, 1)
    assert describe(files).prepare(Request("a cat", 1, frames=1)).audio_video_shapes is None
    silent = describe(files, audio_vae=None, vocoder=None)
    assert silent.prepare(Request("a cat", 1)).audio_video_shapes is None


def test_the_scale_of_sound_is_that_of_config_json(tmp_path: Path, files: TinyKandinsky6) -> None:
    audio_vae, _ = write_sound(tmp_path, scale=0.417)

    assert describe(files).metadata["ss_audio_scale"] == "0.5302"
    assert describe(files, audio_vae=audio_vae).metadata["ss_audio_scale"] == "0.417"
    assert describe(files).audio_identity != describe(files, audio_vae=audio_vae).audio_identity
    (audio_vae / "config.json").unlink()
    with pytest.raises(CheckpointError, match='has no "scaling_factor" above 0'):
        describe(files, audio_vae=audio_vae).files.check()


def test_mmaudios_own_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "v1-44.safetensors"
    state = make_audio_vae().vae.state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"before they were norm"):
        read_audio_vae(checkpoint)


def test_a_vocoder_of_other_spectrograms_is_refused(tmp_path: Path, files: TinyKandinsky6) -> None:
    shutil.copytree(files.audio_vae, tmp_path / "audio_vae")
    config = json.loads((tmp_path / "audio_vae" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "audio_vae" / "config.json").write_text(
        json.dumps({**config, "hop_length": 256}), encoding="utf-8"
    )

    with pytest.raises(OptionError, match="takes spectrograms of 16 bins, a frame for 512 samples"):
        describe(files, audio_vae=tmp_path / "audio_vae").files.check_audio()


def test_caching_without_an_audio_vae_says_so(
    files: TinyKandinsky6, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        family = family_for_latent_caching(KandinskyLatentCachingOptions.from_defaults(task=TASK))

    assert isinstance(family, Kandinsky6)
    assert family.audio is None
    assert "only the video of clips is cached" in caplog.text


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the caches of clips, of which every second has sound."""
    folder = tmp_path_factory.mktemp("project")
    family = family_called("kandinsky_6")
    family.prepare(folder)
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    return folder


STEPS = [
    "--max_train_steps",
    "1",
    "--output_dir",
    "out",
    "--output_name",
    "lora",
    "--max_data_loader_n_workers",
    "0",
]


def test_sound_that_was_cached_with_another_scale_is_refused(cached: Path) -> None:
    family = family_called("kandinsky_6")
    write_sound(cached / "other", scale=0.417)
    words = ["other/audio_vae" if word == "model/audio_vae" else word for word in family.train]

    code, said = run_here(*words, *STEPS, folder=cached)

    message = assert_one_message(code, said)
    assert "are scaled by 0.5302, but those of --audio_vae by 0.417" in message


@pytest.mark.slow
def test_clips_whose_sound_is_not_cached_train_the_video(cached: Path, tmp_path: Path) -> None:
    folder = tmp_path / "silent"
    shutil.copytree(cached, folder)
    for path in (folder / "cache").glob("*_audio.safetensors"):
        path.unlink()
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    text = text.replace(cached.as_posix(), folder.as_posix())
    (folder / "dataset.toml").write_text(text, encoding="utf-8")

    said = succeed_here(*family_called("kandinsky_6").train, *STEPS, "--seed", 1, folder=folder)

    assert "only the video is trained" in said
    lora: dict[str, Tensor] = load_file(folder / "out" / "lora.safetensors")
    learned = {name for name, tensor in lora.items() if "lora_up" in name and tensor.any()}
    only_audio = ("audio", "va_cross_attention", "av_cross_attention")
    assert learned
    assert not {name for name in learned if any(part in name for part in only_audio)}


def test_config_of_a_file_with_other_sizes_comes_from_its_tensors(tmp_path: Path) -> None:
    config = replace(CONFIG, num_layers=3, text_layers=1, audio_channels=20)
    save_file(draw_state(lambda: Kandinsky6Model(config), 0), tmp_path / "dit.safetensors")

    assert load_dit(tmp_path / "dit.safetensors", CPU).config == config
