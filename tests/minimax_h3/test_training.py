"""Training MiniMax-H3 by its command line: steps equal those computed with diffusers and plain torch."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3Ref2VAPrepareLayoutStep,
    patchify_video_latents,
)
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimax_h3.configs import AUDIO
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.minimax_h3.caches import Clip, random_clip, write_caches, write_empty_text
from tests.minimax_h3.test_model import Reference, rows_of_audio
from tests.minimax_h3.tiny_dit import SIZES, released
from tests.parity.training import (
    ALPHA,
    RANK,
    SEED,
    Factors,
    assert_descent,
    assert_step_of_all_weights,
    changes_of_descent,
    descent,
    stream,
    stream_seed,
    uniform_of,
)
from tests.tiny.minimax_h3 import their_h3_dit

SCRIPT = "minimax_h3_train_network.py"
RATE = 2.0
SCALE = ALPHA / RANK
PATCH = (1, 2, 2)
FRAMES_AT = ("latents_first", "latents_last")
MODULES = [
    f"blocks_{block}_{name}"
    for block in range(SIZES["num_layers"])
    for name in ("attn_qkv_proj", "attn_out_proj", "mlp_fc1", "mlp_fc2")
]


@dataclass(frozen=True)
class Sight:
    """What a network is told of a clip besides the noised latents."""

    text: Tensor
    tags: Tensor
    frames: tuple[Tensor, ...] = ()  # first and last, noised: 1 24 1 h w each
    # a reference: the clip noised, its sound, whether that is heard
    whole: tuple[Tensor, Tensor, bool] | None = None


@dataclass(frozen=True)
class Noised:
    """A clip at one noise level, and what is to be learned of it: B axis in front."""

    base: float
    levels: tuple[float, float]  # of pictures, of sound
    latents: Tensor
    audio: Tensor
    velocity: Tensor
    audio_velocity: Tensor


def noised(clip: Clip, number: int, level: Callable[[float], float] = float) -> Noised:
    """The clip of micro-batch `number`. level: base time of a uniform number."""
    base = level(float(uniform_of([clip], number)))  # type: ignore[list-item]
    video, heard = (shift * base / (1 + (shift - 1) * base) for shift in (12, 3))
    noise = torch.randn(1, *clip.latents.shape, generator=stream(SEED, "noise", number))
    audio_noise = torch.randn(1, *clip.audio.shape, generator=stream(SEED, "sound", number))
    return Noised(
        base,
        levels=(video, heard),
        latents=(1 - video) * clip.latents + video * noise,
        audio=(1 - heard) * clip.audio + heard * audio_noise,
        velocity=noise - clip.latents,
        audio_velocity=audio_noise - clip.audio,
    )


def weights_with(factors: Factors) -> dict[str, Tensor]:
    """Weights of diffusers' network with a LoRA in them."""
    state = their_h3_dit().state_dict()
    weights = {}
    for name, (down, up) in factors.items():
        _, block, *parts = name.split("_")
        change = SCALE * up @ down
        start = f"transformer_blocks.{block}."
        places = {
            "attn_qkv_proj": [f"attn.to_{character}" for character in "qkv"],
            "attn_out_proj": ["attn.to_out.0"],
            "mlp_fc1": ["ff.net.0.proj"],
            "mlp_fc2": ["ff.net.2"],
        }["_".join(parts)]
        if places == ["ff.net.0.proj"]:
            change = torch.cat(change.chunk(2)[::-1])  # value and gate, which files have the other way round
        for place, rows in zip(places, change.chunk(len(places)), strict=True):
            path = f"{start}{place}.weight"
            weights[path] = state[path] + rows
    return weights


def rows_in(parts: Sequence[Tensor], patch: int) -> int:
    """The rows of latents. patch: numbers of a channel in a row."""
    return sum(part[0, 0].numel() // patch for part in parts)


def layout_of(sight: Sight, sample: Noised, pictures: list[Tensor], audios: list[Tensor]) -> tuple[Any, ...]:
    count, height, width = sample.latents.shape[2:]
    latents = sample.audio.shape[3]
    if sight.whole is None:
        return MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            sight.tags,
            count,
            height,
            width,
            latents,
            PATCH,
            2,
            audio_tag=AUDIO,
            video_tag=0,
            keyframe_anchors=("first", "last")[: len(sight.frames)],
        )
    return MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        sight.tags,
        [Reference("video", has_audio=sight.whole[2])],
        pictures[:-1],
        [rows_of_audio(part) for part in audios[:-1]],
        num_latent_frames=count,
        latent_height=height,
        latent_width=width,
        num_audio_latents=latents,
        patch_size=PATCH,
        audio_channels=2,
        audio_tag=AUDIO,
        video_tag=0,
    )


