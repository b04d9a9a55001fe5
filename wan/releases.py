"""Folders of whole releases of Wan (--ckpt_dir), and facts in the names of transformer files."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from modules.contract.data import LatentSpec
from modules.contract.rules import HIGH_NOISE, LOW_NOISE, expert_of_file
from modules.errors import CheckpointError, OptionError
from modules.text_files import parse_json, read_text
from networks.names.wan import WAN
from wan.files import WanFiles
from wan.options import MOST_TIMESTEP
from wan.vae_releases import RELEASES

logger = logging.getLogger(__name__)

# The file names of the official releases, beside that of the VAE
OFFICIAL = {
    "t5": "models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "t5_tokenizer": "google/umt5-xxl",
}
OFFICIAL_EXPERTS = {"dit": "low_noise_model", "dit_high_noise": "high_noise_model"}
OFFICIAL_DIT = (
    "diffusion_pytorch_model*.safetensors"  # of releases with one transformer, in the folder itself
)

# The folders of a pipeline of diffusers, where the *second* transformer is for little noise.
# Source: diffusers' WanPipeline, `boundary_ratio`
PIPELINE_INDEX = "model_index.json"
PIPELINE = {"vae": "vae", "t5": "text_encoder", "clip": "image_encoder", "t5_tokenizer": "tokenizer"}
PIPELINE_DIT = {"dit": "transformer"}
_OPTIONS = {LOW_NOISE: "dit", HIGH_NOISE: "dit_high_noise"}
PIPELINE_EXPERTS = {_OPTIONS[expert]: folder for folder, expert in WAN.experts}


@dataclass(frozen=True)
class Release:
    """Files of a folder, and the boundary of its experts as a timestep; None: it says nothing."""

    files: WanFiles
    boundary: float | None = None


def read_release(folder: Path, latent: LatentSpec) -> Release:
    """Find the parts of an official release, or of a pipeline of diffusers. Loads nothing.

    latent: of the model; it decides which VAE fits.
    Raises OptionError if the folder is missing, CheckpointError if its index cannot be read.
    """
    if not folder.is_dir():
        raise OptionError(f"--ckpt_dir {folder}: no such folder. Give that of the official release")
    index = folder / PIPELINE_INDEX
    if index.exists():
        has_experts = (folder / PIPELINE_EXPERTS["dit"]).is_dir()
        dits = PIPELINE_EXPERTS if has_experts else PIPELINE_DIT
        return Release(_there(folder, PIPELINE | dits), _read_boundary(index) if has_experts else None)
    parts = {**OFFICIAL, "vae": RELEASES[latent.channels].file, **OFFICIAL_EXPERTS}
    found = _there(folder, parts)
    if found.dit is None and found.dit_high_noise is None and any(folder.glob(OFFICIAL_DIT)):
        found = replace(found, dit=folder)
    return Release(found)


def add_release(given: WanFiles, release: WanFiles) -> WanFiles:
    """Return the files that options give; those that are not given come from a release.

    Its transformers are taken together: if --dit is given, that for much noise is not taken either, as --dit
    alone means one transformer for all noise levels.
    """
    kept = {"dit", "dit_high_noise"} if given.dit is not None else set[str]()
    for name in ("dit", "dit_high_noise"):
        if name not in kept and getattr(given, name) is None and getattr(release, name) is not None:
            logger.info("--%s is %s, from --ckpt_dir", name, getattr(release, name))
    added = {
        each.name: getattr(release, each.name)
        for each in fields(WanFiles)
        if getattr(given, each.name) is None and each.name not in kept
    }
    return replace(given, **added)


def check_names(dit: Path | None, dit_high_noise: Path | None) -> None:
    """Compare the names of the transformers with their options.

    Raises OptionError if both say that they were swapped: nobody wants that, and the videos would be noise.
    Warns if one of them does, as a name is only a hint.
    """
    named = {
        option: (path, expert_of_file(path, dict(WAN.experts)), meant)
        for option, path, meant in (
            ("--dit", dit, LOW_NOISE),
            ("--dit_high_noise", dit_high_noise, HIGH_NOISE),
        )
        if path is not None
    }
    wrong = [option for option, (_, name, meant) in named.items() if name not in {None, meant}]
    if len(wrong) > 1:
        raise OptionError(
            f"--dit {dit} is named as the transformer for much noise, and --dit_high_noise {dit_high_noise} "
            "as the one for little noise: swap the two"
        )
    for option in wrong:
        path, name, meant = named[option]
        use = "all noise levels" if len(named) == 1 and meant == LOW_NOISE else f"{_words(meant)} noise"
        logger.warning(
            "%s %s is used for %s, but its name says that it is for %s noise", option, path, use, _words(name)
        )
    if dit is not None and dit == dit_high_noise:
        logger.warning("--dit and --dit_high_noise are the same file: %s does all steps", dit)


def _words(expert: str | None) -> str:
    return "much" if expert == HIGH_NOISE else "little"


def _there(folder: Path, parts: Mapping[str, str]) -> WanFiles:
    return WanFiles(**{key: folder / name for key, name in parts.items() if (folder / name).exists()})


def _read_boundary(index: Path) -> float | None:
    """Return `boundary_ratio` of a pipeline's index as a timestep."""
    try:
        ratio = parse_json(read_text(index)).get("boundary_ratio")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"--ckpt_dir: {index} cannot be read ({error}). Download it again.", index
        ) from error
    if ratio is None:
        return None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise CheckpointError(
            f"--ckpt_dir: boundary_ratio in {index} is {ratio!r}, not a share of noise such as 0.875. "
            "Download it again, or give --timestep_boundary and the files with --dit and --dit_high_noise.",
            index,
        )
    return float(ratio) * MOST_TIMESTEP
