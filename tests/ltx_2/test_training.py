"""Training LTX-2 with audio by its command lines: steps equal those computed with diffusers."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ltx2_cache_latents
from dataset.cache_files import tensor_name
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.ltx_2.release import TinyRelease, dit_config, write_release
from tests.ltx_2.test_model import in_diffusers
from tests.ltx_2.tiny_dit import dit_diffusers_state, dit_in_diffusers
from tests.parity.training import (
    RANK,
    SEED,
    Factors,
    Item,
    assert_step_of_all_weights,
    assert_steps_of_descent,
    changes_of_descent,
    descent,
    learning,
    noise_of,
    shuffled,
    stream,
    uniform_of,
)
from tests.sound_media import Track, write_media
from tests.tiny.project import write_dataset

RATE = 2.0
PLAIN = ("--timestep_sampling", "uniform", "--ltx2_first_frame_conditioning_p", 0)
# of attention, as --lora_target_preset t2v has it
ATTENTION = re.compile(r"attn\d?\.(to_[qkv]|to_out\.0)\.weight$")


@dataclass(frozen=True)
class Project:
    """A folder with caches of two clips with sound and a silent one, and the release that made them."""

    folder: Path
    release: TinyRelease

    @property
    def words(self) -> list[str]:
        return [*self.text_words, *self.release.vaes]

    @property
    def text_words(self) -> list[str]:
        return [*self.release.words, "--ltx2_mode", "av", "--dataset_config", "dataset.toml"]

    def train(self, *words: object, code: int = 0) -> str:
        command = [*self.words, "--network_module", "networks.lora_ltx2", "--network_dim", RANK]
        command += ["--lora_format", "known"]  # names that the computed tensors have
        found, said = run_here("ltx2_train_network.py", *command, *PLAIN, *words, folder=self.folder)
        assert found == code, said[-4000:]
        return said


def write_project(
    folder: Path,
    version: str = "2.3",
    batch_size: int = 3,
    audios: str = "ab",
    frames: int = 9,
    more: str = "",
) -> Project:
    """Write a release, clips a, b and c, and their caches. audios: clips that have some.

    more: keys of the dataset's table.
    """
    project = Project(folder, write_release(folder / "model", version))
    (folder / "clips").mkdir()
    for number, name in enumerate("abc"):
        tracks = [Track((0.04 + 0.1 * number,), loud=0.9)] if name in audios else []
        write_media(folder / "clips" / f"{name}.mp4", *tracks, frames=frames + 1 + number)
        (folder / "clips" / f"{name}.txt").write_text(f"a gray wall {name}", encoding="utf-8")
    write_dataset(folder, size=64, frames=str(frames), batch_size=batch_size, more=more)
    succeed_here("ltx2_cache_latents.py", *project.words, folder=folder)
    texts = ["ltx2_cache_text_encoder_outputs.py", *project.text_words, *project.release.texts]
    succeed_here(*texts, "--text_encoder_dtype", "float32", folder=folder)
    return project


@pytest.fixture(scope="module", params=["2.3", "2.0", "2.5"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return write_project(tmp_path_factory.mktemp("größe 2"), request.param)


@dataclass(frozen=True)
class Heard(Item):
    """An item with the text of its sound, frames a second, and its sound if it has some."""

    audio_text: Tensor = torch.zeros(0)
    fps: float = 0
    audio: Tensor | None = None


def read_items(folder: Path) -> list[Heard]:
    """What the caches hold, in the order of their names."""

    def tensor(path: Path, pattern: str) -> Tensor:
        (found,) = (value for name, value in load_file(path).items() if re.match(pattern, name))
        return found.float()

    items = []
    for path in sorted(folder.glob("*_ltx2.safetensors")):
        text = folder / f"{path.name.rsplit('_', 3)[0]}_ltx2_te.safetensors"
        heard = path.with_name(f"{path.stem}_audio.safetensors")
        with safe_open(path, "pt") as file:
            fps = float(file.metadata()["reelsmith_fps"])
        items.append(
            Heard(
                tensor(path, r"latents_\d"),
                tensor(text, "video_prompt_embeds"),
                audio_text=tensor(text, "audio_prompt_embeds"),
                fps=fps,
                audio=tensor(heard, "audio_latents") if heard.exists() else None,
            )
        )
    return items


def losses(dit: Any, batch: Sequence[Heard], step: int, given: int = 0) -> tuple[Tensor, Tensor]:
    """The losses of pictures and of sound. A clip without sound has its streams apart.

    given: latent frames in front without noise, at the time 0 and out of the loss. diffusers would gate the
    sound's way to their tokens by that time too; the release does so by the noise level of the sound.
    """
    sigmas, noise = uniform_of(batch, step).float(), noise_of(batch, step)
    (shape,) = {one.audio.shape for one in batch if one.audio is not None}
    of_audio = torch.randn(len(batch), *shape, generator=stream(SEED, "sound", step))
    found = []
    for place, item in enumerate(batch):
        audio = torch.zeros(shape) if item.audio is None else item.audio
        clean, drawn = (item.latents, audio), (noise[place], of_audio[place])
        sigma = sigmas[place]
        mixed = [(1 - sigma) * one + sigma * other for one, other in zip(clean, drawn, strict=True)]
        mixed[0][:, :given] = item.latents[:, :given]
        time = 1000 * sigma.view(1)
        times = time.repeat(item.latents[0].numel()).view(1, len(item.latents[0]), -1)  # of each token
        times[:, :given] = 0
        inputs = {
            **{"noisy": mixed[0][None], "audio": mixed[1][None], "timesteps": time, "audio_timesteps": time},
            **{"text": item.text[None], "audio_text": item.audio_text[None], "fps": item.fps},
        }
        gate = dit.av_cross_attn_video_a2v_gate.register_forward_pre_hook(lambda *_, time=time: (time,))
        made = in_diffusers(dit, inputs, timestep=times.flatten(1), isolate_modalities=item.audio is None)
        gate.remove()
        errors = [
            (one[0] - (other - full)).square() for one, other, full in zip(made, drawn, clean, strict=True)
        ]
        of_audio_here = errors[1].mean() * (item.audio is not None)
        found.append(torch.stack([errors[0][:, given:].mean(), of_audio_here]))
    image, heard = torch.stack(found).mean(0)
    return image, heard


def told(project: Project, name: str = "lora") -> list[dict[str, float]]:
    """The losses of both streams, of each step."""
    history = (project.folder / "out" / f"{name}-history.jsonl").read_text(encoding="utf-8")
    return [row["experts"] for row in map(json.loads, history.splitlines()) if "experts" in row]


@pytest.mark.slow_cases("2.0-all is noisy", "2.3-all is noisy", "2.5-all is noisy")
@pytest.mark.parametrize("given", [0, 1], ids=["all is noisy", "the first frame is given"])
def test_two_steps_with_sound_equal_those_computed_with_diffusers(project: Project, given: int) -> None:
    project.train(*descent(RATE), "--ltx2_first_frame_conditioning_p", given)

    there = project.release.networks
    items, state = read_items(project.folder / "cache"), there["state"]
    assert [one.audio is not None for one in items] == [True, True, False]
    paths = [name.removesuffix(".weight") for name in state if ATTENTION.search(name)]
    parts = {  # its name there
        path.replace(".", "_"): [name.removesuffix(".weight")]
        for path in paths
        for name in dit_diffusers_state({f"{path}.weight": state[f"{path}.weight"]})
    }
    expected = []

    def gradients(factors: Factors, step: int) -> Factors:
        dit = dit_in_diffusers(there["version"], state, config=dit_config(there["version"]))
        with learning(dit, parts, factors) as found:
            both = losses(dit, shuffled(items, step), step, given)
            sum(both).backward()
        expected.append([float(one.detach()) for one in both])
        return found()

    assert_steps_of_descent(project.folder / "out", parts, RATE, gradients, "LTX-2")
    assert [list(row) for row in told(project)] == [["video", "audio"]] * 2
    measured = torch.tensor([list(row.values()) for row in told(project)])
    torch.testing.assert_close(measured, torch.tensor(expected), atol=0, rtol=1e-4)


@pytest.mark.slow_cases("2.0", "2.5")
def test_a_step_of_all_weights_equals_that_of_diffusers(project: Project) -> None:
    """Of both streams, from the release's file, whose names the trained file has."""
    step = [*descent(RATE, steps=1), *PLAIN, "--output_name", "whole"]
    step = step[step.index("--output_dir") :]  # behind the alpha of LoRAs
    succeed_here("ltx2_train.py", *project.words, *step, folder=project.folder)

    there = project.release.networks
    dit = dit_in_diffusers(there["version"], there["state"], config=dit_config(there["version"]))
    dit.requires_grad_(True)
    before = {name: weight.detach().clone() for name, weight in dit.named_parameters()}
    both = losses(dit, shuffled(read_items(project.folder / "cache"), 0), 0)
    changes = changes_of_descent(dit, sum(both, torch.zeros(())), RATE)
    trained = saved(project, "whole")
    connectors = {name for name in trained if "embeddings_connector." in name}
    assert trained.keys() == there["state"].keys() | connectors
    after = dit_diffusers_state({name: trained[name] for name in there["state"]})
    assert_step_of_all_weights(before, after, changes, f"LTX-{there['version']}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Each clip is a batch, only a has sound. A LoRA was trained for four steps."""
    project = write_project(tmp_path_factory.mktemp("größe 1"), batch_size=1, audios="a")
    (project.folder / "prompts.txt").write_text("a cat --w 64 --h 64 --f 9 --s 2 --d 1\n", encoding="utf-8")
    project.train(*run("lora", 4), "--save_every_n_steps", 1, "--save_state", *samples(project))
    return project


def run(name: str, steps: int) -> list[object]:
    """Options of AdamW, whose momentum and decay move weights without a gradient."""
    optimizer = ["--optimizer_type", "adamw", "--optimizer_args", "weight_decay=0.1"]
    optimizer += ["--learning_rate", 0.1, "--seed", SEED, "--max_data_loader_n_workers", 0]
    return [*optimizer, "--output_dir", "out", "--output_name", name, "--max_train_steps", steps]


def samples(project: Project) -> list[object]:
    """Options that make a sample of the last of some steps."""
    prompts = ["--sample_prompts", "prompts.txt", *project.release.texts]
    return [*prompts, "--sample_every_n_steps", 4]


def saved(project: Project, name: str) -> dict[str, Tensor]:
    return load_file(project.folder / "out" / f"{name}.safetensors")


@pytest.mark.slow
def test_steps_without_sound_leave_its_weights_as_they_are(alone: Project) -> None:
    hears = [list(row) == ["video", "audio"] for row in told(alone)]
    states = [saved(alone, f"lora-step{step:08d}") for step in range(1, 5)]

    moved = [
        {key.partition("audio")[1] for key in before if not torch.equal(before[key], after[key])}
        for before, after in zip(states, states[1:], strict=False)
    ]

    assert sum(hears[:3]) == 1  # of an epoch
    assert (True, False) in zip(hears, hears[1:], strict=False)  # momentum would move them
    assert moved == [{"", "audio"} if one else {""} for one in hears[1:]]


@pytest.mark.slow_cases("a2v-audio")
@pytest.mark.parametrize(("direction", "given"), [("v2a", "video"), ("a2v", "audio")])
def test_a_direction_learns_one_stream(alone: Project, direction: str, given: str) -> None:
    alone.train(*run(direction, 3), "--ltx2_train_direction", direction)

    rows = [row for row in told(alone, direction) if "audio" in row]
    assert [[stream for stream, loss in row.items() if loss] for row in rows] == [
        [stream for stream in ("video", "audio") if stream != given]
    ]


def test_video_alone_has_no_weights_of_sound(alone: Project) -> None:
    alone.train(*run("silent", 1), "--ltx2_mode", "video")

    ours, both = saved(alone, "silent"), saved(alone, "lora")
    assert ours.keys() == {name for name in both if "audio" not in name} < both.keys()


@pytest.mark.parametrize("words", [["--lora_target_preset", "v2v"], ["--ic_lora_ref_probability", 0.5], []])
def test_a_training_for_references_says_that_there_are_none(alone: Project, words: list[object]) -> None:
    said = alone.train(*run("none", 1), "--ltx2_mode", "video", *words)
    assert ("nothing has a reference: this trains on texts alone" in said) == bool(words)


def test_swapped_blocks_learn_the_same(alone: Project) -> None:
    alone.train(*run("other", 4), "--blocks_to_swap", 1)

    ours, full = saved(alone, "other"), saved(alone, "lora")
    assert all(torch.equal(ours[name], full[name]) for name in full)


def test_samples_are_silent_if_asked(alone: Project) -> None:
    alone.train(*run("quiet", 4), *samples(alone), "--sample_disable_audio")
    (path,) = (alone.folder / "out" / "sample").glob("quiet*.mp4")
    with av.open(str(path)) as container:
        assert not container.streams.audio


def test_texts_of_another_release_are_refused_and_made_again(alone: Project, tmp_path: Path) -> None:
    """Caching keeps none, even if it is to skip what is there; latents stay: both releases have the same."""
    other = write_release(tmp_path, "2.5")
    kept = shutil.copytree(alone.folder / "cache", tmp_path / "kept")
    new = Project(alone.folder, other)
    texts = ["ltx2_cache_text_encoder_outputs.py", *new.text_words, *other.texts, "--skip_existing"]
    try:
        said = new.train(*run("mixed", 1), code=1)
        assert_one_message(1, said, r"LTX-2.3 or 2.0 (Gemma 3)", "is of LTX-2.5. Cache again with")
        succeed_here(*texts, "--text_encoder_dtype", "float32", folder=alone.folder)
        new.train(*run("new", 1))
        silent = [
            "ltx2_train_network.py",
            *other.words,
            "--dataset_config",
            "dataset.toml",
            *run("silent", 1),
        ]
        succeed_here(*silent, "--network_module", "networks.lora_ltx2", folder=alone.folder)  # needs no VAE
        said = alone.train(*run("mixed", 1), code=1)
        assert_one_message(1, said, "LTX-2.5 (Gemma 4)", "is of LTX-2.3. Cache again with")
    finally:
        shutil.rmtree(alone.folder / "cache")
        shutil.move(kept, alone.folder / "cache")


def test_a_dataset_without_any_sound_is_refused(alone: Project) -> None:
    (path,) = (alone.folder / "cache").glob("*_audio.safetensors")
    path.rename(path.with_suffix(".away"))
    try:
        said = alone.train(*run("none", 1), code=1)
    finally:
        path.with_suffix(".away").rename(path)
    assert_one_message(1, said, "no clip of the dataset has cached audio", "--ltx2_mode video")


@pytest.mark.slow
def test_sound_comes_from_files_if_the_command_says_so(alone: Project, tmp_path: Path) -> None:
    """From a folder, or from beside the clips; as audio_directory in the table says it."""
    tracks = Track((0.2,), loud=0.5, codec="pcm_s16le")
    (alone.folder / "sounds").mkdir()
    write_media(alone.folder / "sounds" / "a.wav", tracks, frames=0)
    text = (alone.folder / "dataset.toml").read_text(encoding="utf-8")
    found = []
    for number, (words, more) in enumerate(
        (
            ([], ""),
            ([], 'audio_directory = "sounds"'),
            (["--ltx2_audio_source", "audio_files", "--ltx2_audio_dir", "sounds"], ""),
            (["--ltx2_audio_source", "audio_files"], ""),
        )
    ):
        if number == 3:
            shutil.copy(alone.folder / "sounds" / "a.wav", alone.folder / "clips" / "a.wav")
        cache = alone.folder / f"sounding {number}"
        changed = text.replace('/cache"', f'/sounding {number}"') + f"\n{more}\n"
        (alone.folder / "sounds.toml").write_text(changed, encoding="utf-8")
        command = [*alone.release.words, "--ltx2_mode", "av", "--dataset_config", "sounds.toml", *words]
        succeed_here("ltx2_cache_latents.py", *command, folder=alone.folder)
        (path,) = cache.glob("*_audio.safetensors")
        found.append(next(one for name, one in load_file(path).items() if name.startswith("audio_latents")))
    (alone.folder / "clips" / "a.wav").unlink()

    own, table, folder, beside = found
    assert torch.equal(folder, table)
    assert torch.equal(beside, table)
    assert not torch.equal(own, table)


@pytest.mark.slow_cases("2.3")
@pytest.mark.parametrize("project", ["2.3"], indirect=True)
def test_sound_that_caching_left_out_is_told_of(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is behind a kill between a clip's latents and its sound."""
    monkeypatch.chdir(project.folder)
    first = sorted((project.folder / "cache").glob("*_audio.safetensors"))[0]
    first.rename(first.with_suffix(".away"))
    try:
        said = project.train(*run("away", 1))
        with pytest.raises(SystemExit):
            ltx2_cache_latents.main([*project.words, "--check"])
    finally:
        first.with_suffix(".away").rename(first)
    assert said.count("1 clip with sound that is not cached") == 1
    assert "caches of sound: 1 files are valid, 1 item needs encoding" in capsys.readouterr().out
    assert "that is not cached" not in project.train(*run("there", 1))


@pytest.mark.slow
def test_lengths_are_rounded_down_by_the_step_of_the_model(alone: Project) -> None:
    text = (alone.folder / "dataset.toml").read_text(encoding="utf-8")
    other = text.replace("target_frames = [9]", "target_frames = [1, 14]").replace('/cache"', '/cache 2"')
    assert {"[1, 14]" in other, "cache 2" in other} == {True}
    (alone.folder / "other.toml").write_text(other, encoding="utf-8")
    words = [*alone.release.words, "--dataset_config", "other.toml"]

    said = succeed_here("ltx2_cache_latents.py", *words, folder=alone.folder)

    assert "target_frames [1, 14] become [1, 9], because clips of this model have 8n + 1 frames" in said
    found = {path.name.split("_")[1] for path in (alone.folder / "cache 2").glob("*.safetensors")}
    assert found == {"00000-001", "00000-009"}


@pytest.mark.slow
def test_caches_of_other_programs_are_of_25_frames_a_second(alone: Project, tmp_path: Path) -> None:
    """As the fork leaves them: neither a record nor a rate. 24 frames a second would learn another LoRA."""

    def train(name: str, rate: float | None) -> tuple[str, dict[str, Tensor]]:
        for path in (alone.folder / "cache").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                metadata = {key: text for key, text in file.metadata().items() if "reelsmith" not in key}
            tensors = {key: tensor for key, tensor in load_file(path).items() if "reelsmith_fps" not in key}
            of_latents = any(key.startswith("latents_") for key in tensors)
            if rate is not None and of_latents:
                key = tensor_name("reelsmith_fps", torch.tensor(rate))
                tensors, metadata = (
                    {**tensors, key: torch.tensor(rate)},
                    {**metadata, "reelsmith_fps": str(rate)},
                )
            save_file(tensors, path, metadata)
        said = alone.train(*run(name, 2), "--ltx2_mode", "video")
        return said, saved(alone, name)

    kept = shutil.copytree(alone.folder / "cache", tmp_path / "kept")
    try:
        (said, theirs), (told_so, at_25), (_, at_24) = (
            train(f"rate{number}", rate) for number, rate in enumerate((None, 25.0, 24.0))
        )
    finally:
        shutil.rmtree(alone.folder / "cache")
        kept.rename(alone.folder / "cache")
    warning = "does not record its frame rate: 25 frames per second are assumed"
    assert (said.count(warning), told_so.count(warning)) == (1, 0)
    assert all(torch.equal(theirs[name], at_25[name]) for name in at_25)
    assert not all(torch.equal(at_24[name], at_25[name]) for name in at_25)


@pytest.mark.slow
def test_fused_steps_without_sound_leave_its_weights_as_they_are(alone: Project) -> None:
    plain = [*PLAIN, "--max_grad_norm", 0]
    for name, words in (("plain", []), ("fused", ["--fused_backward_pass"])):
        succeed_here("ltx2_train.py", *alone.words, *run(name, 3), *plain, *words, folder=alone.folder)

    plain_weights, fused = saved(alone, "plain"), saved(alone, "fused")
    assert all(torch.equal(plain_weights[name], fused[name]) for name in fused)
