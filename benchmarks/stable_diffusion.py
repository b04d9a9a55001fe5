"""Compare a training step of Stable Diffusion with a plain loop.

    pip install peft
    python benchmarks/stable_diffusion.py

The plain loop is what examples of diffusers do: the same U-Net with a LoRA of PEFT on the same layers, noise
from a DDPM scheduler, forward, backward, clipping, AdamW. --learns says what both train instead of a LoRA,
for which PEFT is not needed: all weights of the U-Net; a ControlNet-LLLite, whose plain modules stand below;
a new word, for which the plain loop learns the whole table of words and puts the other rows back after each
step, as examples do. The batch of the plain loop is ready. Ours is the script's own loop, with caches, noise,
weights of the loss, logs. Both run in turn in one process, the plain loop first in each round; the figure is
the median ratio of neighbors' processor seconds, of all threads. Peaks are of resident memory during steps,
with the network and all that was loaded before them and is still there, without the libraries (all modules of
both are loaded first); each in processes of its own, of which the median counts.
"""

import argparse
import contextlib
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.process_memory import (  # noqa: E402
    compare_peaks,
    is_known,
    memory,
    peak,
    run_child,
    start_of_peak,
)

BAR, MEMORY_BAR = 1.1, 1.0
OTHER_BAR = 1.05  # of both, for what is no LoRA
LORA, FULL, LLLITE, WORD = "lora", "whole", "lllite", "word"
NEW_WORD = "zzword"
EMBEDDED, PROJECTED = 32, 64  # numbers of a ControlNet-LLLite
RANK, ALPHA = 8, 8
# the tests' tiny networks, with a wider U-Net
SIZES: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (128, 256)},
    "sdxl": {"block_out_channels": (64, 256), "attention_head_dim": (1, 4)},
}
FOLDERS = {"sd": "sd1", "sdxl": "sdxl"}
MODULES = "modules.json"  # names of modules that both need, in the benchmark's folder
Step = Callable[[], None]


def main() -> None:
    """Print the ratios of speed and memory, or a profile of one of both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=list(SIZES), default="sdxl", help="which line of models")
    parser.add_argument("--size", type=int, default=256, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images of a step")
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds; each times both")
    parser.add_argument("--steps", type=int, default=3, help="steps of each kind in a round")
    parser.add_argument(
        "--rounds_of_memory", type=int, default=5, help="processes of each kind whose peaks count"
    )
    parser.add_argument(
        "--precision", default="no", choices=["no", "bf16"], help="value of --mixed_precision"
    )
    parser.add_argument("--learns", choices=[LORA, FULL, LLLITE, WORD], default=LORA, help="what both train")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--profile", choices=["plain", "ours"], help="print where the time of one goes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    needed = {LLLITE: "sdxl", WORD: "sd"}.get(args.learns, args.kind)
    if args.kind != needed:
        parser.error(f"--learns {args.learns} is compared with --kind {needed}")
    if args.child:
        kind, folder = args.child
        if kind == "modules":
            list_modules(Path(folder), args)
        else:
            measure_peak(kind, Path(folder), args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_project(folder, args)
        if args.profile:
            profile(folder, args)
            return
        ratio = compare_speed(folder, args)
        more = compare_memory(folder, args)
    speed_bar, memory_bar = bars_of(args)
    raise SystemExit(ratio > speed_bar or more > memory_bar)


def bars_of(args: argparse.Namespace) -> tuple[float, float]:
    """Return the maximum ratios of our seconds and of our memory to the plain loop's."""
    return (BAR, MEMORY_BAR) if args.learns == LORA else (OTHER_BAR, OTHER_BAR)


def write_project(folder: Path, args: argparse.Namespace) -> None:
    """Write a checkpoint in the layout of diffusers, tokenizers, images and their dataset file."""
    import numpy as np
    from PIL import Image

    from tests.tiny.stable_diffusion import tokenizer_folder, write_folder

    write_folder(FOLDERS[args.kind], folder / "model", **SIZES[args.kind])
    tokenizer_folder(folder / "tokenizers")
    for name in ("images", "controls"):
        (folder / name).mkdir()
    generator = np.random.default_rng(0)
    for number in range(2 * args.batch):
        pixels = generator.integers(0, 255, (args.size, args.size, 3), dtype=np.uint8)
        for name in ("images", "controls"):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
        caption = f"a {NEW_WORD}, number {number}"
        (folder / "images" / f"{number}.txt").write_text(caption, encoding="utf-8")
    controls = f'conditioning_data_dir = "{(folder / "controls").as_posix()}"' * (args.learns == LLLITE)
    (folder / "dataset.toml").write_text(
        f"""[general]
resolution = {args.size}
caption_extension = ".txt"
num_repeats = 5000

[[datasets]]
batch_size = {args.batch}

[[datasets.subsets]]
image_dir = "{(folder / "images").as_posix()}"
{controls}
""",
        encoding="utf-8",
    )