def predict(
    factors: Factors, sight: Sight, sample: Noised, dit: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """The velocities of pictures and of sound. dit: diffusers' network; None: with its first weights."""
    count, height, width = sample.latents.shape[2:]
    images, audios = [*sight.frames, sample.latents], [sample.audio]
    if sight.whole is not None:
        clip, heard, is_heard = sight.whole
        images.insert(0, clip)
        audios = [heard, *audios] if is_heard else audios
    layout = layout_of(sight, sample, images, audios)
    places, tags, video, audio, text, *_ = layout
    times = [1 - level for level in sample.levels]
    times += [max(0.999, times[0]), 1.0]
    of_time = torch.zeros(len(tags), dtype=torch.long)
    of_time[tags == AUDIO] = 1
    conditions, given_audios = rows_in(images[:-1], 4), rows_in(audios[:-1], 1)
    of_time[video[:conditions]] = 2
    of_time[audio[:given_audios]] = 3
    output = torch.func.functional_call(
        dit or their_h3_dit(),
        weights_with(factors),
        kwargs={
            "hidden_states": torch.cat([patchify_video_latents(part, PATCH) for part in images])[None],
            "audio_hidden_states": torch.cat([rows_of_audio(part) for part in audios])[None],
            "encoder_hidden_states": sight.text[None],
            "timestep": torch.tensor(times),
            "timestep_indices": of_time,
            "token_tags": tags,
            "position_ids": places,
            "video_indices": video,
            "audio_indices": audio,
            "text_indices": text,
        },
    )
    rows = output.sample[:, conditions:]
    made = rearrange(
        rows, "b (f h w) (c p q) -> b c f (h p) (w q)", f=count, h=height // 2, w=width // 2, p=2, q=2
    )
    heard_rows = output.audio_sample[:, given_audios:]
    return -made, -heard_rows.mT.unflatten(2, (2, -1))


def order_of(clips: Sequence[Clip], epoch: int) -> list[Clip]:
    """Clips, sorted by name, are shuffled in an epoch, then batches, which are of one clip each."""
    order = list(clips)
    draws = random.Random(stream_seed(SEED, "items", epoch))
    draws.shuffle(order)
    draws.shuffle(order)
    return order


Compare = Callable[[Factors, Clip, Noised, int], Tensor]


def mean_losses(
    velocities: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], clip: Clip, weight: float = 1.0
) -> Tensor:
    """Mean over the pictures, and a weight times that over the sound, if there is any."""
    video, heard = ((made - to).square().mean() for made, to in zip(velocities, targets, strict=True))
    return video + weight * float(clip.is_heard) * heard


def plainly(factors: Factors, clip: Clip, sample: Noised, number: int, weight: float = 1.0) -> Tensor:
    made = predict(factors, Sight(clip.text, clip.tags), sample)
    return mean_losses(made, (sample.velocity, sample.audio_velocity), clip, weight)


