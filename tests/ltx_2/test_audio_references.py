"""Sound that LTX-2's sound is made after: steps and results equal those computed with diffusers."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2ConditionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ltx_2.audio import AudioVae
from ltx_2.audio_reference_options import Ltx2GivenAudioReference
from ltx_2.audio_references import resolve_reference_positions
from modules.errors import OptionError
from modules.media.samples import read_track
from protocols.data import AUDIO_LATENTS
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.ltx_2 import test_family as pipelines
from tests.ltx_2.release import TinyRelease, dit_config, write_release
from tests.ltx_2.test_given_media import SHAPE, call
from tests.ltx_2.test_model import in_diffusers
from tests.ltx_2.test_references import write_lora
from tests.ltx_2.test_training import RATE, Heard, Project, read_items, run, told, write_project
from tests.ltx_2.tiny_dit import dit_diffusers_state, dit_in_diffusers
from tests.parity.running import assert_equal
from tests.parity.training import (
    SEED,
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    noise_of,
    shuffled,
    stream,
    uniform_of,
)
from tests.sound_media import Track, write_media
from tests.tiny.project import write_image

# modules of the preset, by their names in diffusers' and our blocks
LEARNED = re.compile(
    r"\.(?:(?:audio_attn[12]|audio_to_video_attn|video_to_audio_attn)\.(?:to_[qkv]|to_out\.0)"
    r"|audio_ff\.net\.(?:0\.proj|2))\.weight$"
)
# those of presets with clips as references
ALL_LEARNED = re.compile(
    r"(?:attn\d?|to_video_attn|to_audio_attn)\.(?:to_[qkv]|to_out\.0)\.weight$|ff\.net\.(?:0\.proj|2)\.weight$"
)
STEP = 0.04  # seconds of a latent
SWITCHES = (
    "--audio_ref_use_negative_positions",
    "--audio_ref_mask_cross_attention_to_reference",
    "--audio_ref_mask_reference_from_text_attention",
)


def write_voices(folder: Path, names: str = "abc", seconds: float = 0.2) -> None:
    """Write a sound of 5 latents for each name; clips of 9 frames have 9."""
    folder.mkdir()
    for number, name in enumerate(names):
        track = Track((0.05 + 0.04 * number,), seconds=seconds, loud=0.8, codec="pcm_s16le")
        write_media(folder / f"{name}.wav", track, frames=0)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three clips with sound, and a voice for each."""
    folder = tmp_path_factory.mktemp("größe 4")
    write_voices(folder / "voices")
    keys = f'reference_audio_directory = "{(folder / "voices").as_posix()}"\n'
    keys += 'reference_audio_cache_directory = "nowhere"'  # as in tables of the known fork
    return write_project(folder, audios="abc", more=keys)


def read_voices(folder: Path) -> list[Tensor]:
    """The references in caches, C T M each, in the order of their names."""
    voices = []
    for path in sorted(folder.glob("*_ltx2_audio.safetensors")):
        (found,) = (one for name, one in load_file(path).items() if name.startswith("reference_audio"))
        voices.append(found.float())
    return voices


