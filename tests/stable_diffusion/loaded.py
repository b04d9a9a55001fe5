"""Tiny checkpoints, text encoders, options and plain makers, as tests of gen_img.py need them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from encoders.clip_layers import ClipText
from modules.parser import parse_options
from stable_diffusion.assembling import LoadedPipeline
from stable_diffusion.contract import (
    SD1,
    SD2,
    SDXL,
    AskedPicture,
    Made,
    Model,
    ModelKind,
    SecondStart,
    TextTower,
)
from stable_diffusion.loading import check_attention, load_release, open_release
from stable_diffusion.options import GenImgOptions, ModelOptions, TextOptions, read_gen_img
from tests.faults.messages import run_here
from tests.tiny.stable_diffusion import KINDS, TEXT_DIM, text_config, text_state, vocabulary

CPU = torch.device("cpu")


def model_options(ckpt: Path | str, *others: object) -> ModelOptions:
    """What a command line with these options says of the model."""
    options: ModelOptions
    (options,) = parse_options(None, ["--ckpt", str(ckpt), *map(str, others)], ModelOptions)
    return options


def load_model(options: ModelOptions, device: torch.device = CPU) -> Model:
    """Load a checkpoint as gen_img.py would."""
    check_attention(options, device)
    with ExitStack() as files:
        return load_release(options, open_release(options, files), device)


def load(ckpt: Path | str, *others: object, device: torch.device = CPU) -> Model:
    """Load the checkpoint of a command line."""
    return load_model(model_options(ckpt, *others), device)


WORDS = ("a", "cat", "dog", "red", "old", "house", "of", "the", "two", "one", ",", ".", "and", "in")
_BY_NAME: dict[str, ModelKind] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def tokenize(text: str) -> list[int]:
    """Known words have one token, other ones a token for each letter."""
    ids: list[int] = []
    for word in text.lower().split():
        ids += [10 + WORDS.index(word)] if word in WORDS else [30 + ord(letter) % 50 for letter in word]
    return ids


def make_towers(name: str) -> tuple[tuple[TextTower, ...], ModelKind]:
    """The text encoders of a tiny model, loaded anew, and its kind."""
    kind, end = _BY_NAME[name], vocabulary() - 1
    towers = []
    for number, (activation, layers) in enumerate(KINDS[name].texts):
        network = ClipText(text_config(activation, layers))
        state = text_state(name, number)
        network.load_state_dict({key.removeprefix("text_model."): value for key, value in state.items()})
        pad = end if activation == "quick_gelu" else 0
        projection = torch.eye(TEXT_DIM).flip(0) if name == "sdxl" and number == 1 else None
        towers.append(
            TextTower(
                network=network.eval().requires_grad_(False),
                tokenize=tokenize,
                start=end - 1,
                end=end,
                pad=pad,
                lora_prefix=kind.lora_prefixes[number],
                projection=projection,
                missing_layers=1 if name == "sd2" else 0,
            )
        )
    return tuple(towers), kind


def text_options(*argv: object) -> TextOptions:
    """Options as a command line gives them."""
    return read_gen_img(None, ["--ckpt", "x", "--prompt", "x", *map(str, argv)]).text


def options(*arguments: object) -> GenImgOptions:
    """Return the options of a command line with a checkpoint and a prompt."""
    words = [str(argument) for argument in arguments]
    if not {"--prompt", "--from_file", "--from_module", "--interactive", "--image_path"} & set(words):
        words += ["--prompt", "a cat"]
    return read_gen_img(None, ["--ckpt", "model.safetensors", "--device", "cpu", *words])


@dataclass
class PlainMaker:
    """Makes pictures of one colour, which the seed decides. batches: what it was asked for."""

    kind: ModelKind = SD1
    fails_on: str = ""  # prompts with this text
    error: type[BaseException] = RuntimeError
    batches: list[list[AskedPicture]] = field(default_factory=list)

    @property
    def model(self) -> Any:
        return SimpleNamespace(kind=self.kind, device=torch.device("cpu"))

    def make(
        self, pictures: Sequence[AskedPicture], start: SecondStart | None = None, wants_images: bool = True
    ) -> Made:
        if self.fails_on and any(self.fails_on in picture.prompt for picture in pictures):
            raise self.error("no such thing")
        self.batches.append(list(pictures))
        size = pictures[0].settings.width, pictures[0].settings.height
        images = [Image.new("RGB", size, (picture.seed % 256, 0, 0)) for picture in pictures]
        latents = torch.zeros(len(pictures), 4, size[1] // 8, size[0] // 8)
        return Made(latents, images if wants_images else None)

    def load(self, options: GenImgOptions, device: torch.device) -> LoadedPipeline:
        return LoadedPipeline(self)

    @property
    def pictures(self) -> list[AskedPicture]:
        return [picture for batch in self.batches for picture in batch]


def write_picture(path: Path, size: tuple[int, int] = (20, 30), **texts: str) -> Path:
    """Write a PNG with texts; names have - in place of _."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name.replace("_", "-"), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, pnginfo=chunks)
    return path


def make_pictures(project: Path, out: Path, *words: object) -> list[np.ndarray]:
    """Run gen_img.py in a project with tokenizers; its pictures in the order of their names, H W 3 int."""
    arguments = ("--tokenizer_cache_dir", "tokenizers", "--outdir", out, *words)
    code, said = run_here("gen_img.py", *arguments, folder=project)
    assert code == 0, said[-3000:]
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))]