@dataclass
class Project:
    """A folder with a transformer and caches."""

    folder: Path
    clips: dict[str, Clip] = field(default_factory=dict)

    def cache(self, clips: Sequence[Clip], **more: Any) -> None:
        self.clips = dict(zip("abcdef", clips, strict=False))
        write_caches(self.folder, self.clips, **more)

    @property
    def words(self) -> list[str]:
        files = ["--dit", "dit.safetensors", "--dataset_config", "dataset.toml"]
        return [*files, "--mixed_precision", "no", "--network_dim", str(RANK)]

    def train(self, *words: object, code: int = 0) -> str:
        found, said = run_here(SCRIPT, *self.words, *words, folder=self.folder)
        assert found == code, said[-4000:]
        return said

    def reject(self, *words: object, names: Sequence[object] = ()) -> str:
        """Options that are refused before anything is loaded."""
        fixed = ["--output_dir", "out", "--output_name", "lora"]
        code, said = run_here(SCRIPT, *self.words, *fixed, *words, folder=self.folder)
        message = assert_one_message(code, said, *names)
        assert "Loading dit.safetensors" not in said
        assert not (self.folder / "out" / "lora.safetensors").exists()
        return message

    def write_start(self) -> Factors:
        """Write a LoRA that has an effect, start.safetensors. Returns its factors."""
        generator = torch.Generator().manual_seed(11)
        tensors, factors = {}, {}
        state = released(their_h3_dit().state_dict())
        for name in MODULES:
            _, block, part, *rest = name.split("_")
            height, width = state[f"blocks.{block}.{part}.{'_'.join(rest)}.weight"].shape
            down = torch.randn(RANK, width, generator=generator) / width**0.5
            up = 0.5 * torch.randn(height, RANK, generator=generator)
            factors[name] = down, up
            tensors[f"lora_unet_{name}.lora_down.weight"] = down
            tensors[f"lora_unet_{name}.lora_up.weight"] = up
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
        save_file(tensors, self.folder / "start.safetensors")
        return factors

    def compare(
        self,
        compare: Compare,
        *words: object,
        label: str,
        each: int = 1,
        starts: bool = False,
        level: Callable[[float], float] = float,
    ) -> None:
        """Train two steps of `each` clips, and compare factors and losses with those of a loss by clip.

        starts: whether the LoRA has an effect already. level: base time of a uniform number.
        """
        start = None
        if starts:
            start = self.write_start()
            words += ("--network_weights", "start.safetensors")
        self.train(*descent(RATE), *words, "--gradient_accumulation_steps", each)
        losses: list[float] = []

        def gradients_at(factors: Factors, step: int) -> Factors:
            leaves = {
                name: tuple(one.clone().requires_grad_() for one in pair) for name, pair in factors.items()
            }
            total = torch.zeros(())
            for number in range(step * each, (step + 1) * each):
                order = order_of([*self.clips.values()], number // len(self.clips))
                clip = order[number % len(self.clips)]
                sample = noised(clip, number, level)
                total = total + compare(leaves, clip, sample, number) / each  # type: ignore[arg-type]
            total.backward()
            losses.append(float(total.detach()))
            return {name: (down.grad, up.grad) for name, (down, up) in leaves.items()}  # type: ignore[misc]

        files = [self.folder / "out" / f"lora{end}.safetensors" for end in ("-step00000001", "")]
        assert_descent(files, MODULES, RATE, gradients_at, label, start=start, share=1e-4)
        assert self.losses() == pytest.approx(losses, rel=1e-4, abs=1e-6)

    def losses(self, name: str = "lora") -> list[float]:
        lines = (self.folder / "out" / f"{name}-history.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row["loss"] for row in rows if "loss" in row]

    def saved(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / "out" / f"{name}.safetensors")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "größe 3"
    folder.mkdir()
    save_file(released(their_h3_dit().state_dict()), folder / "dit.safetensors")
    return Project(folder)


CLIPS = (random_clip(1), random_clip(2, is_heard=False, rows=7))


def test_steps_are_those_of_plain_torch(project: Project) -> None:
    """Of a clip with sound and a silent one in each step."""
    project.cache(CLIPS)
    project.compare(plainly, label="H3", each=2)


def test_a_step_of_all_weights_equals_that_of_diffusers(project: Project) -> None:
    """Of a clip with sound and a silent one; rows of the file are those of the release."""
    project.cache(CLIPS)
    step = [*descent(RATE, steps=1), "--gradient_accumulation_steps", "2", "--mixed_precision", "no"]
    step = step[step.index("--output_dir") :]  # behind the alpha of LoRAs
    files = project.words[: project.words.index("--mixed_precision")]

    succeed_here("minimax_h3_train.py", *files, *step, folder=project.folder)

    dit = copy.deepcopy(their_h3_dit()).requires_grad_(True)
    before = released({name: weight.detach().clone() for name, weight in dit.named_parameters()})
    loss = torch.zeros(())
    for number, clip in enumerate(order_of([*project.clips.values()], 0)):
        sample = noised(clip, number)
        made = predict({}, Sight(clip.text, clip.tags), sample, dit)
        loss = loss + mean_losses(made, (sample.velocity, sample.audio_velocity), clip) / len(CLIPS)
    changes = released(changes_of_descent(dit, loss, RATE))
    after = project.saved("lora")
    for computed in (before, changes, after):
        computed.pop("rope.inv_freq", None)
    assert_step_of_all_weights(before, after, changes, "H3")


def test_weights_and_the_range_of_base_time_count(project: Project) -> None:
    project.cache(CLIPS)

    def half(factors: Factors, clip: Clip, sample: Noised, number: int) -> Tensor:
        return plainly(factors, clip, sample, number, weight=0.5)

    words = ["--audio_loss_weight", 0.5, "--min_timestep", 0.2, "--max_timestep", 0.7]
    project.compare(half, *words, label="H3, weighed", level=lambda u: 0.2 + 0.5 * u)


@pytest.mark.parametrize("has_file", [False, True])
def test_a_guided_target_is_that_of_its_formula(project: Project, has_file: bool) -> None:
    """Where the base time is at least 0.5; the empty prompt with the LoRA on. Sound has its own scale."""
    project.cache(CLIPS)
    words: list[object] = ["--h3_guidance_loss_scale", 3, "--h3_guidance_loss_scale_audio", 4]
    words += ["--h3_guidance_loss_sigma_min", 0.5, "--h3_guidance_loss_form", "contrastive"]
    empty = write_empty_text(project.folder)
    if has_file:
        (project.folder / "cache" / "mmh3_te.empty.safetensors").unlink()
        probe = {"hidden_states": empty, "token_tags": torch.ones(1, dtype=torch.long)}
        metadata = {"cache_format": "h3-uncond-probe-v1", "text": " "}
        save_file(probe, project.folder / "probe.safetensors", metadata)
        words += ["--h3_guidance_loss_uncond_cache", "probe.safetensors"]
    levels: list[float] = []

    def guided(factors: Factors, clip: Clip, sample: Noised, number: int) -> Tensor:
        levels.append(sample.base)
        targets = [sample.velocity, sample.audio_velocity]
        if sample.base >= 0.5:
            with torch.no_grad():
                away = predict(factors, Sight(empty, torch.ones(1, dtype=torch.long)), sample)
            for place, scale in enumerate((3, 4)):
                targets[place] = away[place] + scale * (targets[place] - away[place])
        made = predict(factors, Sight(clip.text, clip.tags), sample)
        return mean_losses(made, (targets[0], targets[1]), clip)

    project.compare(guided, *words, label="H3, guided", each=2, starts=True)
    assert min(levels) < 0.5 < max(levels)


def teacher_text(name: str, rows: int = 8) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Rows of a teacher by their names in caches, then states and tags."""
    clip = random_clip(7, rows=rows, has_images=True)
    return {f"{name}_hidden_states": clip.text, f"{name}_token_tags": clip.tags}, clip.text, clip.tags


def parts_of(made: Tensor, taught: Tensor, size_weight: float) -> Tensor:
    """Size and direction apart: equal to the mean square at a weight of 1, but not in its gradient."""
    count = made.numel()
    made, taught = made.flatten(), taught.flatten()
    one, other = made.norm(), taught.norm()
    cosine = (made @ taught) / (one * other)
    return (size_weight * (one - other) ** 2 + 2 * one.detach() * other * (1 - cosine)) / count


def thin_means(made: Tensor, taught: Tensor, weight: float) -> Tensor:
    """The prediction with a part of its difference in the mean of each channel taken away."""
    means = (made - taught).mean(dim=(2, 3, 4), keepdim=True)
    return made - (1 - weight**0.5) * means


def step_noise(number: int, *latents: Tensor) -> list[Tensor]:
    """Latents of conditions with the noise of a step."""
    generator = stream(SEED, "varied inputs", number)
    return [0.999 * one[None] + 0.001 * torch.randn(1, *one.shape, generator=generator) for one in latents]


def matched(
    sight_of: Callable[[Clip, int], Sight], dc: float, mag: float, keep: float, highest: float = 0.75
) -> Compare:
    """The loss of teacher matching: taught up to a base time, an anchor above."""

    def compare(factors: Factors, clip: Clip, sample: Noised, number: int) -> Tensor:
        told = Sight(clip.text, clip.tags)
        is_taught = sample.base <= highest
        with torch.no_grad():
            taught = predict({}, sight_of(clip, number) if is_taught else told, sample)
        video, heard = predict(factors, told, sample)
        weight = 1.0 if is_taught else keep
        if is_taught:
            video = thin_means(video, taught[0], dc)
        losses = [
            parts_of(made, to, mag if is_taught else 1)
            for made, to in zip((video, heard), taught, strict=True)
        ]
        return weight * (losses[0] + float(clip.is_heard) * losses[1])

    return compare


MATCHING: list[object] = ["--h3_teacher_matching", "--h3_teacher_loss_dc_weight", 0.3]
MATCHING += ["--h3_teacher_loss_mag_weight", 0.5, "--h3_teacher_preservation_weight", 2]


def with_frames(clips: Sequence[Clip], names: str = "mmh3_teacher") -> tuple[list[Clip], Tensor, Tensor]:
    """Clips with keyframes and rows of a teacher, and these rows."""
    rows, text, tags = teacher_text(names)
    framed = []
    for seed, clip in enumerate(clips):
        generator = torch.Generator().manual_seed(50 + seed)
        frames = {name: torch.randn(24, 1, 2, 4, generator=generator) for name in FRAMES_AT}
        framed.append(replace(clip, media=frames, rows=rows))
    return framed, text, tags


def test_a_teacher_with_both_frames_is_matched_as_the_formula_says(project: Project) -> None:
    """Both taught steps and anchors, of clips with and without sound."""
    clips, text, tags = with_frames(CLIPS)
    project.cache(clips)
    levels: list[float] = []

    def sight(clip: Clip, number: int) -> Sight:
        return Sight(text, tags, tuple(step_noise(number, *(clip.media[name] for name in FRAMES_AT))))

    compare = matched(sight, dc=0.3, mag=0.5, keep=2)

    def noted(factors: Factors, clip: Clip, sample: Noised, number: int) -> Tensor:
        levels.append(sample.base)
        return compare(factors, clip, sample, number)

    project.compare(noted, *MATCHING, label="H3, matching", each=2, starts=True)
    assert min(levels) < 0.75 < max(levels)


def test_a_teacher_sees_the_clip_itself(project: Project) -> None:
    """As a reference with its sound, in front of the clip on the clock."""
    rows, text, tags = teacher_text("mmh3_teacher_ref")
    project.cache([replace(clip, rows=rows) for clip in CLIPS])

    def sight(clip: Clip, number: int) -> Sight:
        return Sight(text, tags, whole=(step_noise(number, clip.latents)[0], clip.audio[None], clip.is_heard))

    words = [*MATCHING, "--h3_teacher_conditions", "ref", "--h3_teacher_condition_sigma_max", 1]
    words = [word for word in words if word not in ("--h3_teacher_preservation_weight", 2)]
    compare = matched(sight, dc=0.3, mag=0.5, keep=1, highest=1)
    project.compare(compare, *words, label="H3, the clip itself", starts=True)


def test_first_and_last_frame_are_told_with_new_noise_in_each_step(project: Project) -> None:
    """--task fl2va, the plain loss."""
    clips, _, _ = with_frames([random_clip(1, has_images=True), random_clip(2, rows=7, has_images=True)])
    project.cache([replace(clip, rows={}) for clip in clips])

    def compare(factors: Factors, clip: Clip, sample: Noised, number: int) -> Tensor:
        frames = step_noise(number, *(clip.media[name] for name in FRAMES_AT))
        made = predict(factors, Sight(clip.text, clip.tags, tuple(frames)), sample)
        return mean_losses(made, (sample.velocity, sample.audio_velocity), clip)

    project.compare(compare, "--task", "fl2va", label="H3, both frames")


def test_references_are_told_with_new_noise_in_each_step(project: Project) -> None:
    """--task ref2va: a clip with its sound."""
    clips = []
    for seed in (1, 2):
        clip = random_clip(seed, has_images=True)
        media = {"latents_ref_000_video": clip.latents + 1, "latents_ref_000_audio": clip.audio - 1}
        clips.append(replace(clip, media=media))
    project.cache(clips)

    def compare(factors: Factors, clip: Clip, sample: Noised, number: int) -> Tensor:
        (shown,) = step_noise(number, clip.media["latents_ref_000_video"])
        full = shown, clip.media["latents_ref_000_audio"][None], True
        made = predict(factors, Sight(clip.text, clip.tags, whole=full), sample)
        return mean_losses(made, (sample.velocity, sample.audio_velocity), clip)

    project.compare(compare, "--task", "ref2va", label="H3, references")
