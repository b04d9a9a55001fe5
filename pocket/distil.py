"""Distil the pocket Wan: 4 steps without guidance in place of 12 with it, for trials of targets.

python -m pocket.distil FOLDER      writes FOLDER/turbo.safetensors

The pocket model makes clips with guidance 3 in 12 Euler steps at shift 3, of noise and captions. At every
step on such a way the student learns the mean velocity over the next quarter of the way: so 4 steps without
guidance lead where the teacher's 12 steps with guidance do. This is one stage of progressive distillation
(Salimans and Ho 2022, arXiv 2202.00512) that starts from every step of the way; released models were
distilled in other ways.
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.writing import save_tensors
from modules.command import command_line
from modules.seeds import derive_seed
from pocket import drawing
from pocket.captions import PLAIN, caption, plain
from pocket.muon import Muon
from protocols.loading import Placement
from protocols.requests import Prompt
from wan.checkpoints import load_dit
from wan.model import WanModel
from wan.t5 import WanTextEncoder

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
LATENT_SIZE = (16, 5, 8, 8)
TEACHER_STEPS, STUDENT_STEPS = 12, 4
STRIDE = TEACHER_STEPS // STUDENT_STEPS  # steps of the teacher in one of the student
GUIDANCE, SHIFT = 3.0, 3.0
WITHOUT_CAPTION = 0.05  # share of ways for the empty caption; guidance changes nothing there
WAYS_AT_ONCE, BATCH = 64, 16
THOUSAND = 1000


@dataclass(frozen=True)
class Settings:
    """Amounts to make and to learn."""

    folder: Path
    ways: int
    steps: int
    rate: float
    seed: int
    threads: int


@dataclass(frozen=True)
class Ways:
    """Ways of the teacher from noise to clips."""

    latents: Tensor  # N TEACHER_STEPS+1 C F H W, float16
    captions: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Distill the pocket Wan with the options of the command line, or of `argv`, and save the student."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--ways", type=int, default=768, help="clips that the teacher makes")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the student")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="number of PyTorch's threads")
    settings = Settings(**vars(parser.parse_args(argv)))
    torch.set_num_threads(settings.threads)
    distil(settings)


def distil(settings: Settings) -> Path:
    """Return the path of the student's transformer, which is written unless it is there."""
    path = settings.folder / "turbo.safetensors"
    if path.exists():
        return path
    random = np.random.default_rng(derive_seed(settings.seed, "captions"))
    captions = [draw_caption(random) for _ in range(settings.ways)]
    texts = encode([*captions, ""])
    kept = settings.folder / "ways.safetensors"
    if not kept.exists():
        save_tensors(kept, {"latents": make_ways(load_pocket(), captions, texts, settings.seed)})
    ways = Ways(load_file(kept)["latents"], captions)
    student = load_pocket()
    learn(student, ways, texts, settings)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in student.state_dict().items()}
    save_tensors(path, tensors, {"modelspec.title": "Reelsmith pocket Wan2.1 T2V, distilled to 4 steps"})
    return path


def load_pocket() -> WanModel:
    """Load the pocket model's transformer on the CPU in float32."""
    return load_dit(HERE / "dit.safetensors", Placement(CPU, torch.float32))


def draw_caption(random: np.random.Generator) -> str:
    """Return the caption of a scene of one thing, in a wording drawn at random, or an empty one."""
    scene = drawing.scene(random)
    if random.uniform() < WITHOUT_CAPTION:
        return ""
    return plain(scene.things[0]) if random.uniform() < PLAIN else caption(random, scene)


def encode(captions: Sequence[str]) -> dict[str, Tensor]:
    """Return the states of each caption, n C in float32."""
    encoder = WanTextEncoder(HERE / "t5.safetensors")
    encoder.load(CPU)
    distinct = list(dict.fromkeys(captions))
    encoded = encoder.encode([Prompt(text) for text in distinct])
    return {text: states["t5"][0].float() for text, states in zip(distinct, encoded, strict=True)}


def noise_levels() -> Tensor:
    """Return the shares of noise before each of the teacher's steps, and 0 after the last."""
    even = torch.linspace(1, 0, TEACHER_STEPS + 1)
    return SHIFT * even / (1 + (SHIFT - 1) * even)


@torch.no_grad()
def make_ways(teacher: WanModel, captions: list[str], texts: dict[str, Tensor], seed: int) -> Tensor:
    """Make clips with guidance; return every step, N TEACHER_STEPS+1 C F H W in float16."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "ways"))
    parts = []
    for start in range(0, len(captions), WAYS_AT_ONCE):
        told = [texts[text] for text in captions[start : start + WAYS_AT_ONCE]]
        noise = torch.randn(len(told), *LATENT_SIZE, generator=generator)
        parts.append(
            torch.stack([each.half() for each in guided_way(teacher, noise, told, texts[""])], dim=1)
        )
        logger.info("%d of %d clips", start + len(told), len(captions))
    return torch.cat(parts)


def guided_way(teacher: WanModel, x: Tensor, told: list[Tensor], empty: Tensor) -> Iterator[Tensor]:
    """Yield latents B C F H W before each step and after the last."""
    levels = noise_levels()
    yield x
    for level, following in itertools.pairwise(levels):
        times = level.expand(2 * len(x)) * THOUSAND
        with torch.autocast("cpu", torch.bfloat16):
            both = teacher(torch.cat([x, x]), times, [*told, *[empty] * len(x)])
        with_text, without = both.float().chunk(2)
        x = x + (following - level) * (without + GUIDANCE * (with_text - without))
        yield x


def learn(student: WanModel, ways: Ways, texts: dict[str, Tensor], settings: Settings) -> None:
    """Train all weights of the student towards the mean velocity over STRIDE steps of the teacher."""
    levels = noise_levels()
    student.train().requires_grad_(True)
    optimizer = Muon(student.parameters(), lr=settings.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Decay(settings.steps))
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "batches"))
    losses = []
    for number in range(settings.steps):
        rows = torch.randint(len(ways.captions), (BATCH,), generator=generator)
        begins = torch.randint(TEACHER_STEPS, (BATCH,), generator=generator)
        begins[::2] -= begins[::2] % STRIDE  # half of them are steps that the student will take
        ends = (begins + STRIDE).clamp(max=TEACHER_STEPS)
        x = ways.latents[rows, begins].float()
        distance = (levels[begins] - levels[ends]).view(-1, 1, 1, 1, 1)
        velocity = (x - ways.latents[rows, ends].float()) / distance
        told = [texts[ways.captions[row]] for row in rows.tolist()]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = student(x, levels[begins] * THOUSAND, told)
        loss = (predicted.float() - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (number + 1) % 50 == 0:
            logger.info("step %d of %d, loss %.4f", number + 1, settings.steps, float(np.mean(losses[-50:])))
    student.eval().requires_grad_(False)


@dataclass(frozen=True)
class Decay:
    """A learning rate that falls to 0 over the last four fifths, as in the training of the pocket model."""

    steps: int

    def __call__(self, step: int) -> float:
        """Return the factor on the rate at `step`: 1 for the first fifth, then a straight line to 0."""
        return min(1.0, (self.steps - step) / (0.8 * self.steps))


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    command_line(main)
