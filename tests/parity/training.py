"""A step of LoRA training, written out with diffusers' transformer after the documented formulas.

Nothing of ours is imported.
"""

import hashlib
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.parity.theirs import dit_names, pad_text

# module in our names, `blocks_0_self_attn_q` -> down (R in), up (out R)
Factors = dict[str, tuple[Tensor, Tensor]]
SEED, RANK, ALPHA = 5, 4, 3.0  # of all runs that are compared


@dataclass(frozen=True)
class Item:
    """What the caches hold of one item, without batch dimension."""

    latents: Tensor  # 16 F h w
    text: Tensor  # n D
    clip: Tensor | None = None  # I D
    extra: Tensor | None = None  # C F h w, beside the noisy latents
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # of pictures: all, by the names of batches


Kind = TypeVar("Kind", bound=Item)


@dataclass(frozen=True)
class Drawn:
    """What is random about a micro-batch. All but the noise: B."""

    noise: Tensor  # B 16 F h w
    sigmas: Tensor
    timesteps: Tensor
    weights: Tensor
    given: int = 0  # latent frames in front that are clean, fed t = 0 and left out of the loss


def stream_seed(*parts: int | str) -> int:
    """The seed of a random stream: 63 bits of the SHA-256 over its parts. Resumed runs depend on it."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


def stream(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(*parts))


def shuffled(items: Sequence[Kind], epoch: int) -> list[Kind]:
    """The order of an epoch (from 0) within the only bucket of a dataset. items: sorted by name."""
    order = list(items)
    random.Random(stream_seed(SEED, "items", epoch)).shuffle(order)
    return order


def noise_of(batch: Sequence[Item], number: int) -> Tensor:
    """The noise of micro-batch `number` of a run (from 0)."""
    return torch.randn(len(batch), *batch[0].latents.shape, generator=stream(SEED, "noise", number))


def uniform_of(batch: Sequence[Item], number: int) -> Tensor:
    """The uniform numbers that timesteps are made from: B float64."""
    return torch.rand(len(batch), generator=stream(SEED, "timesteps", number), dtype=torch.float64)


def normal_share(batch: Sequence[Item], number: int) -> Tensor:
    """The uniform numbers as a normal distribution behind a sigmoid: B float64."""
    return torch.sigmoid(torch.special.ndtri(uniform_of(batch, number).clamp(min=1e-7)))


def shifted(share: Tensor, ratio: float) -> Tensor:
    """Noise levels of these shares, in float32."""
    return (ratio * share / (1 + (ratio - 1) * share)).float()


def ratio_of(tokens: int, many: int = 4096, shift: float = 1.15) -> float:
    """By which levels of a picture of so many tokens are shifted: exp(0.5) of 256, exp(shift) of `many`."""
    return math.exp(0.5 + (tokens - 256) * (shift - 0.5) / (many - 256))


def mixed(batch: Sequence[Item], number: int, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents of micro-batch `number`, and the velocity to learn: B C F h w each."""
    latents, noise = torch.stack([item.latents for item in batch]), noise_of(batch, number)
    mix = sigmas.view(-1, 1, 1, 1, 1)
    return (1 - mix) * latents + mix * noise, noise - latents


