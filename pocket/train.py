"""Make the pocket Wan from nothing: draw clips, train VAE, text encoder and transformer, write the files.

python -m pocket.train                  work in build/pocket, copy dit, vae, t5 and tokenizer to pocket/;
                                        run it again to resume
python -m pocket.train --steps 40000    train longer, on a GPU
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import wan_cache_latents
import wan_cache_text_encoder_outputs
from checkpoints.opening import open_checkpoint
from checkpoints.writing import save_tensors
from modules.command import command_line
from modules.layers.rope import rotation_angles
from modules.options import read_options
from modules.parser import add_options
from pocket import train_text, train_vae
from pocket.clips import write_clips, write_dataset
from pocket.footage import real_clips
from training.learning_options import FullDitOptions
from training.loop import train
from training.options import TrainingOptions, read_arguments, training_parser
from training.run import prepare_run
from wan.configs import WanConfig
from wan.family import family_for_training
from wan.model import WanModel
from wan.options import WanTrainingOptions

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
DIT = WanConfig(
    dim=128,
    ffn_dim=512,
    freq_dim=256,
    text_dim=train_text.CONFIG.dim,
    num_heads=1,
    num_layers=8,
    in_dim=16,
    out_dim=16,
)
BATCH = 32
# Where each block's attention looks at the start of training: offset in tokens along frames, rows, columns
LOOKS = ((-1, 0, 0), (1, 0, 0), (0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0))
LOOK_STRENGTH = 1.8  # of these biases; queries and keys are about 1
SHARPEST = 0.1  # radians per token: slower turns say little about the distance of neighbors


@dataclass(frozen=True)
class Settings:
    """Amounts to make and to learn."""

    work: Path
    clips: int
    steps: int
    rate: float
    seed: int
    threads: int
    precision: str  # of the transformer's training: no or bf16


def main(argv: Sequence[str] | None = None) -> None:
    """Make clips, train the three networks of the pocket model and write their files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/pocket"), help="folder of clips, caches and states"
    )
    parser.add_argument("--clips", type=int, default=6000, help="number of clips to train the transformer on")
    parser.add_argument("--steps", type=int, default=18000, help="training steps of the transformer")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="number of PyTorch's threads")
    parser.add_argument(
        "--precision", choices=("no", "bf16"), default="bf16", help="precision of the transformer's training"
    )
    settings = Settings(**vars(parser.parse_args(argv)))
    torch.set_num_threads(settings.threads)
    make(settings)


def make(settings: Settings) -> None:
    """Run every stage whose result is missing, in order."""
    work = settings.work
    vae, t5 = work / "vae" / "vae.safetensors", work / "text" / "t5.safetensors"
    write_clips(work / "clips", settings.clips, settings.seed)
    dataset = write_dataset(work, BATCH)
    footage = {path.stem.split("_")[0]: path for path in real_clips().values()}
    train_vae.train(vae.parent, footage, seed=settings.seed)
    if not t5.exists():
        train_text.train(t5.parent, seed=settings.seed)
    cache(dataset, vae, t5)
    dit = train_dit(settings, dataset, vae, t5)
    for path in (dit, vae, t5):
        shutil.copyfile(path, HERE / path.name)
    shutil.copytree(t5.parent / "tokenizer", HERE / "tokenizer", dirs_exist_ok=True)


def cache(dataset: Path, vae: Path, t5: Path) -> None:
    """Cache latents and text embeddings with the scripts that any dataset uses."""
    common = ["--dataset_config", str(dataset), "--skip_existing"]
    wan_cache_latents.main([*common, "--vae", str(vae), "--vae_dtype", "float32"])
    wan_cache_text_encoder_outputs.main([*common, "--t5", str(t5), "--batch_size", "64"])


