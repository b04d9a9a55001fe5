"""A complete tiny Wan2.1 on disk, in the released file layout."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import wan_encoders
from tests.tiny.wan_dit import tiny_state, write_dit


@dataclass(frozen=True)
class TinyWan:
    """Paths of a tiny checkpoint set, as given to --dit, --vae, --t5, --clip."""

    dit: Path
    vae: Path
    t5: Path
    clip: Path
    dit_high_noise: Path | None = None

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        return [
            *("--dit", str(self.dit)),
            *([] if self.dit_high_noise is None else ["--dit_high_noise", str(self.dit_high_noise)]),
            *("--vae", str(self.vae), "--t5", str(self.t5), "--clip", str(self.clip)),
        ]


def write_tiny_wan(
    folder: Path, kind: str = "t2v", dtype: torch.dtype = torch.float32, experts: int = 1
) -> TinyWan:
    """Write transformer, VAE, text encoder with tokenizer, and image encoder as safetensors below
    `folder`.

    experts: 2 also writes a transformer for much noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = TinyWan(*(folder / f"{name}.safetensors" for name in ("dit", "vae", "t5", "clip")))
    write_dit(folder, tiny_state(kind, dtype=dtype, image_dim=wan_encoders.CLIP_DIM), name="dit")
    if experts > 1:
        state = tiny_state(kind, seed=1, dtype=dtype, image_dim=wan_encoders.CLIP_DIM)
        files = replace(files, dit_high_noise=write_dit(folder, state, name="dit_high"))
    save_file(wan_encoders.vae22_tensors() if kind == "ti2v" else wan_encoders.vae_tensors(), files.vae)
    save_file(wan_encoders.t5_tensors(), files.t5)
    save_file(
        {
            name: tensor.contiguous()
            for name, tensor in wan_encoders.clip_official_tensors(wan_encoders.clip_tensors()).items()
        },
        files.clip,
    )
    wan_encoders.write_tokenizer(folder / "google" / "umt5-xxl")
    return files