def compare_speed(folder: Path, args: argparse.Namespace) -> float:
    """Print the processor seconds per step of both, and return the median ratio of ours to theirs."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    with started_step(folder, args) as ours:
        steps = {"plain": make_plain_step(folder, args), "ours": ours}
        for step in steps.values():
            time_of(2, step)  # warm up
        for _ in range(args.rounds):
            for name, step in steps.items():
                seconds[name].append(time_of(args.steps, step))
    plain, loop = seconds["plain"], seconds["ours"]
    for name, times in seconds.items():
        print(f"{name}: {statistics.median(times):.4f} processor seconds a step")
    ratio = statistics.median(mine / theirs for mine, theirs in zip(loop, plain, strict=True))
    print(f"ratio {ratio:.3f}, of the fastest rounds {min(loop) / min(plain):.3f}; bar {bars_of(args)[0]}")
    return ratio


def time_of(count: int, step: Step) -> float:
    """Return the processor seconds per step, of all threads."""
    began = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - began) / count


def make_plain_step(folder: Path, args: argparse.Namespace) -> Step:
    """Return a step as examples of diffusers write it, on a prepared batch."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    kept = torch.float32 if args.learns == FULL else dtype
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "model" / "unet", torch_dtype=kept)
    learner: Any = unet
    if args.learns == LORA:
        add_plain_lora(unet)
    elif args.learns == LLLITE:
        learner = add_plain_lllite(unet, torch.rand(args.batch, 3, args.size, args.size) * 2 - 1)
    elif args.learns == WORD:
        unet.requires_grad_(False)
        learner = PlainWord(folder / "model" / "text_encoder", args.batch)
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    trained = [parameter.requires_grad_() for parameter in learner.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    side = args.size // 8
    latents = torch.randn(args.batch, 4, side, side)
    context = torch.randn(args.batch, 77, unet.config.cross_attention_dim, dtype=dtype)
    added: dict[str, Any] | None = None
    if args.kind == "sdxl":
        width = unet.add_embedding.linear_1.in_features - 6 * unet.add_time_proj.num_channels
        sizes = torch.tensor([[args.size, args.size, 0, 0, args.size, args.size]] * args.batch, dtype=dtype)
        added = {"text_embeds": torch.randn(args.batch, width, dtype=dtype), "time_ids": sizes}
    autocast = torch.autocast("cpu", dtype) if args.precision == "bf16" else contextlib.nullcontext()

    def step() -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (args.batch,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with autocast:
            output = unet(
                noisy.to(dtype),
                timesteps,
                encoder_hidden_states=learner() if args.learns == WORD else context,
                added_cond_kwargs=added,
            ).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.learns == WORD:
            learner.restore()

    return step


def add_plain_lora(unet: Any) -> None:
    """Add a LoRA of PEFT to all layers inside transformers, as ours, and freeze the rest."""
    import torch
    from peft import LoraConfig

    unet.requires_grad_(False)
    paths = [
        path
        for path, module in unet.named_modules()
        if ".attentions." in path and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=paths))


def add_plain_lllite(unet: Any, controls: Any) -> Any:
    """Put plain modules before the same layers as ours, and return them. `controls` are B 3 H W."""
    import torch

    from stable_diffusion.lllite_modules import find_layer_path, plan_lllite

    unet.requires_grad_(False)
    modules = torch.nn.ModuleList()
    for name, part in plan_lllite(unet, EMBEDDED, PROJECTED).items():
        path = find_layer_path(name) or ""
        layer = unet.get_submodule(path)
        module = make_plain_lllite(part)
        modules.append(module)

        def change(_: Any, inputs: Any, module: Any = module) -> Any:
            embedding = module["embed"](controls).flatten(2).transpose(1, 2)
            down = torch.relu(module["down"](inputs[0]))
            middle = torch.relu(module["mid"](torch.cat([embedding, down], dim=2)))
            return (inputs[0] + module["up"](middle), *inputs[1:])

        layer.register_forward_pre_hook(change)
    return modules


def make_plain_lllite(part: Any) -> Any:
    """Return the layers of one module. `part` has its dimensions."""
    import torch

    layers: list[Any] = []
    channels = 3
    for width, stride in part.convolutions:
        layers += [torch.nn.Conv2d(channels, width, kernel_size=stride, stride=stride), torch.nn.ReLU()]
        channels = width
    return torch.nn.ModuleDict(
        {
            "embed": torch.nn.Sequential(*layers[:-1]),
            "down": torch.nn.Linear(part.width, part.rank),
            "mid": torch.nn.Linear(part.rank + channels, part.rank),
            "up": torch.nn.Linear(part.rank, part.width),
        }
    )


class PlainWord:
    """A text encoder of transformers with one more row, of which only that row is kept after each step."""

    def __init__(self, folder: Path, batch: int) -> None:
        import torch
        from transformers import CLIPTextModel

        self.encoder: Any = CLIPTextModel.from_pretrained(folder)
        self.encoder.resize_token_embeddings(self.encoder.config.vocab_size + 1)
        self.encoder.requires_grad_(False)
        self.table: Any = self.encoder.get_input_embeddings().weight.requires_grad_()
        self.rows = self.table.detach().clone()
        self.ids = torch.randint(0, len(self.rows), (batch, 77))

    def parameters(self) -> list[Any]:
        """Return the trained table of words."""
        return [self.table]

    def __call__(self) -> Any:
        """Return the states of the prompt."""
        return self.encoder(self.ids)[0]

    def restore(self) -> None:
        """Restore all rows except the last, which is the new word's."""
        self.table.data[:-1] = self.rows[:-1]


@contextlib.contextmanager
def started_step(folder: Path, args: argparse.Namespace) -> Iterator[Step]:
    """Yield a step of the script's loop, which trains the U-Net from caches in memory."""
    from protocols.families import FAMILIES
    from training.image_options import CHECKPOINT_TRAINER, NOISE_TRAINER, read_image_training
    from training.learning_options import FullDitOptions
    from training.loop import advance
    from training.run import prepare_run

    entry = FAMILIES[FOLDERS[args.kind]]
    words = {
        "pretrained_model_name_or_path": folder / "model",
        "tokenizer_cache_dir": folder / "tokenizers",
        "dataset_config": folder / "dataset.toml",
        "learning_rate": 1e-4,
        "max_train_steps": 100000,
        "mixed_precision": args.precision,
        "output_dir": folder / "output",
        "output_name": "x",
        "seed": 1,
    }
    typed = [text for name, value in words.items() for text in (f"--{name}", str(value))]
    typed.append("--cache_latents")
    if args.learns != WORD:
        typed.append("--cache_text_encoder_outputs")
    if args.checkpointing:
        typed.append("--gradient_checkpointing")
    if args.learns == LLLITE:
        from sdxl_train_control_net_lllite import DEFAULTS as CONTROL_TRAINER

        typed += ["--cond_emb_dim", str(EMBEDDED), "--network_dim", str(PROJECTED)]
        record = entry.options_record("LlliteTraining")
        options, family_options, _ = read_image_training("", record, CONTROL_TRAINER, typed)
    elif args.learns == WORD:
        from train_textual_inversion import DEFAULTS as WORD_TRAINER

        typed += ["--token_string", NEW_WORD]
        record = entry.options_record("InversionTraining")
        options, family_options, _ = read_image_training("", record, WORD_TRAINER, typed)
    elif args.learns == FULL:
        record = entry.options_record("FullTraining" if args.kind == "sdxl" else "FineTuning")
        options, family_options, _ = read_image_training(
            "", record, CHECKPOINT_TRAINER, typed, trained_options=FullDitOptions
        )
    else:
        typed += ["--network_dim", str(RANK), "--network_alpha", str(ALPHA), "--network_train_unet_only"]
        record = entry.options_record("Training")
        options, family_options, _ = read_image_training("", record, NOISE_TRAINER, typed)
    family = entry.make_family("training", family_options)
    with (
        prepare_run(family, options) as run,
        contextlib.closing(run.feed.start(0, 0)) as micro_batches,
    ):
        groups = run.steps.batches_by_step(0)

        def step() -> None:
            advance(run, next(groups), micro_batches)

        yield step


def compare_memory(folder: Path, args: argparse.Namespace) -> float:
    """Print the peaks of both, and return the ratio of ours to theirs.

    Returns 0 if the system does not report them.
    """
    if is_known():
        run_child("modules", folder)
    return compare_peaks(
        ("plain", "ours"), folder, "peak of steps", bars_of(args)[1], rounds=args.rounds_of_memory
    )


def list_modules(folder: Path, args: argparse.Namespace) -> None:
    """Take a step of both as a child process, and write the names of all modules that they need."""
    make_plain_step(folder, args)()
    with started_step(folder, args) as step:
        step()
    names = [name for name in sys.modules if name != "__main__"]
    (folder / MODULES).write_text(json.dumps(names), encoding="utf-8")
    print(0)


def measure_peak(kind: str, folder: Path, args: argparse.Namespace) -> None:
    """Take a few steps as a child process, and print the peak of resident bytes in them."""
    # loaded before both, as ours needs more modules
    for name in json.loads((folder / MODULES).read_text(encoding="utf-8")):
        with contextlib.suppress(Exception):  # modules that libraries make while they run
            importlib.import_module(name)
    gc.collect()
    before = memory("VmRSS")
    with contextlib.ExitStack() as stack:
        if kind == "ours":
            step = stack.enter_context(started_step(folder, args))
        else:
            step = make_plain_step(folder, args)
        start_of_peak()
        for _ in range(4):
            step()
        highest = peak() - before
    print(json.dumps(highest))


def profile(folder: Path, args: argparse.Namespace) -> None:
    """Print the functions in which one of both spends its time."""
    import cProfile
    import pstats

    with contextlib.ExitStack() as stack:
        if args.profile == "ours":
            step = stack.enter_context(started_step(folder, args))
        else:
            step = make_plain_step(folder, args)
        time_of(2, step)
        watch = cProfile.Profile()
        watch.runcall(time_of, args.rounds * args.steps, step)
    pstats.Stats(watch).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
