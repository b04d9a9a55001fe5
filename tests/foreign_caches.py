"""Caches as the known tuner leaves them: the same tensors under the same names, and no record of ours."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.faults.messages import succeed_here
from tests.tiny.families import TinyFamily


def train_with_and_without_records(
    family: TinyFamily, folder: Path, architecture: str
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Cache a project with references of their own sizes, train, take our records away, and train again:
    both LoRAs are equal. architecture: that caches name there; ours begin so. Returns all tensors' shapes.
    """
    with (folder / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write("no_resize_control = true\n")
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    train = (*family.train, "--max_train_steps", "4", "--seed", "1", "--max_data_loader_n_workers", "0")
    succeed_here(*train, "--output_dir", "out", "--output_name", "ours", folder=folder)
    shapes = {}
    for path in (folder / "cache").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = {key: text for key, text in file.metadata().items() if "reelsmith" not in key}
        tensors = load_file(path)
        assert metadata["architecture"].startswith(architecture)
        shapes[path.name] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        save_file(tensors, path, {**metadata, "architecture": architecture})
    succeed_here(*train, "--output_dir", "out", "--output_name", "theirs", folder=folder)
    ours, theirs = (load_file(folder / "out" / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    return shapes
