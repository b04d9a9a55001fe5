"""Files of a FramePack run: their paths, and the check that each fits its option."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from frame_pack.checkpoints import FORMAT
from frame_pack.image_checkpoints import FILES, OPTION, read_siglip
from frame_pack.text_encoders import FramePackClip, FramePackLlama
from hunyuan_model.files import HunyuanFiles
from hunyuan_model.token_refiner import FRAMEPACK_REFINER
from modules.checkpoints.encoders import check_state_width
from modules.checkpoints.model_files import inside, read_once, require_file
from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.errors import OptionError


@dataclass(frozen=True)
class FramePackFiles(HunyuanFiles):
    """Files of a run with HunyuanVideo's encoders and SigLIP."""

    image_encoder: Path | None = None

    format: ClassVar = FORMAT
    refiner: ClassVar = FRAMEPACK_REFINER
    encoders: ClassVar = (FramePackLlama, FramePackClip)

    @property
    def image_encoder_path(self) -> Path:
        return inside(
            require_file(self.image_encoder, OPTION, "FramePack encodes its start image with SigLIP"),
            "image_encoder",
        )

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that are given or needed ("image_encoder" too): `TransformerFiles.check`."""
        super().check(needed)
        if self.image_encoder is not None or "image_encoder" in needed:
            path, takes = self.image_encoder_path, None
            if self.dit is not None:
                takes = self.dit_header().config.image_dim
            check_state_width(OPTION, path, read_once(path, _siglip_width), self.dit, takes, FILES)


def saved_window(paths: Sequence[Path], otherwise: int) -> int:
    """Return the number of latent frames per section in files of latents; `otherwise` if they do not say.

    Raises OptionError if the files differ, CheckpointError if one is damaged.
    """
    found = {path: _window_in(path, otherwise) for path in paths}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{path}: {window}" for path, window in found.items())
        raise OptionError(
            f"--latent_path: sections of different lengths ({said} latent frames). Decode them in "
            "separate runs."
        )
    return next(iter(found.values()), otherwise)


def _window_in(path: Path, otherwise: int) -> int:
    if path.suffix != ".safetensors":
        return otherwise
    with open_checkpoint(path) as file:
        text = file.metadata.get("bt_latent_window_size", file.metadata.get("latent_window_size", ""))
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,3}", text) else otherwise


def _siglip_width(checkpoint: Checkpoint) -> int:
    return read_siglip(checkpoint).config.dim