def padded(batch: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """The texts with zeros behind the shorter ones, B L ..., and their mask, B L."""
    longest = max(len(item.text) for item in batch)
    rows = torch.nn.utils.rnn.pad_sequence([item.text for item in batch], batch_first=True)
    return rows, torch.arange(longest) < torch.tensor([[len(item.text)] for item in batch])


def read_factors(path: Path) -> tuple[Factors, float]:
    """The factors of a LoRA file in our dialect, and its alpha / rank, the same for all modules."""
    tensors = load_file(path)
    names = {name.partition(".")[0] for name in tensors}
    scales = {
        float(tensors[f"{name}.alpha"]) / tensors[f"{name}.lora_down.weight"].shape[0] for name in names
    }
    (scale,) = scales
    factors = {
        name.removeprefix("lora_unet_"): (
            tensors[f"{name}.lora_down.weight"],
            tensors[f"{name}.lora_up.weight"],
        )
        for name in names
    }
    return factors, scale


def assert_steps_of_descent(
    output: Path,
    modules: Collection[str],
    rate: float,
    gradients_at: Callable[[Factors, int], Factors],
    label: str,
    tolerance: float = 1e-4,
    share: float | None = None,
) -> None:
    """Compare two steps that saved `lora` into `output`; the rest as for `assert_descent`."""
    files = [output / "lora-step00000001.safetensors", output / "lora.safetensors"]
    assert_descent(files, modules, rate, gradients_at, label, tolerance, share=share)


def assert_descent(
    files: Sequence[Path],
    modules: Collection[str],
    rate: float,
    gradients_at: Callable[[Factors, int], Factors],
    label: str,
    tolerance: float = 1e-4,
    start: Factors | None = None,
    share: float | None = None,
) -> None:
    """Steps of plain gradient descent went where the reference's gradients point; modules without any stay.

    files: after each step. modules: all that are trained. gradients_at: by down and up, of these factors at
    the step of that number. tolerance: of the largest weight. start: before the first step; without it up is
    zero, so that the gradient of down is zero and down is what the first file holds. share: of the step's
    largest gradient, which each factor's reaches at least; None: it reaches 1e-6.
    """
    first, found = read_factors(files[0])
    assert (first.keys(), found) == (set(modules), ALPHA / RANK)
    before = start or {name: (down, torch.zeros_like(up)) for name, (down, up) in first.items()}
    for step, path in enumerate(files):
        after, _ = read_factors(path)
        gradients, worst = gradients_at(before, step), 0.0
        sizes = {name: [float(one.abs().max()) for one in pair] for name, pair in gradients.items()}
        minimum = 1e-6 if share is None else share * max(max(pair) for pair in sizes.values())
        for module in first:
            for factor in (0, 1):
                if module not in gradients:
                    assert torch.equal(after[module][factor], before[module][factor]), module
                    continue
                # keys of image tokens that are all alike (no image) cannot learn, nor down while up is zero
                is_still = module.endswith("_k_img") or (factor == 0 and not before[module][1].any())
                assert is_still or sizes[module][factor] > minimum, f"{module} learns nothing"
                expected = before[module][factor] - rate * gradients[module][factor]
                error = (after[module][factor] - expected).abs().max()
                worst = max(worst, float(error / max(expected.abs().max(), 1e-3)))
        print(f"parity {label}, step {step + 1}: {worst:.2e}")  # noqa: T201
        assert worst <= tolerance
        before = after


def changes_of_descent(dit: nn.Module, loss: Tensor, rate: float) -> dict[str, Tensor]:
    """The change of each weight that has a gradient, in one step of plain torch's SGD."""
    before = {name: weight.detach().clone() for name, weight in dit.named_parameters()}
    loss.backward()
    learned = {name: weight for name, weight in dit.named_parameters() if weight.grad is not None}
    torch.optim.SGD(learned.values(), lr=rate).step()
    return {name: weight.detach() - before[name] for name, weight in learned.items()}


def assert_step_of_all_weights(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], changes: Mapping[str, Tensor], label: str
) -> None:
    """Compare what a step added to each weight with computed changes; weights without one stay.

    Nine weights of ten have to move.
    """
    assert after.keys() == before.keys()
    worst, moved = 0.0, 0
    for name, weight in before.items():
        wanted = changes.get(name, torch.zeros_like(weight))
        # a change of a bit of the weight is the least that the file can hold
        minimum = float(weight.abs().max().clamp(min=1e-3)) * 1e-6
        error = float((after[name] - weight - wanted).abs().max())
        worst = max(worst, error / max(float(wanted.abs().max()), minimum))
        moved += bool(wanted.abs().max() > minimum)
    print(f"parity {label} whole, one step: {worst:.2e}, {moved} of {len(before)}")  # noqa: T201
    assert worst <= 1e-2
    assert moved >= 0.9 * len(before)


@contextmanager
def learning(
    dit: nn.Module, parts: Mapping[str, Sequence[str]], factors: Factors, scale: float = ALPHA / RANK
) -> Iterator[Callable[[], Factors]]:
    """Add a LoRA to each module, whose rows may be several modules there; yield what returns the gradients by
    down and up.

    parts: our name -> paths there, in the order of the rows.
    """
    learned = {name: (down.clone(), up.clone()) for name, (down, up) in factors.items()}
    hooks = []
    for name, (down, up) in learned.items():
        down.requires_grad_(), up.requires_grad_()
        heights = [len(dit.get_submodule(part).weight) for part in parts[name]]  # type: ignore[arg-type]
        for part, rows in zip(parts[name], up.split(heights), strict=True):

            def add(
                _: nn.Module, given: tuple[Tensor], out: Tensor, down: Tensor = down, rows: Tensor = rows
            ) -> Tensor:
                return out + scale * (given[0] @ down.T) @ rows.T

            hooks.append(dit.get_submodule(part).register_forward_hook(add))
    try:
        yield lambda: {name: (down.grad, up.grad) for name, (down, up) in learned.items()}
    finally:
        for hook in hooks:
            hook.remove()


