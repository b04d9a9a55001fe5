"""Latents of the pocket model under fixed seeds, computed in float32 and kept in
tests/data/pocket_latents.safetensors.

python -m tests.pocket.regression       writes that file anew, after pocket/ has been made anew
"""

import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

import wan_generate_video
from checkpoints.writing import save_tensors
from pocket.measure import CLIP, POCKET, model_options

FILE = Path(__file__).resolve().parent.parent / "data" / "pocket_latents.safetensors"
NETWORKS = ("dit.safetensors", "t5.safetensors")
PROMPT = (
    *("--prompt", "a red circle moving left", "--seed", "7", "--infer_steps", "4"),
    *("--output_type", "latent", "--device", "cpu"),
)
CASES: dict[str, tuple[str, ...]] = {
    "vanilla_shift_3": ("--sample_solver", "vanilla", "--flow_shift", "3", "--guidance_scale", "4"),
    "vanilla_shift_5_unguided": ("--sample_solver", "vanilla", "--flow_shift", "5", "--guidance_scale", "1"),
    "unipc_shift_3": ("--sample_solver", "unipc", "--flow_shift", "3", "--guidance_scale", "4"),
    "dpm_shift_3": ("--sample_solver", "dpm++", "--flow_shift", "3", "--guidance_scale", "4"),
}


def write_in_float32(folder: Path) -> Path:
    """Write the pocket transformer and text encoder in float32: then machines differ in last bits alone.

    In bfloat16 another order of sums rounds some states of the text otherwise, and guidance multiplies that.
    """
    for name in NETWORKS:
        tensors = {key: tensor.float() for key, tensor in load_file(POCKET / name).items()}
        save_tensors(folder / name, tensors)
    return folder


def latents(networks: Path, folder: Path, case: str) -> Tensor:
    """Return C F H W of a case of CASES. networks: the folder that `write_in_float32` wrote."""
    options = [
        *model_options(POCKET),
        *CLIP,
        *PROMPT,
        *CASES[case],
        *("--dit", str(networks / "dit.safetensors"), "--t5", str(networks / "t5.safetensors")),
        *("--t5_tokenizer", str(POCKET / "tokenizer"), "--save_path", str(folder)),
    ]
    wan_generate_video.main(options)
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


def write(path: Path = FILE) -> None:
    """Compute and keep every case."""
    with tempfile.TemporaryDirectory() as name:
        networks = write_in_float32(Path(name))
        save_tensors(path, {case: latents(networks, Path(name) / case, case) for case in CASES})


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
