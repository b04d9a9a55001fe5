"""A family's project in a folder, and what its commands make of it, within the process of a test."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.faults.messages import succeed_here
from tests.tiny.families import TinyFamily

RUN = ("--output_name", "x", "--seed", "1", "--max_data_loader_n_workers", "0", "--max_train_steps", "3")
SIZE = ("--video_size", "32", "32", "--infer_steps", "3", "--guidance_scale", "3")
Latents = dict[str, Tensor]  # of a video or picture, and of its sound if there is some


@dataclass(frozen=True)
class TinyProject:
    """A folder with the models, data and caches of a family."""

    family: TinyFamily
    folder: Path

    def run(self, script: str, *words: object) -> str:
        """Run a script that has to succeed; return what it said."""
        return succeed_here(script, *words, folder=self.folder)

    def train(self, output: str | Path, *words: object) -> dict[str, Tensor]:
        """Train into a folder, three steps by default; return the tensors of the LoRA."""
        self.run(*self.family.train, *RUN, "--output_dir", output, *words)
        return load_file(self.folder / output / "x.safetensors")

    def generate(self, output: str | Path, *words: object) -> list[Latents]:
        """Return the latents of all that is made."""
        latents = ("--output_type", "latent", "--save_path", output)
        self.run(*self.family.generate, *SIZE, *latents, *words)
        return [load_file(path) for path in sorted((self.folder / output).glob("*.safetensors"))]


def make_project(
    family: TinyFamily, folder: Path, write: Callable[[TinyFamily, Path], None] | None = None
) -> TinyProject:
    """Write a family's models, a line of prompts and its caches. write: models and data otherwise."""
    if write is None:
        family.prepare(folder)
    else:
        write(family, folder)
    (folder / "prompts.txt").write_text(f"# a comment\n{family.sample_line}\n", encoding="utf-8")
    made = TinyProject(family, folder)
    made.run(*family.cache_latents)
    made.run(*family.cache_texts)
    return made
