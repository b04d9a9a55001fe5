"""Print the tables of docs/small_cards.md: bases in int8 and 4 bits on cards of 8 to 16 GB.

    python benchmarks/small_cards.py           what `--plan` predicts for each card and large model
    python benchmarks/small_cards.py --cost    what each form costs in quality, on two small models

A plan takes a minute; nothing is measured on a GPU. The models are headers of the released files followed by
holes (tests/manifests.py), which take no space on disk.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402  # found from here on

from benchmarks.gpu_rows import (  # noqa: E402
    CHECKPOINTED,
    FLUX,
    FLUX_2,
    FLUX_3,
    HUNYUAN,
    HUNYUAN_IMAGE,
    INT8,
    KREA_2,
    LARGE,
    LTX_2,
    LTX_CLIP,
    MOSS_IMAGE,
    NF4,
    OFFLOADED,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    SMALL,
    SQUARE,
    TRAINING,
    WAN_14B,
    Z_IMAGE,
    Row,
    Size,
)
from benchmarks.gpu_steps import (  # noqa: E402
    lay_out,
    random_batch,  # noqa: E402
    training_family,  # noqa: E402
    vae_of,
)
from modules.devices import GIB  # noqa: E402
from modules.options import Options, option, read_options  # noqa: E402
from modules.parser import Parser, add_options  # noqa: E402
from protocols.data import Batch  # noqa: E402
from runtime.planning.device_memory import DeviceMemory  # noqa: E402
from runtime.planning.memory_plan import smallest_swap  # noqa: E402
from training.experts import choose_placement  # noqa: E402
from training.planning.memory import MemoryPrediction, predict_memory  # noqa: E402

CPU = torch.device("cpu")
CARDS = (8, 10, 12, 16)  # GiB
OFFLOADED_NF4: tuple[str, ...] = (*NF4, *OFFLOADED)
# what the page calls the options, so that a row can be read
SHORT = {**dict.fromkeys(INT8, "int8"), **dict.fromkeys(NF4, "nf4"), **dict.fromkeys(OFFLOADED, "offload")}
RANK_16 = ("--network_dim", "16", "--optimizer_type", "adamw8bit")
ROWS = tuple(
    Row(model.name, TRAINING, model, size, "", (*CHECKPOINTED, *RANK_16), tokens)
    for model, size, tokens in (
        (WAN_14B, SMALL, 256),
        (HUNYUAN, Size(960, 544, 33), 256),
        (LTX_2, LTX_CLIP, 256),
        (QWEN_IMAGE, SQUARE, 256),
        (FLUX_2, SQUARE, 512),
        (FLUX_3, SQUARE, 320),  # a multiple of 80, as its texts have
        (FLUX, SQUARE, 512),
        (KREA_2, SQUARE, 256),
        (QWEN_IMAGE_21, SQUARE, 256),
        (MOSS_IMAGE, SQUARE, 256),
        (Z_IMAGE, SQUARE, 256),
        (HUNYUAN_IMAGE, LARGE, 256),
    )
)


class SmallCardOptions(Options):
    """What is printed."""

    cost: bool = option("print what each form costs in quality, in place of the memory")


def main() -> None:
    """Print the table of memory, or with --cost that of quality."""
    parser = Parser(description=__doc__)
    add_options(parser, SmallCardOptions)
    if read_options(SmallCardOptions, parser.parse_args()).cost:
        print_costs()
        return
    print(f"| | {' | '.join(f'{card} GB' for card in CARDS)} |\n|---|{'---|' * len(CARDS)}")
    for row in ROWS:
        print(f"| {about(row)} | {' | '.join(cells(row))} |", flush=True)


def about(row: Row) -> str:
    """Return the model and size of a row, in words."""
    return f"{row.model.name}, {row.size}"


def cells(row: Row) -> Iterator[str]:
    """Yield the text of each card's cell."""
    made: dict[tuple[str, ...], MemoryPrediction] = {}

    def plan(way: tuple[str, ...]) -> MemoryPrediction:
        if way not in made:
            with tempfile.TemporaryDirectory() as folder:
                asked = replace(row, options=(*row.options, *way, *vae_of(row, Path(folder))))
                options, family = training_family(asked, lay_out(row, Path(folder))[0])
                made[way] = predict_memory(family, options, random_batch(row, family), CPU)
        return made[way]

    found = [choose(plan, DeviceMemory("", card * GIB, card * GIB).usable) for card in reversed(CARDS)]
    yield from reversed(found)


