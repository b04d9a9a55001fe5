"""Two steps of training Kandinsky 6 equal those computed with diffusers: of clips with sound, silent ones
beside them, and of clips that begin with an image.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky6Transformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.messages import succeed_here
from tests.kandinsky.making_6 import in_diffusers, predict_with
from tests.parity.training import (
    SEED,
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    mixed,
    normal_share,
    shifted,
    shuffled,
    stream,
)
from tests.tiny.families import family_called
from tests.tiny.kandinsky_6 import SCALE, to_diffusers

RATE, FLOW_SHIFT = 2.0, 5.0
FAMILY = family_called("kandinsky_6")


@dataclass(frozen=True)
class Clip(Item):
    """What the caches hold of a clip."""

    sound: Tensor | None = None  # 40 L 1; None: it is silent


def named(path: Path, start: str) -> Tensor:
    """The tensor of a cache whose name begins so."""
    (tensor,) = (tensor.float() for name, tensor in load_file(path).items() if name.startswith(start))
    return tensor


def cached(folder: Path) -> list[Clip]:
    """Write a project and its caches, of one batch; what they hold of its clips, sorted by name."""
    FAMILY.prepare(folder)
    dataset = folder / "dataset.toml"
    text = re.sub("batch_size = .", "batch_size = 4", dataset.read_text(encoding="utf-8"))
    dataset.write_text(re.sub("target_frames = .*", "target_frames = [9]", text), encoding="utf-8")
    succeed_here(*FAMILY.cache_latents, folder=folder)
    succeed_here(*FAMILY.cache_texts, folder=folder)
    clips = []
    for path in sorted((folder / "cache").glob("*_k6.safetensors")):
        texts = path.with_name(f"{path.name.partition('_')[0]}_k6_te.safetensors")
        sound = path.with_name(path.name.replace("_k6.", "_k6_audio."))
        tensors = {
            "pooled": named(texts, "pooled_embed"),
            "image": 0.476986 * named(path, "latents_image"),
        }
        clip = Clip(
            0.476986 * named(path, "latents_3x"),
            named(texts, "varlen_text_embeds"),
            tensors=tensors,
            sound=named(sound, "audio_latents") if sound.exists() else None,
        )
        clips.append(clip)
    assert [clip.sound is not None for clip in clips] == [True, False, True, False]
    return clips


def loss_of(
    dit: Kandinsky6Transformer3DModel,
    batch: Sequence[Clip],
    step: int,
    *,
    weight: float,
    image: bool,
) -> Tensor:
    """The mean of the video's errors, and the weighted mean of the sound's; each clip by itself."""
    sigmas = shifted(normal_share(batch, step), FLOW_SHIFT)
    noisy, wanted = mixed(batch, step, sigmas)
    shape = next(clip.sound.shape for clip in batch if clip.sound is not None)
    sound_noise = torch.randn(len(batch), *shape, generator=stream(SEED, "sound", step))
    losses = []
    for index, clip in enumerate(batch):
        inputs = {
            "noisy": noisy[index, None],
            "timesteps": 1000 * sigmas[index, None],
            "text": clip.text[None],
            "text_mask": torch.ones(1, len(clip.text), dtype=torch.bool),
            "pooled": clip.tensors["pooled"][None],
        }
        if image:
            inputs["image"] = clip.tensors["image"][None]
        if clip.sound is not None:
            sigma = sigmas[index]
            inputs["audio"] = ((1 - sigma) * clip.sound + sigma * sound_noise[index])[None]
        velocity, sound = predict_with(dit, inputs)
        loss = (velocity[0] - wanted[index]).square().mean()
        if clip.sound is not None:
            assert sound is not None
            target = sound_noise[index] - clip.sound
            loss = loss + weight * (sound[0] - target).square().mean()
        losses.append(loss)
    return torch.stack(losses).mean()


def parts_of(dit_file: Path) -> dict[str, list[str]]:
    """Every linear layer of attention and feed-forward: its name in LoRA files -> its path in diffusers."""
    state = load_file(dit_file)
    return {
        name.removesuffix(".weight").replace(".", "_"): [there.removesuffix(".weight")]
        for name, there in zip(state, to_diffusers(state), strict=True)
        if "blocks." in name and name.endswith(".weight") and "norm" not in name and "modulation" not in name
    }


@pytest.mark.parametrize(
    ("image", "weight"),
    [(False, 1.0), pytest.param(True, 0.5, marks=pytest.mark.slow)],
    ids=["text", "image"],
)
def test_two_steps_equal_those_computed_with_diffusers(tmp_path: Path, image: bool, weight: float) -> None:
    clips = cached(tmp_path)
    options = ["--timestep_sampling", "shift", "--discrete_flow_shift", str(FLOW_SHIFT)]
    options += ["--first_frame_probability", str(int(image)), "--audio_loss_weight", str(weight)]

    succeed_here(*FAMILY.train, *descent(RATE), *options, folder=tmp_path)

    dit_file = tmp_path / "model" / "dit.safetensors"
    parts = parts_of(dit_file)
    dit = in_diffusers(load_file(dit_file)).requires_grad_(False)

    def gradients_at(factors: Factors, step: int) -> Factors:
        with learning(dit, parts, factors) as found:
            loss_of(dit, shuffled(clips, step), step, weight=weight, image=image).backward()
            every = found()
        return {key: both for key, both in every.items() if both[1] is not None and both[1].any()}

    # 2 blocks of 28 layers, and of 6 in two blocks for the text of each stream
    assert len(parts) == 2 * 28 + 2 * 2 * 6
    # a key of the text moves the sound little
    assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, f"kandinsky_6 {image}", share=1e-9)
    with safe_open(tmp_path / "out" / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_audio_scale"] == f"{SCALE:g}"
        assert file.metadata()["ss_base_model_version"] == "kandinsky_6"