@contextmanager
def hiding(dit: Any, count: int, length: int, time: Tensor, hides: bool) -> Iterator[None]:
    """Hide references, the last tokens of `length` of sound, from the video and from the text.

    Both gates between the streams go by the noise level of the other stream, as in the release.
    """

    def hide_keys(_: Any, words: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = torch.zeros(1, 1, length)
        mask[..., count:] = -torch.inf
        return words, {**given, "attention_mask": mask}

    def see_nothing(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        keeps = torch.arange(length) < count
        return (inputs[0] * keeps[:, None],)

    with ExitStack() as stack:
        gates = dit.av_cross_attn_video_a2v_gate, dit.av_cross_attn_audio_v2a_gate
        handles = [gate.register_forward_pre_hook(lambda *_: (time,)) for gate in gates]
        for block in dit.transformer_blocks if hides else ():
            handles.append(block.audio_to_video_attn.register_forward_pre_hook(hide_keys, with_kwargs=True))
            handles.append(block.audio_attn2.to_out[0].register_forward_pre_hook(see_nothing))
        for handle in handles:
            stack.callback(handle.remove)
        yield


def coordinates(dit: Any, count: int, others: int, ends_before_audio: bool) -> Tensor:
    """Seconds in which `count` latents of sound begin and end, and the `others` of its voice after them."""
    cpu = torch.device("cpu")
    own, of_voice = (dit.audio_rope.prepare_audio_coords(1, number, cpu) for number in (count, others))
    if ends_before_audio:
        of_voice = of_voice - of_voice[..., -1, 1] - STEP
    return torch.cat([own, of_voice], dim=2)


def see_voice(
    dit: Any, inputs: dict[str, Any], voice: Tensor, ends_before_audio: bool, hides: bool = False, **more: Any
) -> tuple[Tensor, Tensor]:
    """The velocities of a clip, 1 ..., with a voice behind its sound: clean, at the time 0.

    ends_before_audio: the voice ends one latent before the sound begins; else both begin at 0.
    """
    count, others = inputs["audio"].shape[2], voice.shape[1]
    both = {**inputs, "audio": torch.cat([inputs["audio"], voice[None]], dim=2)}
    time = inputs["timesteps"]
    times = torch.cat([time.expand(count), torch.zeros(others)])[None]
    with hiding(dit, count, count + others, time, hides):
        image, audio = in_diffusers(
            dit,
            both,
            audio_timestep=times,
            audio_coords=coordinates(dit, count, others, ends_before_audio),
            **{"timestep": time.expand(inputs["noisy"][0, 0].numel())[None], **more},
        )
    return image, audio[:, :, :count]


def losses(
    dit: Any,
    batch: Sequence[Heard],
    voices: Sequence[Tensor],
    step: int,
    ends_before_audio: bool,
    hides: bool,
    see: Callable[..., tuple[Tensor, Tensor]] = see_voice,
) -> tuple[Tensor, Tensor]:
    """The losses of images and of the sound, without that of voices.

    see: how the network sees a clip with its voice.
    """
    sigmas, noise = uniform_of(batch, step).float(), noise_of(batch, step)
    assert batch[0].audio is not None
    of_audio = torch.randn(len(batch), *batch[0].audio.shape, generator=stream(SEED, "sound", step))
    found = []
    for place, (item, voice) in enumerate(zip(batch, voices, strict=True)):
        assert item.audio is not None
        sigma = sigmas[place]
        drawn, clean = (noise[place], of_audio[place]), (item.latents, item.audio)
        mixed = [(1 - sigma) * one + sigma * other for one, other in zip(clean, drawn, strict=True)]
        time = 1000 * sigma.view(1)
        inputs = {
            **{"noisy": mixed[0][None], "audio": mixed[1][None], "timesteps": time, "audio_timesteps": time},
            **{"text": item.text[None], "audio_text": item.audio_text[None], "fps": item.fps},
        }
        made = see(dit, inputs, voice, ends_before_audio, hides)
        errors = [
            (one[0] - (other - full)).square().mean()
            for one, other, full in zip(made, drawn, clean, strict=True)
        ]
        found.append(torch.stack(errors))
    image, heard = torch.stack(found).mean(0)
    return image, heard


@pytest.mark.slow_cases("beside")
@pytest.mark.parametrize("hides", [True, False], ids=["before and hidden", "beside"])
def test_two_steps_with_a_voice_equal_those_computed_with_diffusers(project: Project, hides: bool) -> None:
    words = ["--lora_target_preset", "audio_ref_ic", *(SWITCHES if hides else ())]
    project.train(*descent(RATE), *words)

    there = project.release.networks
    items, state = read_items(project.folder / "cache"), there["state"]
    cached = read_voices(project.folder / "cache")
    voices = {id(item): voice for item, voice in zip(items, cached, strict=True)}
    assert {one.shape[1] for one in voices.values()} == {5}
    paths = [name.removesuffix(".weight") for name in state if LEARNED.search(name)]
    parts = {
        path.replace(".", "_"): [name.removesuffix(".weight")]
        for path in paths
        for name in dit_diffusers_state({f"{path}.weight": state[f"{path}.weight"]})
    }
    expected = []

    def gradients(factors: Factors, step: int) -> Factors:
        dit = dit_in_diffusers(there["version"], state, config=dit_config(there["version"]))
        batch = shuffled(items, step)
        with learning(dit, parts, factors) as found:
            both = losses(dit, batch, [voices[id(one)] for one in batch], step, hides, hides)
            (both[0] + both[1]).backward()
        expected.append([float(one.detach()) for one in both])
        return found()

    assert_steps_of_descent(project.folder / "out", parts, RATE, gradients, "LTX-2")
    measured = torch.tensor([list(row.values()) for row in told(project)])
    torch.testing.assert_close(measured, torch.tensor(expected), atol=0, rtol=1e-4)
    with safe_open(project.folder / "out" / "lora.safetensors", "pt") as file:
        assert file.metadata()["audio_ref_use_negative_positions"] == ("true" if hides else "false")


def see_clip_and_voice(
    dit: Any, inputs: dict[str, Any], given: tuple[Tensor, Tensor], ends_before_audio: bool, hides: bool
) -> tuple[Tensor, Tensor]:
    """The velocities of a clip with a clean clip behind its images, and a voice, maybe of length 0."""
    reference, voice = given
    noisy, time = inputs["noisy"], inputs["timesteps"]
    count, size = noisy[0, 0].numel(), {"device": "cpu", "fps": inputs["fps"]}
    coords = [dit.rope.prepare_video_coords(1, *one.shape[-3:], **size) for one in (noisy, reference)]

    def cut(_: Any, __: Any, made: Any) -> Any:
        made.sample = made.sample[:, :count]
        return made

    handle = dit.register_forward_hook(cut)
    try:
        return see_voice(
            dit,
            inputs,
            voice,
            ends_before_audio,
            hides,
            hidden_states=torch.cat([noisy[0].flatten(1).T, reference.flatten(1).T])[None],
            timestep=torch.cat([time.expand(count), torch.zeros(reference[0].numel())])[None],
            video_coords=torch.cat(coords, dim=2),
        )
    finally:
        handle.remove()


def read_clip_references(folder: Path) -> list[Tensor]:
    """The reference clips in caches, C F H W each, in the order of their names."""
    stored = [load_file(path) for path in sorted(folder.glob("*_ltx2.safetensors"))]
    return [
        next(one.float() for name, one in tensors.items() if name.startswith("latents_reference_0_"))
        for tensors in stored
    ]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["av_ic", "video_ref_only_av"])
def test_two_steps_with_clips_as_references_equal_those_computed_with_diffusers(
    tmp_path: Path, strategy: str
) -> None:
    write_voices(tmp_path / "voices")
    (tmp_path / "references").mkdir()
    for number, name in enumerate("abc"):
        write_media(tmp_path / "references" / f"{name}.mp4", frames=20 - number)
    keys = f'reference_directory = "{(tmp_path / "references").as_posix()}"\n'
    if strategy == "av_ic":
        keys += f'reference_audio_directory = "{(tmp_path / "voices").as_posix()}"'
    project = write_project(tmp_path, audios="abc", more=keys)

    project.train(*descent(RATE), "--lora_target_preset", strategy)

    there = project.release.networks
    items, state = read_items(project.folder / "cache"), there["state"]
    if strategy == "av_ic":
        voices = read_voices(project.folder / "cache")
    else:
        voices = [item.audio[:, :0] for item in items if item.audio is not None]
    pairs = zip(read_clip_references(project.folder / "cache"), voices, strict=True)
    references = {id(item): pair for item, pair in zip(items, pairs, strict=True)}
    paths = [name.removesuffix(".weight") for name in state if ALL_LEARNED.search(name)]
    parts = {
        path.replace(".", "_"): [name.removesuffix(".weight")]
        for path in paths
        for name in dit_diffusers_state({f"{path}.weight": state[f"{path}.weight"]})
    }

    def gradients(factors: Factors, step: int) -> Factors:
        dit = dit_in_diffusers(there["version"], state, config=dit_config(there["version"]))
        batch = shuffled(items, step)
        with learning(dit, parts, factors) as found:
            given: Any = [references[id(item)] for item in batch]
            images, heard = losses(dit, batch, given, step, False, False, see_clip_and_voice)
            (images + heard).backward()
        return found()

    assert_steps_of_descent(project.folder / "out", parts, RATE, gradients, "LTX-2")


@pytest.mark.slow
def test_two_steps_of_sound_alone_with_a_voice_equal_those_computed_with_diffusers(tmp_path: Path) -> None:
    release = write_release(tmp_path / "model")
    write_voices(tmp_path / "bells", "ab", seconds=1.5)
    write_voices(tmp_path / "voices", "ab")
    for name in "ab":
        (tmp_path / "bells" / f"{name}.txt").write_text(f"a bell {name}", encoding="utf-8")
    table = '[[datasets]]\naudio_directory = "bells"\ncache_directory = "cache"\nmax_frames = 33\n'
    table += 'caption_extension = ".txt"\nbatch_size = 2\nreference_audio_directory = "voices"\n'
    (tmp_path / "bells.toml").write_text(table, encoding="utf-8")
    words = ["--ltx2_mode", "audio", "--dataset_config", "bells.toml"]
    succeed_here("ltx2_cache_latents.py", *release.words, *words, folder=tmp_path)
    texts = ["ltx2_cache_text_encoder_outputs.py", *release.words, *words, *release.texts]
    succeed_here(*texts, "--text_encoder_dtype", "float32", folder=tmp_path)

    Project(tmp_path, release).train(*descent(RATE), *words, "--lora_target_preset", "audio_ref_ic")

    there = release.networks
    sounds, captions = (
        [load_file(path) for path in sorted((tmp_path / "cache").glob(f"*_ltx2_{end}.safetensors"))]
        for end in ("audio", "te")
    )
    audios = [next(one.float() for name, one in file.items() if name.startswith("audio")) for file in sounds]
    embeds = [next(one for name, one in file.items() if name.startswith("audio_prompt")) for file in captions]
    parts_of_items = zip(audios, embeds, read_voices(tmp_path / "cache"), strict=True)
    items = [Item(audio, text.float(), extra=voice) for audio, text, voice in parts_of_items]
    paths = [name.removesuffix(".weight") for name in there["state"] if LEARNED.search(name)]
    parts = {
        path.replace(".", "_"): [path] for path in paths if ".audio_" in path and "_to_video_attn" not in path
    }

    def gradients(factors: Factors, step: int) -> Factors:
        dit = dit_in_diffusers(there["version"], there["state"], config=dit_config(there["version"]))
        sigmas = torch.rand(2, generator=stream(SEED, "sound timesteps", step), dtype=torch.float64).float()
        noise = torch.randn(2, *audios[0].shape, generator=stream(SEED, "sound", step))
        with learning(dit, parts, factors) as found:
            for item, sigma, drawn in zip(shuffled(items, step), sigmas, noise, strict=True):
                audio, time = item.latents, 1000 * sigma.view(1)
                inputs = {
                    **{"noisy": torch.zeros(1, 16, 1, 1, 1), "text": torch.zeros(1, 1, 24), "fps": 25},
                    **{"timesteps": time, "audio_timesteps": time, "audio_text": item.text[None]},
                    "audio": ((1 - sigma) * audio + sigma * drawn)[None],
                }
                assert item.extra is not None  # its voice
                _, made = see_voice(dit, inputs, item.extra, False, isolate_modalities=True)
                ((made[0] - (drawn - audio)).square().mean() / 2).backward()
        return found()

    assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients, "sound alone")


