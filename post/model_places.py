"""Find the models of tools that name none, where tools/download.py puts them. Standard library only."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.command import as_typed
from modules.errors import OptionError
from modules.installation import ROOT

logger = logging.getLogger(__name__)

MODELS = Path("models")  # what tools/download.py takes for --to without that option


@dataclass(frozen=True)
class ModelPlace:
    """Where a downloaded model of a tool is, below the folder of all models."""

    tool: str
    mode: str  # --mode that it is for; empty for tools without
    task: str  # of tools/download.py --family tools
    files: tuple[str, ...]  # all that have to be there
    is_folder: bool = False  # --model takes the folder of the files, not the first of them

    @property
    def given(self) -> str:
        """Return the value of --model, below the folder of all models."""
        return str(Path(self.files[0]).parent) if self.is_folder else self.files[0]


# of a tool and mode the first that is there counts, without a mode those of the tool's first one
PLACES = (
    ModelPlace(
        "upscaler",
        "swinir",
        "swinir",
        ("upscalers/003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN.pth",),
    ),
    ModelPlace("upscaler", "esrgan", "realesrgan_x4", ("upscalers/RealESRGAN_x4plus.pth",)),
    ModelPlace("upscaler", "esrgan", "realesrgan_x2", ("upscalers/RealESRGAN_x2plus.pth",)),
    ModelPlace(
        "GIMMVFI",
        "gimmvfi_f",
        "gimmvfi_f",
        ("gimmvfi/gimmvfi_f_arb_lpips_fp32.safetensors", "gimmvfi/flowformer_sintel_fp32.safetensors"),
        is_folder=True,
    ),
    ModelPlace(
        "GIMMVFI",
        "gimmvfi_r",
        "gimmvfi_r",
        ("gimmvfi/gimmvfi_r_arb_lpips_fp32.safetensors", "gimmvfi/raft-things_fp32.safetensors"),
        is_folder=True,
    ),
    ModelPlace("facefix", "gfpgan", "gfpgan", ("facefix/GFPGANv1.4.pth",)),
    ModelPlace("facefix", "codeformer", "codeformer", ("facefix/codeformer.pth",)),
    ModelPlace("yolo_blur", "", "yunet", ("facefix/face_detection_yunet_2023mar.onnx",)),
)


def default_model(
    tool: str, words: Sequence[str], folders: Sequence[Path] = (MODELS, ROOT / MODELS)
) -> Path | None:
    """Return the downloaded model for a tool of a chain, and log which; None if the words name one.

    tool: its name in `post.chain_options.TOOLS`. words: its options, as `--mode esrgan`, `--mode=esrgan` or
    `mode=esrgan`. folders: where models are downloaded to; the first that has the files counts. Raises
    OptionError with the command that downloads it if it is in none.
    """
    if _value("model", words) is not None or {"-h", "--help"} & set(words):
        return None
    places = [place for place in PLACES if place.tool == tool]
    mode = _value("mode", words)
    if mode is None:
        mode = places[0].mode if places else ""
    fitting = [place for place in places if place.mode in ("", mode)]
    if not fitting:
        return None  # an unknown mode: the tool says so itself
    for place in fitting:
        for folder in folders:
            if all((folder / file).is_file() for file in place.files):
                path = folder / place.given
                logger.info("%s: --model is not given; %s is used", tool, path)
                return path
    command = as_typed(["python", "tools/download.py", "--family", "tools", "--task", fitting[0].task])
    missing = folders[0] / fitting[0].files[0]
    raise OptionError(
        f"no model is given, and {missing} is not there.\n  Give --model FILE (model=FILE in a chain), or "
        f"download it: {command}"
    )


def _value(option: str, words: Sequence[str]) -> str | None:
    """Return the last value that the words give to an option; None if they give none."""
    found = None
    for index, word in enumerate(words):
        for start in (f"--{option}=", f"{option}="):
            if word.startswith(start):
                found = word.removeprefix(start)
        if word == f"--{option}":
            found = words[index + 1] if index + 1 < len(words) else ""
    return found
