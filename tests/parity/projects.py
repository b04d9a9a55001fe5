"""A dataset whose caches another tool made, to train on with a tiny Wan2.1."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.faults.messages import succeed_here
from tests.parity.training import ALPHA, RANK, SEED, Item
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_encoders import CLIP_DIM, TEXT_DIM

WIDTH, HEIGHT, FRAMES = 48, 32, 5
GRID = (2, HEIGHT // 8, WIDTH // 8)
WIDTH_5B = 64  # a multiple of 32, as TI2V-5B asks for
DATASET = """
[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
resolution = [{width}, 32]
target_frames = [5]
batch_size = {batch_size}
"""


TASKS = {
    "t2v": "t2v-1.3B",
    "i2v": "i2v-14B",
    "flf2v": "flf2v-14B",
    "fun-control": "t2v-1.3B-FC",
    "fun-control-v1.1": "i2v-14B-FC",
    "ti2v": "ti2v-5B",
    "i2v-2.2": "i2v-A14B",
    "fun-control-2.2": "i2v-A14B-FC",
}


@dataclass(frozen=True)
class Project:
    """A folder with models and caches."""

    folder: Path
    kind: str  # of the transformer
    items: list[Item]  # sorted by name

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def dit(self) -> Path:
        return self.models / "dit.safetensors"

    @property
    def task(self) -> str:
        return TASKS[self.kind]


def write_project(folder: Path, kind: str, count: int = 2, batch_size: int = 2) -> Project:
    """Caches of `count` clips as the known tuners write them; texts in bfloat16, the rest as float32 where
    they may be.
    """
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    (folder / "cache").mkdir(parents=True)
    (folder / "clips").mkdir()
    channels, grid, width = 16, GRID, WIDTH
    if kind == "ti2v":
        channels, grid, width = 48, (2, HEIGHT // 16, WIDTH_5B // 16), WIDTH_5B
    (folder / "dataset.toml").write_text(
        DATASET.format(folder=folder.as_posix(), width=width, batch_size=batch_size), encoding="utf-8"
    )
    write_tiny_wan(folder / "models", kind)
    size = "x".join(map(str, grid))
    metadata = {
        "architecture": "wan",
        "width": str(width),
        "height": str(HEIGHT),
        "format_version": "1.0.1",
        "frame_count": "5",
    }
    items = []
    for index in range(count):
        text = draw(7 + 20 * index, TEXT_DIM).bfloat16()
        tensors = {f"latents_{size}_float32": draw(channels, *grid)}
        extra = clip = None
        if kind in {"i2v", "flf2v", "fun-control-v1.1"}:
            # the known tuners name the features' tensor after the dtype of the latents; they are float16
            clip = draw(514 if kind == "flf2v" else 257, CLIP_DIM).half()
            tensors["clip_bfloat16"] = clip
        if clip is not None or kind.endswith("-2.2"):
            extra = tensors[f"latents_image_{size}_float32"] = draw(20, *GRID)
        if kind.startswith("fun-control"):
            control = tensors[f"latents_control_{size}_float32"] = draw(16, *GRID)
            image = torch.zeros(16, *GRID)
            if extra is None:
                clip = torch.zeros(257, CLIP_DIM)
            else:
                image[:, 0] = extra[4:, 0]
            extra = torch.cat([control, extra if extra is not None and kind.endswith("-2.2") else image])
        save_file(
            tensors, folder / "cache" / f"clip {index}_00000-005_{width:04d}x0032_wan.safetensors", metadata
        )
        caption = {"architecture": "wan", "caption1": f"caption {index}", "format_version": "1.0.1"}
        save_file(
            {"varlen_t5_bfloat16": text}, folder / "cache" / f"clip {index}_wan_te.safetensors", caption
        )
        items.append(Item(tensors[f"latents_{size}_float32"], text, clip, extra))
    return Project(folder, kind, items)


def train(
    project: Project, *arguments: object, steps: int = 2, name: str = "lora", dits: Sequence[object] = ()
) -> list[Path]:
    """Train a LoRA in float32; the files after each step. dits: options instead of --dit."""
    network = ["--network_module", "networks.lora_wan", "--network_dim", RANK, "--network_alpha", ALPHA]
    run = ["--max_train_steps", steps, "--save_every_n_steps", 1, "--seed", SEED, "--sdpa"]
    run += ["--max_data_loader_n_workers", 0, "--output_dir", "out", "--output_name", name]
    files = [*(dits or ("--dit", project.dit)), "--dataset_config", "dataset.toml"]
    options = ["--task", project.task, *files, *network, *run, *arguments]
    succeed_here("wan_train_network.py", *options, folder=project.folder)
    early = [project.folder / "out" / f"{name}-step{step:08d}.safetensors" for step in range(1, steps)]
    return [*early, project.folder / "out" / f"{name}.safetensors"]