def expect_with_voice(
    pipe: Any, voice: Tensor, ends_before_audio: bool, scale: float, length: int
) -> tuple[Tensor, Tensor]:
    """The latents of diffusers' loop, in which each pass sees a voice, C T M, and identity guidance is added.

    length: of the sound. The gates of attention between the streams follow the noise level of the clip, as in
    the released code.
    """
    generator = torch.Generator().manual_seed(pipelines.SEED)
    image = torch.randn(1, 16, *SHAPE, generator=generator)
    channels, others, bins = voice.shape
    start = pipe._pack_audio_latents(torch.randn(1, channels, length, bins, generator=generator))
    tokens = pipe._pack_audio_latents(voice[None])
    coords = coordinates(pipe.transformer, length, others, ends_before_audio)
    sees, times = [True], [torch.zeros(1)]
    last: dict[str, Any] = {}
    to_velocity = pipe.convert_x0_to_velocity

    def add_voice(_: Any, words: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch = len(given["sigma"])
        if batch == 2:  # without the prompt, and with it
            for name, one in given.items():
                is_of_both = isinstance(one, Tensor) and len(one) == 2
                last[name] = one[1:] if is_of_both else one
        times[0] = given["sigma"]
        time = given["audio_timestep"].view(batch, -1)[:, :1].expand(-1, length)
        if not sees[0]:
            own = coords[:, :, :length].expand(batch, -1, -1, -1)
            return words, {**given, "audio_timestep": time, "audio_coords": own}
        return words, {
            **given,
            "audio_hidden_states": torch.cat([given["audio_hidden_states"], tokens.expand(batch, -1, -1)], 1),
            "audio_timestep": torch.cat([time, torch.zeros(batch, others)], 1),
            "audio_coords": coords.expand(batch, -1, -1, -1),
        }

    def cut(_: Any, __: Any, made: Any) -> Any:
        parts = list(made)
        parts[1] = parts[1][:, :length]
        return tuple(parts)

    def add_identity(sample: Tensor, made: Tensor, step: int, scheduler: Any) -> Tensor:
        if scheduler is not pipe.scheduler and scale:  # that of the audio
            velocities = []
            for sees[0] in (True, False):
                velocities.append(pipe.transformer(**last)[1])
            sees[0] = True
            made = made - scale * scheduler.sigmas[step] * (velocities[0] - velocities[1])
        velocity: Tensor = to_velocity(sample, made, step, scheduler)
        return velocity

    pipe.prepare_latents = lambda *_, **__: (
        pipe._pack_latents(image, 1, 1),
        torch.zeros(1, torch.Size(SHAPE).numel(), 1),
        torch.zeros(1, torch.Size(SHAPE).numel(), 16),
        None,
    )
    pipe.prepare_audio_latents = lambda *_, **__: start
    pipe.convert_x0_to_velocity = add_identity
    pipe.transformer.register_forward_pre_hook(add_voice, with_kwargs=True)
    pipe.transformer.register_forward_hook(cut)
    for name in ("av_cross_attn_video_a2v_gate", "av_cross_attn_audio_v2a_gate"):
        gate = getattr(pipe.transformer, name)
        gate.register_forward_pre_hook(lambda *_: (times[0],))
    of_audio = {f"audio_{name}": one for name, one in SCALES.items()}
    latents, heard = call(pipe, use_cross_timestep=False, **SCALES, **of_audio)
    audio = pipe._normalize_audio_latents(
        pipe._pack_audio_latents(heard), pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std
    )
    audio = pipe._unpack_audio_latents(audio, heard.shape[2], heard.shape[3])
    vae = pipe.vae
    return pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std)[0], audio[0]