def choose(plan: Callable[[tuple[str, ...]], MemoryPrediction], usable: int) -> str:
    """Return the options of the form that fits into this many bytes.

    It is int8 or nf4 if no block has to be swapped, else nf4 with the fewest blocks swapped. int8 is not
    planned if nf4, which is smaller, does not fit.
    """
    if plan(NF4).device_bytes(0) <= usable:
        way = INT8 if plan(INT8).device_bytes(0) <= usable else NF4
        return cell(way, plan(way), 0)
    found = [(smallest_swap(plan(way), usable), way) for way in (NF4, OFFLOADED_NF4)]
    swaps = [(blocks, way) for blocks, way in found if blocks is not None]
    if not swaps:
        return "does not fit"
    blocks, way = min(swaps, key=lambda each: each[0])  # of equal ones the plain one
    return cell(way, plan(way), blocks)


def cell(way: Sequence[str], prediction: MemoryPrediction, blocks: int) -> str:
    """Return the short names of the options, the GiB of the device, and in brackets those of the host."""
    phase = prediction.phase(blocks)
    words = [SHORT[word] for word in way]
    words += [f"swap {blocks}"] if blocks else []
    host = f" ({phase.host / GIB:.1f})" if phase.host else ""
    return f"{', '.join(words)}: {phase.device / GIB:.1f}{host}"


# What the forms cost

FORMS: Mapping[str, tuple[str, ...]] = {
    "fp8, a plain cast": ("--fp8_base",),
    "fp8, a scale per row": ("--fp8_base", "--fp8_scaled"),
    "int8 (ConvRot)": INT8,
    "nf4": NF4,
}
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
CLIPS = 4


def print_costs() -> None:
    """Print by how much the network's output and the loss differ from those in bf16, without any training."""
    from tests.tiny.wan_dit import tiny_state, write_dit  # as the tests make it

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tiny = write_dit(folder, tiny_state("t2v", dtype=torch.bfloat16, num_layers=4))
        pocket = ROOT / "pocket" / "dit.safetensors"
        models = {"tiny": (tiny, random_clips()), "pocket": (pocket, pocket_clips(folder))}
        print("| | output, tiny | output, pocket | loss, pocket |\n|---|---|---|---|")
        plain = {name: run(path, (), clips) for name, (path, clips) in models.items()}
        for name, words in FORMS.items():
            found = {model: run(path, words, clips) for model, (path, clips) in models.items()}
            of_output = [
                float((found[model][0] - plain[model][0]).norm() / plain[model][0].norm()) for model in models
            ]
            of_loss = found["pocket"][1] / plain["pocket"][1] - 1
            print(f"| {name} | {of_output[0]:.2%} | {of_output[1]:.2%} | {of_loss:+.2%} |", flush=True)


def random_clips() -> list[dict[str, torch.Tensor]]:
    """Return latents and texts of random clips."""
    drawn = torch.Generator().manual_seed(0)
    return [
        {"latents": torch.randn(16, 3, 8, 8, generator=drawn), "t5": torch.randn(7, 32, generator=drawn)}
        for _ in range(CLIPS)
    ]


def pocket_clips(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Return latents and texts of clips that the pocket model knows."""
    from safetensors.torch import load_file

    from tests.pocket.test_fp8_training import cached

    cached(folder, clips=CLIPS, validation=1, batch_size=1)
    found = []
    for path in sorted((folder / "known_cache").glob("*_wan.safetensors")):
        text_encoder_path = path.with_name(f"{path.name.partition('_')[0]}_wan_te.safetensors")
        tensors = load_file(path) | load_file(text_encoder_path)
        (latents,) = (one for name, one in tensors.items() if name.startswith("latents_"))
        (texts,) = (one for name, one in tensors.items() if name.startswith("varlen_t5"))
        found.append({"latents": latents.float(), "t5": texts})
    return found


@torch.no_grad()
def run(
    path: Path, words: Sequence[str], clips: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, float]:
    """Return the velocities of all clips at all noise levels, and their mean square error."""
    row = Row("", TRAINING, replace(WAN_14B, words=("--task", "t2v-1.3B")), SMALL, "", tuple(words))
    options, family = training_family(row, path)
    dit = family.load_dit(choose_placement(options, CPU, options.speed.fp8.quantization))
    drawn, made, errors = torch.Generator().manual_seed(0), [], []
    for clip in clips:
        noise = torch.randn(1, *clip["latents"].shape, generator=drawn)
        latents = family.latent.to_model(clip["latents"][None])
        batch: Any = Batch({"latents": latents, "t5": [clip["t5"]]}, ("",), ("",))
        for sigma in SIGMAS:
            noisy, timesteps = sigma * noise + (1 - sigma) * latents, torch.full((1,), 1000 * sigma)
            with torch.autocast("cpu", torch.bfloat16):
                velocity = family.predict(dit, noisy, timesteps, family.batch_conditions(latents, batch))
            made.append(velocity.float().flatten())
            errors.append((velocity.float() - (noise - latents)).square().mean())
    return torch.cat(made), float(torch.stack(errors).mean())


if __name__ == "__main__":
    main()
