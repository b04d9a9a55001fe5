"""A toy family that trains in milliseconds, its caches on disk, and runs of the whole training on them."""

import argparse
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.writing import save_tensors
from dataset.cache.records import TextRecord, record_metadata
from dataset.cache_files import checksum, read_entry, write_tensors
from modules.errors import OptionError
from modules.options import NO_OPTIONS, read_options
from modules.parser import add_options
from protocols.data import CAPTION, Batch, Conditions, LatentSpec, MediaEncoders, SamplingDefaults
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.family import (
    FLOW,
    Abilities,
    DitSpec,
    EncoderAbilities,
    Generates,
    NoiseSource,
    NoiseSpec,
    TextEncoder,
    Trains,
)
from protocols.loading import Placement
from protocols.requests import Prepared, Prompt, Request, get_size, resolve_request
from protocols.rules import ONE_EXPERT, CountTokens, Expert, ModelRelease, ReferenceRules, TokenCount
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section
from training.features.composing import options_by_expert
from training.learning_options import ExpertTrainingOptions, FullDitOptions
from training.next_commands import TrainingCommand
from training.options import (
    TrainedNetworkOptions,
    TrainingOptions,
    list_script_options,
    read_arguments,
    training_parser,
)
from training.run import train_network
from training.saving.states import SavedState, read_state

TOY_RELEASE = ModelRelease(("owner/toy",), "Toy license", "other", "https://example.org/licence")
TWO_EXPERTS = (Expert(LOW_NOISE, 0.0, 600.0), Expert(HIGH_NOISE, 600.0))
LATENT = LatentSpec(channels=2, stride=(4, 8, 8), pixel_step=16, frame_step=4, scale=0.5)
WIDTH = 8


