"""Toy families unlike the video families: pictures, a model that predicts noise, texts that can learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.writing import save_tensors
from modules.options import NoOptions
from protocols.data import (
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
)
from protocols.family import Caches, DitSpec, EncoderAbilities, NoiseSpec, TextEncoder, Trains
from protocols.loading import Placement
from protocols.requests import Prompt
from protocols.rules import CountTokens, TokenCount
from protocols.steps import NO_OVERRIDES, Overrides
from tests.training.toy import WIDTH, ToyBlock, ToyDit, ToyFamily
from training.image_options import ImageTrainerDefaults, read_image_training
from training.options import TrainingOptions
from training.run import train_network

LATENT = LatentSpec(3, (1, 8, 8), pixel_step=16, frame_step=1, scale=2.0, shift=-1.0, masks_latents=True)
PATCH = 4 * LATENT.channels  # numbers of a token: 2 x 2 latents
LEVELS = tuple(0.03 * 500 ** (index / 999) for index in range(1000))  # of noise, up to 15


def count_tokens(shape: Sequence[int]) -> int:
    return (shape[-2] // 2) * (shape[-1] // 2)


class MeanVae(nn.Module):
    """A latent is the mean color of 8 x 8 pixels, 0..1."""

    device = torch.device("cpu")

    def encode(self, frames: Tensor) -> Tensor:
        pixels = frames[:, 0].permute(0, 3, 1, 2).float() / 255  # B C H W
        return nn.functional.avg_pool2d(pixels, 8).unsqueeze(2)  # B C F H W


class ImageDit(nn.Module):
    """Tokens B L 12 -> B L 12. It wants times from 0 to 1 and remembers what it was fed."""

    spec = DitSpec(("blocks",))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, PATCH)
        self.fed: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, times: Tensor, text: Sequence[Tensor]) -> Tensor:
        self.fed.append((tokens.detach(), times))
        added = torch.stack([one.mean() for one in text]) + times
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, added.view(-1, 1, 1))
        return self.head(x)


@dataclass(frozen=True)
class ImageFamily(ToyFamily):
    """Pictures with transparency.

    The network says which way the data lies; or the noise, if `noise` has a table.
    """

    noise: NoiseSpec = NoiseSpec(training_offset=0.0, table_is_shifted=True, count_tokens=count_tokens)
    name: str = "pictures"
    cache_tag: str = "pic"
    latent: LatentSpec = LATENT
    dit: DitSpec = ImageDit.spec
    defaults: SamplingDefaults = SamplingDefaults(3, 1.0, 5.0, None, 3.0, "euler", 32, 32, 1)
    media_identity: Mapping[str, str] = field(default_factory=lambda: {"vae": "means"})
    network: ImageDit = field(default_factory=ImageDit)

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        return MediaEncoders(MeanVae())

    def check_table(self, table: MediaTable) -> None: ...

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        return None

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        latents = encoders.vae.encode(media.frames)
        opaque = torch.full(media.frames.shape[2:4], 255).expand(len(latents), -1, -1)
        alpha = opaque if media.alpha is None else media.alpha
        made = zip(latents, alpha.float() / 255, strict=True)
        return [[CacheEntry({"latents": image, "alpha_mask": mask})] for image, mask in made]

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        return self.network

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        times, factor = timesteps / 1000, -1.0  # the network points to the data, velocities to the noise
        if self.noise.table:
            sigmas = torch.tensor(self.noise.table)[timesteps.long()]
            noisy, factor = noisy / (1 + sigmas.square()).sqrt().view(-1, 1, 1, 1, 1), 1.0
        _, channels, frames, height, width = noisy.shape
        tokens = nn.functional.pixel_unshuffle(noisy.squeeze(2), 2).flatten(2).transpose(1, 2)  # B L 12
        found = dit(tokens, times, cond["letters"]).transpose(1, 2).unflatten(2, (height // 2, width // 2))
        return factor * nn.functional.pixel_shuffle(found, 2).view(-1, channels, frames, height, width)


_: tuple[type[Caches], type[Trains]] = ImageFamily, ImageFamily


class TinyText(nn.Module):
    """Characters of a text through two layers; their mean."""

    spec = DitSpec(("layers",))

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(128, WIDTH)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, text: str) -> Tensor:
        x = self.embed(torch.tensor([ord(character) % 128 for character in text or " "]))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.mean(0)  # C


class TextDit(ToyDit):
    """The toy's network, with blocks of the name that a family's LoRA module asks for."""

    spec = DitSpec(("double_blocks",))

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = self._modules.pop("blocks")

    @property
    def blocks(self) -> nn.Module:
        return self.double_blocks


@dataclass
class TinyTextEncoder:
    """One of the two; `asked` notes every text."""

    name: str
    key: str
    lora_prefix: str
    seed: int
    abilities: EncoderAbilities = EncoderAbilities(trainable=True)
    asked: list[str] = field(default_factory=list)
    made: TinyText | None = None
    variable_length: frozenset[str] = frozenset()
    identity: Mapping[str, str] = field(default_factory=lambda: {"tiny": "1"})

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.key})

    @property
    def network(self) -> TinyText:
        assert self.made is not None
        return self.made

    def token_counter(self) -> CountTokens:
        return lambda text: TokenCount(text, 1, 1, len(text))

    def load(self, device: torch.device) -> None:
        self.made = self.made or TinyText(self.seed)

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.asked += [prompt.text for prompt in prompts]
        return [{self.key: self.network(prompt.text)} for prompt in prompts]

    def free(self) -> None:
        self.made = None


@dataclass(frozen=True)
class TextFamily(ToyFamily):
    """The toy with two texts."""

    text_keys: frozenset[str] = frozenset({"first", "second"})
    lora_module: str = "networks.lora_flux"
    dit: DitSpec = TextDit.spec
    made: list[TinyTextEncoder] = field(default_factory=list)  # every encoder that was asked for

    def text_encoders(self) -> Sequence[TextEncoder]:
        new = [
            TinyTextEncoder("clip", "first", "lora_te1", 1),
            TinyTextEncoder("t5", "second", "lora_te3", 2),
        ]
        self.made.extend(new)
        return new

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return TextDit().to(placement.device, placement.storage_dtype or self.dtype)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        return {name: batch.tensor(name) for name in ("first", "second")}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        texts = zip(cond["first"], cond["second"], strict=True)
        characters = [first + 2 * second for first, second in texts]
        return super().predict(dit, noisy, timesteps, {"letters": characters}, overrides)


def write_images(folder: Path, count: int = 4, texts: bool = False, more: str = "") -> Path:
    """Write pictures with captions, their latent caches and the dataset file; texts: with text caches."""
    generator = torch.Generator().manual_seed(1)
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        Image.fromarray(np.full((32, 32, 3), 20 * index, np.uint8)).save(folder / "images" / f"p{index}.png")
        (folder / "images" / f"p{index}.txt").write_text(f"red, big, number {index}", encoding="utf-8")
        latents = torch.randn(2, 1, 4, 4, generator=generator)
        save_tensors(
            folder / "cache" / f"p{index}_0032x0032_toy.safetensors", {"latents_1x4x4_float32": latents}
        )
        if texts:
            rows = torch.randn(2, WIDTH, generator=generator)
            tensors = {"first_float32": rows[0], "second_float32": rows[1]}
            save_tensors(folder / "cache" / f"p{index}_toy_te.safetensors", tensors)
    here = folder.as_posix()
    table = (
        f'[[datasets]]\nimage_directory = "{here}/images"\ncache_directory = "{here}/cache"\n'
        f'caption_extension = ".txt"\n{more}\n'
    )
    path = folder / "dataset.toml"
    path.write_text(f"[general]\nresolution = [32, 32]\n{table}", encoding="utf-8")
    return path


def write_subset(folder: Path, keys: str) -> None:
    """Write pictures with all caches, as a subset of the image guides' form with these keys."""
    path = write_images(folder, texts=True)
    here = folder.as_posix()
    path.write_text(
        f"[[datasets]]\nresolution = 32\nenable_bucket = false\n[[datasets.subsets]]\n"
        f'image_dir = "{here}/images"\ncache_directory = "{here}/cache"\n'
        f'caption_extension = ".txt"\n{keys}\n',
        encoding="utf-8",
    )


def image_toy_options(folder: Path, *arguments: object, prediction: str = "raw") -> TrainingOptions:
    """Options as an image trainer reads them; output goes to `folder`/output under the name x."""
    default = ["--dataset_config", folder / "dataset.toml", "--output_dir", folder / "output"]
    default += ["--output_name", "x", "--seed", 3, "--learning_rate", "1e-2", "--max_train_steps", 6]
    default += ["--max_data_loader_n_workers", 0, "--no_page"]
    defaults = ImageTrainerDefaults("uniform", 3.0, prediction)
    argv = [str(one) for one in (*default, *arguments)]
    return read_image_training(None, NoOptions, defaults, argv)[0]


def train_image_toy(
    folder: Path, *arguments: object, family: TextFamily | None = None, **changes: str
) -> dict[str, Tensor]:
    """Train the whole way; returns the tensors of the final file."""
    options = image_toy_options(folder, *arguments, **changes)
    assert train_network(family or TextFamily(), options) == 0
    return load_file(folder / "output" / "x.safetensors")