def train_dit(settings: Settings, dataset: Path, vae: Path, t5: Path) -> Path:
    """Train all weights of a new transformer with the project's own loop.

    Returns the path of dit.safetensors (bfloat16).
    """
    output, start = settings.work / "dit", settings.work / "dit" / "random.safetensors"
    if not start.exists():
        write_random_dit(start, settings.seed)
    parser = training_parser(__doc__, FullDitOptions)
    add_options(parser, WanTrainingOptions)
    args = read_arguments(parser, dit_options(settings, dataset, start, vae, t5))
    family = family_for_training(read_options(WanTrainingOptions, args))
    with prepare_run(family, read_options(TrainingOptions, args)) as run:
        if not train(run):
            raise SystemExit(0)  # stopped on request; the next run resumes
    with open_checkpoint(output / "trained.safetensors") as trained:
        tensors = {name: trained.read(name).to(torch.bfloat16) for name in trained.tensors}
    save_tensors(output / "dit.safetensors", tensors, {"modelspec.title": "Reelsmith pocket Wan2.1 T2V"})
    return output / "dit.safetensors"


def dit_options(settings: Settings, dataset: Path, start: Path, vae: Path, t5: Path) -> list[str]:
    """Return the options of the transformer's training. It resumes from a state in its folder, if any."""
    output = settings.work / "dit"
    models = ["--task", "t2v-1.3B", "--dit", str(start), "--vae", str(vae), "--t5", str(t5), "--sdpa"]
    times = [
        "--timestep_sampling",
        "shift",
        "--discrete_flow_shift",
        "3.0",
        "--num_timestep_buckets",
        str(BATCH),
    ]
    precision = ["--mixed_precision", settings.precision]
    learning = [
        "--optimizer_type",
        "pocket.muon.Muon",
        "--learning_rate",
        str(settings.rate),
        "--max_train_steps",
        str(settings.steps),
    ]
    schedule = [
        "--lr_scheduler",
        "warmup_stable_decay",
        "--lr_warmup_steps",
        "0.02",
        "--lr_decay_steps",
        "0.8",
    ]
    saving = [
        "--save_every_n_steps",
        "500",
        "--save_last_n_steps",
        "500",
        "--save_state",
        "--save_precision",
        "float",
    ]
    names = [
        "--output_dir",
        str(output),
        "--output_name",
        "trained",
        "--logging_dir",
        str(settings.work / "logs"),
    ]
    resume = ["--resume", "latest"] if any(output.glob("*-state")) else []
    rest = [
        "--dataset_config",
        str(dataset),
        "--seed",
        str(settings.seed),
        "--max_data_loader_n_workers",
        "1",
    ]
    return [*models, *times, *precision, *learning, *schedule, *saving, *names, *rest, *resume]


def write_random_dit(path: Path, seed: int) -> None:
    """Write a transformer that predicts 0: Xavier weights, a zero last layer.

    Each block attends to one neighbor. Positions enter only through the rotary turns; biases of query and
    key that agree up to the turn of one step make a block look there from the beginning, which it otherwise
    takes long to learn: about a quarter fewer steps to the same loss.
    """
    torch.manual_seed(seed)
    dit = WanModel(DIT)
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(dit.head.head.weight)
    width = DIT.dim // DIT.num_heads
    side = 2 * (width // 6)
    axes = (width - 2 * side, side, side)
    # D/2 pairs x 3 axes: the turn of one step along each axis
    steps = torch.block_diag(
        *(rotation_angles(torch.arange(2, dtype=torch.float64), axis)[1:].T for axis in axes)
    )
    sharp = LOOK_STRENGTH * (steps.sum(1) > SHARPEST)  # D/2
    with torch.no_grad():
        for index, block in enumerate(dit.blocks):
            turns = steps @ torch.tensor(LOOKS[index % len(LOOKS)], dtype=steps.dtype)
            query, key = (
                torch.stack([sharp * angle.cos(), sharp * angle.sin()], dim=1) for angle in (turns, 0 * turns)
            )
            block.self_attn.q.bias.copy_(query.flatten().repeat(DIT.num_heads))
            block.self_attn.k.bias.copy_(key.flatten().repeat(DIT.num_heads))
    save_tensors(path, dit.state_dict())


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    command_line(main)
