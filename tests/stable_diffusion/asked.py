"""Option records of gen_img.py, and a maker of plain pictures that notes what it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stable_diffusion.assembling import LoadedPipeline
from stable_diffusion.contract import SD1, AskedPicture, Made, ModelKind, SecondStart
from stable_diffusion.options import GenImgOptions, read_gen_img


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