class ToyBlock(nn.Module):
    """Tokens and text through two layers, which a LoRA may be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x + text)))  # B L C


class ToyDit(nn.Module):
    """Every latent pixel is a token; the text and the timestep are added to all of them."""

    spec = DitSpec(("blocks",))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(LATENT.channels, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, LATENT.channels)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Sequence[Tensor]) -> Tensor:
        x = self.embed(noisy.to(self.embed.weight.dtype).flatten(2).transpose(1, 2))  # B L C
        added = torch.stack([one.mean() for one in text]) + timesteps / 1000
        for block in self.blocks:
            x = block(x, added.view(-1, 1, 1).to(x.dtype))
        return self.head(x).transpose(1, 2).view_as(noisy).float()


class ToyVae(nn.Module):
    """Every latent pixel is one picture of 8 x 8 pixels; latent frames after the first are four."""

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        pixels = (
            latents[:, :1].clamp(-1, 1).repeat(1, 3, 1, 1, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)
        )
        for index, frame in enumerate(pixels.split(1, dim=2)):
            yield frame if index == 0 else frame.repeat_interleave(4, 2)


class ToyTextEncoder:
    """A text becomes its length."""

    name = "letters"
    abilities = EncoderAbilities()
    keys = frozenset({"letters"})
    variable_length = frozenset({"letters"})
    identity: Mapping[str, str] = {"letters": "1"}

    def token_counter(self) -> CountTokens:
        return lambda text: TokenCount(text, 1, 1, len(text))

    def load(self, device: torch.device) -> None: ...

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        return [{"letters": [torch.full((1, 1), len(prompt.text) / 100)]} for prompt in prompts]

    def free(self) -> None: ...


@dataclass(frozen=True)
class ToyFamily:
    """Text to video.

    `watch` is called before every training pass with the number of those before it, `on_decode` with latents.
    """

    watch: Callable[[int], None] = lambda _: None
    on_decode: Callable[[Tensor], None] = lambda _: None
    dtype: torch.dtype = torch.float32
    name: str = "toy"
    abilities: Abilities = Abilities()
    references: ReferenceRules | None = None
    cache_tag: str = "toy"
    lora_module: str = "networks.lora_wan"
    latent: LatentSpec = LATENT
    dit: DitSpec = ToyDit.spec
    noise: NoiseSpec = FLOW
    text_keys: frozenset[str] = frozenset({"letters"})
    defaults: SamplingDefaults = SamplingDefaults(3, 16.0, 5.0, None, 3.0, "unipc", 32, 32, 5)
    experts: tuple[Expert, ...] = ONE_EXPERT
    teacher_only_conditions: tuple[str, ...] = (CAPTION,)
    caching_switches: tuple[str, ...] = ()
    options: Any = NO_OPTIONS
    media_identity: Mapping[str, str] = field(default_factory=dict)
    passes: list[bool] = field(default_factory=list)  # one for each pass: with gradients
    requests: list[Request] = field(default_factory=list)

    @property
    def release(self) -> ModelRelease:
        return TOY_RELEASE

    @property
    def metadata(self) -> Mapping[str, str]:
        return {"architecture": "toy"}

    @property
    def hashed_files(self) -> Mapping[str, Path]:
        return {}

    def text_encoders(self) -> Sequence[TextEncoder]:
        return [ToyTextEncoder()]

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        return MediaEncoders(ToyVae())

    def check_named_files(self) -> None: ...

    def block_counts(self) -> tuple[int, ...]:
        return ()

    has_dit_files = True

    @property
    def dit_files(self) -> tuple[Path, ...]:
        return ()

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        return placement.storage_dtype or self.dtype

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7 + expert)
            dit = ToyDit()
        if placement.patch is not None:
            for name, parameter in dit.named_parameters():
                dtype = placement.storage_dtype or self.dtype
                parameter.data = placement.patch(name, parameter.data, dtype)
        return dit.to(placement.device, placement.storage_dtype or self.dtype)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        return {"letters": batch.tensors["letters"]}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        if torch.is_grad_enabled():
            self.watch(sum(self.passes))
        self.passes.append(torch.is_grad_enabled())
        return dit(noisy.to(self.dtype), timesteps, cond["letters"])

    def check_files(self, media: bool) -> None:
        pass

    def prepare(self, request: Request) -> Prepared:
        if request.prompt == "impossible":
            raise OptionError("this cannot be made")
        self.requests.append(request)
        flow_shift = 3.0 if request.flow_shift is None else request.flow_shift
        size = get_size(request, self.defaults)
        prepared = resolve_request(request, self.defaults, size, flow_shift, "bad", self.experts)
        return replace(prepared, solver="euler")

    def needs_media(self, prepared: Prepared) -> bool:
        return False

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        return {0: {}}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        shape = self.latent.shape(prepared.frames, prepared.height, prepared.width)
        return (yield prompts[0].section(noise.draw(shape), inputs[0]))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        self.on_decode(latents)
        yield from encoders.vae.decode(latents)


_: tuple[type[Trains], type[Generates]] = ToyFamily, ToyFamily


def write_caches(
    folder: Path, count: int = 5, batch_size: int = 1, more: str = "", bad: int | None = None
) -> Path:
    """Caches of `count` pictures and the dataset file. bad: the latents of this one are not finite."""
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        latents = torch.randn(2, 1, 4, 4, generator=generator) + index
        if index == bad:
            latents[0, 0, 0, 0] = torch.inf
        save_tensors(
            folder / "cache" / f"clip{index}_0032x0032_toy.safetensors", {"latents_1x4x4_float32": latents}
        )
        text = torch.full((index + 1, 1), 0.1 * index)
        save_tensors(folder / "cache" / f"clip{index}_toy_te.safetensors", {"varlen_letters_float32": text})
    path = folder / "dataset.toml"
    here = folder.as_posix()
    table = f'[[datasets]]\nimage_directory = "{here}/images"\ncache_directory = "{here}/cache"\n{more}\n'
    path.write_text(f"[general]\nresolution = [32, 32]\nbatch_size = {batch_size}\n{table}", encoding="utf-8")
    return path


def write_prompts(folder: Path, text: str = "a cat --f 1 --s 2 --d 1\n") -> Path:
    """What samples are made of: by default one picture."""
    path = folder / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return path


def record_encoders(folder: Path, names: Mapping[str, str], **settings: object) -> None:
    """Have text caches say which encoder made them. names: `clip0` -> the encoder's identity.

    settings: keys of the table about captions.
    """
    for stem, identity in names.items():
        entry = read_entry(folder / "cache" / f"{stem}_toy_te.safetensors")
        crc32 = {name: checksum(name, tensor) for name, tensor in entry.named.items()}
        record = TextRecord({"letters": identity}, "a text", None, crc32, settings)
        write_tensors(entry.path, entry.named, record_metadata({"letters": record}))


def toy_options(
    folder: Path, *arguments: object, full_dit: bool = False, has_page: bool = False
) -> TrainingOptions:
    """Options as from a command line; output goes to `folder`/output under the name x.

    full_dit: full fine-tuning. has_page: write the page too, which takes longer than the toy's training.
    """
    values = {
        "--dataset_config": folder / "dataset.toml",
        "--output_dir": folder / "output",
        "--output_name": "x",
        "--seed": 3,
        "--learning_rate": "1e-2",
        "--max_train_steps": 8,
        "--max_data_loader_n_workers": 0,
    }
    # those that are given again would be warned of
    default = [word for name, value in values.items() if name not in arguments for word in (name, value)]
    default += [] if has_page else ["--no_page"]
    argv = [str(one) for one in (*default, *arguments)]
    return read_options(TrainingOptions, read_arguments(toy_parser(full_dit), argv, {}))


@functools.cache  # parsing changes nothing in it
def toy_parser(full_dit: bool) -> argparse.ArgumentParser:
    parser = training_parser("", FullDitOptions if full_dit else TrainedNetworkOptions)
    add_options(parser, ExpertTrainingOptions, *options_by_expert())
    return parser


def train_toy(
    folder: Path, *arguments: object, family: Any = None, full_dit: bool = False, has_page: bool = False
) -> dict[str, Tensor]:
    """Train the whole way; returns the tensors of the final file, none if the run was asked to stop."""
    options = toy_options(folder, *arguments, full_dit=full_dit, has_page=has_page)
    script_options = list_script_options(toy_parser(full_dit), options) if has_page else ()
    command = TrainingCommand(script_options=script_options)
    assert train_network(family or ToyFamily(), options, command) == 0
    folder, name = options.saving.folder_and_name
    path = folder / f"{name}.safetensors"
    return load_file(path) if path.exists() else {}


class Killed(BaseException):
    """Stands for a kill: nothing is tidied up by the loop."""


def killed_at(count: int) -> ToyFamily:
    """A family whose run dies at the `count`-th micro-batch."""

    def watch(passes: int) -> None:
        if passes == count:
            raise Killed

    return ToyFamily(watch=watch)


def train_with_kills(
    folder: Path, *arguments: object, moments: Sequence[int], full_dit: bool = False
) -> dict[str, Tensor]:
    """Train into `folder`/killed, die at each of these micro-batches and go on; returns the final file."""
    words = (*arguments, "--output_dir", folder / "killed")
    for moment in moments:
        with pytest.raises(Killed):
            train_toy(folder, *words, family=killed_at(moment), full_dit=full_dit)
    return train_toy(folder, *words, full_dit=full_dit)


def metadata_of(path: Path) -> dict[str, str]:
    """What a file of tensors says of itself."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def state_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state by its parts, and those of its optimizer."""
    state = read_state(folder)
    assert isinstance(state, SavedState)
    moments = {
        f"{name}/{key}": value
        for name, values in state.optimizer["states"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    return {**{part: dict(tensors) for part, tensors in state.parts.items()}, "optimizer": moments}


def around(phase: Callable[..., Any], *acts: Callable[..., Any]) -> Callable[..., Any]:
    """A phase with what features put around it, as `RunFeatures.wrap` returns it."""
    for act in acts:
        phase = partial(act, phase)
    return phase


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are equal to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