SCALES = {"guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.7}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("größe"))


@pytest.mark.slow_cases("beside")
@pytest.mark.parametrize(
    ("ends_before_audio", "scale"), [(True, 3.0), (False, 0.0)], ids=["identity", "beside"]
)
def test_sound_after_a_voice_equals_that_of_diffusers(
    release: TinyRelease, tmp_path: Path, ends_before_audio: bool, scale: float
) -> None:
    track = Track((0.05, 0.15), seconds=0.2, rate=16000, loud=0.8, codec="pcm_s16le")
    voice = write_media(tmp_path / "voice.wav", track, frames=0)
    words = ["--ltx2_mode", "av", *pipelines.scale_words(SCALES, SCALES), "--reference_audio", voice]
    lora = write_lora(
        tmp_path / "voice.safetensors", audio_ref_use_negative_positions=str(ends_before_audio).lower()
    )
    words += ["--lora_weight", lora]
    words += ["--audio_ref_identity_guidance_scale", scale] if scale else []

    made = pipelines.generate(release, tmp_path, *words, frames=17)

    pipe: Any = LTX2ConditionPipeline(**pipelines.theirs(release).components)
    pipe.set_progress_bar_config(disable=True)
    samples = read_track(voice, Fraction(0), 3200, 16000, 2)
    assert samples is not None
    encoded = AudioVae(release.networks["audio_vae"]).encode(torch.from_numpy(samples.copy())[None])[0, :, :5]
    latents, audio = expect_with_voice(pipe, encoded, ends_before_audio, scale, made[AUDIO_LATENTS].shape[1])
    assert_equal(made["latent"], latents, "images")
    assert_equal(made[AUDIO_LATENTS], audio, "sound")
    with safe_open(next((tmp_path / "made").iterdir()), "pt") as file:
        said = file.metadata()
    assert said["bt_reference_audio"] == "voice.wav"
    assert said.get("bt_audio_ref_identity_guidance_scale") == ("3" if scale else None)


def write_voice_project(folder: Path, **changes: Any) -> Project:
    """A project of which a and b have sound; c has none."""
    return write_project(
        folder, more=f'reference_audio_directory = "{(folder / "voices").as_posix()}"', **changes
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Clips a and b with sound, whose voices have different lengths, and c without; batches of two."""
    folder = tmp_path_factory.mktemp("größe 5")
    write_voices(folder / "voices", "a")
    write_voices(folder / "more", "b", seconds=0.3)
    (folder / "more" / "b.wav").rename(folder / "voices" / "b.wav")
    return write_voice_project(folder, batch_size=2)


def test_voices_of_different_lengths_are_in_batches_of_their_own(other: Project) -> None:
    said = other.train("--lora_target_preset", "audio_ref_ic", *run("lora", 3))

    assert [one.shape[1] for one in read_voices(other.folder / "cache")] == [5, 8]
    assert "3 items with repeats, 3 batches" in said
    assert sorted("audio" in row for row in told(other)) == [False, True, True]


@pytest.mark.slow
def test_a_training_that_is_resumed_learns_the_same_voices(other: Project) -> None:
    """Continued after two of four steps, it ends with the same weights, bit for bit; some see no voice."""
    words = ["--ic_lora_strategy", "audio_ref_only_ic", "--ic_lora_ref_probability", 0.5, *SWITCHES]
    words += [*descent(RATE, steps=4), "--save_state"]

    other.train(*words, "--output_dir", "whole")
    state = other.folder / "whole" / "lora-step00000002-state"
    other.train(*words, "--output_dir", "resumed", "--resume", state)
    other.train(*words[:2], *words[4:], "--output_dir", "always")

    names = ("whole", "resumed", "always")
    whole, resumed, always = (load_file(other.folder / name / "lora.safetensors") for name in names)
    assert all(torch.equal(one, resumed[name]) for name, one in whole.items())
    assert any(not torch.equal(one, always[name]) for name, one in whole.items())


@pytest.mark.slow
def test_samples_are_made_after_the_voice_of_their_line(other: Project) -> None:
    line = "a cat --w 64 --h 64 --f 9 --s 2 --d 1"
    lines = [line, f"{line} --ra voices/a.wav", f"{line} --ra voices/b.wav"]
    (other.folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ["--sample_prompts", "prompts.txt", *other.release.texts, "--sample_at_first"]
    words += ["--audio_ref_identity_guidance_scale", 2, "--lora_target_preset", "audio_ref_ic", *SWITCHES]

    other.train(*words, *run("lora", 1), "--output_dir", "shown")

    made = sorted((other.folder / "shown" / "sample").glob("lora_e000000_*.mp4"))
    assert len({path.read_bytes() for path in made}) == len(made) == 3


@pytest.mark.slow
def test_a_changed_voice_is_cached_again_and_nothing_else(other: Project) -> None:
    folder = other.folder
    before = read_voices(folder / "cache")
    latents = {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*_ltx2.safetensors")}
    kept = (folder / "voices" / "a.wav").read_bytes()
    try:
        track = Track((0.1,), seconds=0.2, loud=0.3, codec="pcm_s16le")
        write_media(folder / "voices" / "a.wav", track, frames=0)
        said = other.train("--lora_target_preset", "audio_ref_ic", *run("lora", 3), code=1)
        assert "a.wav has changed since it was encoded" in said
        succeed_here("ltx2_cache_latents.py", *other.words, folder=folder)
        changed = read_voices(folder / "cache")
    finally:
        (folder / "voices" / "a.wav").write_bytes(kept)
        succeed_here("ltx2_cache_latents.py", *other.words, folder=folder)

    assert [torch.equal(one, two) for one, two in zip(before, changed, strict=True)] == [False, True]
    assert latents == {path: path.stat().st_mtime_ns for path in latents}


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--ic_lora_strategy", "none"], ["this run takes no audio as reference"]),
        (["--ic_lora_strategy", "v2v"], ["this run takes no audio as reference"]),
        (["--ltx2_mode", "v"], ["this run does not train audio"]),
        (["--ltx2_mode", "v", "--lora_target_preset", "audio_ref_ic"], ["Pass --ltx2_mode av"]),
        (["--ltx2_mode", "audio", "--ic_lora_strategy", "av_ic"], ["Pass --ltx2_mode av"]),
        (
            ["--ic_lora_strategy", "av_ic"],
            ["--ic_lora_strategy av_ic needs a reference", "to reference_directory"],
        ),
        (
            ["--lora_target_preset", "audio_ref_ic", "--ltx2_train_direction", "a2v"],
            ["the audio is always clean"],
        ),
        (["--ic_lora_strategy", "video_ref_only_av"], ["takes no audio as reference"]),
        (["--av_multi_ref"], ["a clip has one audio reference"]),
    ],
)
def test_what_does_not_go_together_is_refused(
    other: Project, words: list[object], messages: list[str]
) -> None:
    command = [*other.words, "--network_module", "networks.lora_ltx2", *run("lora", 1), *words]
    code, said = run_here("ltx2_train_network.py", *command, folder=other.folder)
    assert_one_message(code, said, *messages)


def test_batches_without_the_voice_that_they_need_are_refused(tmp_path: Path) -> None:
    write_voices(tmp_path / "voices", "a")
    project = write_voice_project(tmp_path, batch_size=1)

    said = project.train("--ic_lora_strategy", "audio_ref_ic", *run("lora", 3), code=1)

    assert_one_message(1, said, "--ic_lora_strategy audio_ref_ic needs a reference in each batch")
    assert "to reference_audio_directory of its table" in said
    # auto takes what the tables have
    project.train("--ic_lora_strategy", "auto", *run("lora", 3))
    assert len(told(project)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reference_audio {0}/none.wav", "none.wav"),
        ("--reference_audio {0}/dull.png --ltx2_mode av", "dull.png"),
        ("--reference_audio {0}/a.wav", "no audio is generated from it. Pass --ltx2_mode av"),
        ("--reference_audio {0}/a.wav --ltx2_mode av --ic_lora_strategy none", "Omit one of them"),
        ("--reference_audio {0}/a.wav --ltx2_mode av --drive_audio {0}/a.wav", "the entire audio"),
        ("--audio_ref_identity_guidance_scale 3", "no reference is given. Pass --reference_audio"),
        ("--reference_audio {0}/short.wav --ltx2_mode av", "at least 0.1 s"),
    ],
)
def test_voices_that_cannot_be_used_are_refused(
    release: TinyRelease, tmp_path: Path, words: str, message: str
) -> None:
    write_voices(tmp_path / "voices", "a")
    (tmp_path / "voices" / "a.wav").rename(tmp_path / "a.wav")
    short = Track((0.01,), seconds=0.03, codec="pcm_s16le")
    write_media(tmp_path / "short.wav", short, frames=0)
    write_image(tmp_path / "dull.png", 32, 32)
    command = [*release.words, *release.texts, "--prompt", "a cat", "--video_size", 64, 64, "--device", "cpu"]

    code, said = run_here(
        *("ltx2_generate_video.py", *command, "--video_length", 9, *words.format(tmp_path).split()),
        *("--save_path", "made"),
        folder=tmp_path,
    )

    assert_one_message(code, said, message)


def test_positions_come_from_loras_and_contradictions_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, beside, odd = (
        write_lora(tmp_path / f"{text}.safetensors", audio_ref_use_negative_positions=text)
        for text in ("true", "false", "2")
    )
    default = Ltx2GivenAudioReference.from_defaults()
    assert resolve_reference_positions(default, [before]).ends_before_audio is True
    assert resolve_reference_positions(default, [beside]).ends_before_audio is False
    assert resolve_reference_positions(default, []).ends_before_audio is None
    typed = Ltx2GivenAudioReference(ends_before_audio=False)
    assert resolve_reference_positions(typed, [before]).ends_before_audio is False
    assert "was trained with --audio_ref_use_negative_positions" in caplog.text
    with pytest.raises(OptionError, match="the values must be equal"):
        resolve_reference_positions(default, [before, beside])
    with pytest.raises(OptionError, match="true or false"):
        resolve_reference_positions(default, [odd])