def parts_of(dit_file: Path, parts_there: Callable[[str], Sequence[str]]) -> dict[str, list[str]]:
    """Every Linear of the blocks: its name in LoRA files -> its parts in diffusers' transformer.

    parts_there: our name of a tensor -> theirs, in order.
    """
    return {
        name.removesuffix(".weight").replace(".", "_"): [
            part.removesuffix(".weight") for part in parts_there(name)
        ]
        for name, tensor in load_file(dit_file).items()
        if name.startswith(("double_blocks.", "single_blocks."))
        and name.endswith(".weight")
        and tensor.ndim == 2
    }


def descent(rate: float, steps: int = 2) -> tuple[str, ...]:
    """The options of plain gradient descent that saves `lora` after each step."""
    network = ("--network_alpha", ALPHA, "--output_dir", "out", "--output_name", "lora")
    optimizer = ("--optimizer_type", "torch.optim.SGD", "--learning_rate", rate, "--max_grad_norm", 0)
    run = ("--max_train_steps", steps, "--save_every_n_steps", 1, "--seed", SEED)
    return tuple(map(str, (*network, *optimizer, *run, "--max_data_loader_n_workers", 0)))


def linear_modules(dit_file: Path) -> dict[str, str]:
    """Every Linear inside the blocks: its name in LoRA files -> its path in diffusers' transformer."""
    paths = [
        name.removesuffix(".weight")
        for name, tensor in load_file(dit_file).items()
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2
    ]
    names = dit_names([f"{path}.weight" for path in paths])
    return {path.replace(".", "_"): names[f"{path}.weight"].removesuffix(".weight") for path in paths}


@dataclass(frozen=True)
class Teacher:
    """What the frozen transformer sees, and its share of the loss."""

    batch: Sequence[Item]
    drawn: Drawn
    weight: float


def loss_and_gradients(
    dit: WanTransformer3DModel,
    modules: Mapping[str, str],
    factors: Factors,
    scale: float,
    batch: Sequence[Item],
    drawn: Drawn,
    teacher: Teacher | None = None,
) -> tuple[float, Factors]:
    """The loss of one batch and its gradients by the factors."""
    latents = torch.stack([item.latents.float() for item in batch])
    taught = None
    if teacher is not None:
        with torch.no_grad():
            taught = dit(*inputs_of(teacher.batch, teacher.drawn), return_dict=False)[0]
    with learning(dit, {name: [path] for name, path in modules.items()}, factors, scale) as found:
        predicted = dit(*inputs_of(batch, drawn), return_dict=False)[0]
        errors = (predicted - (drawn.noise - latents)).square()[:, :, drawn.given :].flatten(1).mean(1)
        if teacher is not None:
            apart = (predicted - taught).square()[:, :, teacher.drawn.given :].flatten(1).mean(1)
            errors = (1 - teacher.weight) * errors + teacher.weight * apart
        loss = (errors * drawn.weights.float()).mean()
        loss.backward()
    return float(loss.detach()), found()


def inputs_of(batch: Sequence[Item], drawn: Drawn) -> tuple[Tensor | None, ...]:
    """The transformer's inputs in order: noisy latents, timesteps, text, features of an image."""
    latents = torch.stack([item.latents.float() for item in batch])
    mix = drawn.sigmas.float().view(-1, 1, 1, 1, 1)
    noisy = (1 - mix) * latents + mix * drawn.noise
    timesteps = drawn.timesteps.float()
    if drawn.given:
        noisy[:, :, : drawn.given] = latents[:, :, : drawn.given]
        frames, rows, columns = (side // p for side, p in zip(noisy.shape[2:], (1, 2, 2), strict=True))
        timesteps = timesteps.view(-1, 1, 1).repeat(1, frames, rows * columns)  # one for each token
        timesteps[:, : drawn.given] = 0
        timesteps = timesteps.flatten(1)
    if batch[0].extra is not None:
        noisy = torch.cat(
            [noisy, torch.stack([item.extra for item in batch if item.extra is not None]).float()], dim=1
        )
    text = torch.cat([pad_text(item.text.float()) for item in batch])
    clip = None
    if batch[0].clip is not None:
        clip = torch.stack([item.clip for item in batch if item.clip is not None]).float()
        clip = clip.reshape(-1, 257, clip.shape[-1])
    return noisy, timesteps, text, clip
