"""Names of the pictures that are written, and the texts in them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL.Image import Image

from modules.atomic_write import claim_name, make_storable
from modules.control_codes import replace_control_codes
from modules.media.writing import write_png
from stable_diffusion.contract import SDXL, AskedPicture, ModelKind
from stable_diffusion.prompt_lines import LONGEST_NAME
from stable_diffusion.prompt_options import PictureOutputOptions

FIRST_STAGE = "0"  # the digit in names of pictures of the first of two stages


@dataclass
class PictureFiles:
    """Writes the pictures of a run."""

    options: PictureOutputOptions
    kind: ModelKind
    sampler: str  # as it was asked for
    now: Callable[[], datetime] = datetime.now
    _last: dict[str, int] = field(default_factory=dict)  # number of the last file, by what stands before it

    def save(self, picture: AskedPicture, image: Image, digit: str, number: int) -> Path:
        """Write a picture under a free name, completely or not at all. Returns its path.

        digit: of the stage, empty if there is one stage. number: of the picture in its batch, from 0. Raises
        OutputError if it cannot be written.
        """
        texts = png_texts(picture, self.kind, self.sampler)
        with self._free(self._names(picture, digit, number)) as path:
            write_png(path, np.asarray(image.convert("RGB")), texts)
        return path

    def _names(self, picture: AskedPicture, digit: str, number: int) -> Iterator[str]:
        """Yield names without suffix, the best first."""
        if picture.file_name is not None:
            return _named(picture.file_name.removesuffix(".png"), digit)
        if self.options.use_original_file_name and picture.image is not None:
            return _named(_storable(picture.image.stem), digit)
        if self.options.sequential_file_name:
            return self._numbered(f"im_{digit}")
        start = f"im_{self.now():%Y%m%d%H%M%S}_{digit}"
        return (f"{start}{free:03d}_{picture.seed}" for free in count(number))

    def _numbered(self, start: str) -> Iterator[str]:
        """Yield numbers after the last file there is, whoever has written it."""
        if start not in self._last:
            names = (path.stem.removeprefix(start) for path in self.options.outdir.glob(f"{start}??????.png"))
            self._last[start] = max((int(name) for name in names if name.isdecimal()), default=0)
        for number in count(self._last[start] + 1):
            self._last[start] = number
            yield f"{start}{number:06d}"

    @contextmanager
    def _free(self, names: Iterator[str]) -> Iterator[Path]:
        """Claim the first name that no file has and no other run is writing."""
        for name in names:
            path = self.options.outdir / f"{name}.png"
            if path.exists():
                continue
            with claim_name(path) as is_ours:
                if is_ours and not path.exists():
                    yield path
                    return


def _storable(stem: str) -> str:
    """Return the stem of an input picture's name without control codes, in so many bytes as --f may have."""
    return replace_control_codes(stem).encode("utf-8")[:LONGEST_NAME].decode("utf-8", "ignore")


def _named(stem: str, digit: str) -> Iterator[str]:
    stem = f"{stem}_{digit}" if digit == FIRST_STAGE else stem
    return chain([stem], (f"{stem}_{number}" for number in count(1)))


def png_texts(picture: AskedPicture, kind: ModelKind, sampler: str) -> Mapping[str, str]:
    """Return the texts of a PNG, under the names of the image guides."""
    settings = picture.settings
    texts: dict[str, object] = {
        "prompt": picture.prompt,
        "seed": picture.seed,
        "sampler": sampler,
        "steps": settings.steps,
        "scale": settings.scale,
        "negative-prompt": picture.negative_prompt or None,
        "negative-scale": settings.negative_scale,
        "clip-prompt": picture.clip_prompt,
        "raw-prompt": picture.raw_prompt,
    }
    if kind is SDXL:
        sizes = settings.sizes
        height, width = sizes.original_height or settings.height, sizes.original_width or settings.width
        texts |= {
            "original-height": height,
            "original-width": width,
            "original-height-negative": sizes.original_height_negative or height,
            "original-width-negative": sizes.original_width_negative or width,
            "crop-top": sizes.crop_top or 0,
            "crop-left": sizes.crop_left or 0,
        }
    return {name: make_storable(str(value)) for name, value in texts.items() if value is not None}
