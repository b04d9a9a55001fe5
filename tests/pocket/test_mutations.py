"""Mistakes put in on purpose: what the pocket model draws, or what it loses in training, has to show each of
them.

A wrong flow shift and a wrong sigma grid are in test_regression.py. The list stands in pocket/README.md.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from generation import session
from modules.contract.data import Batch
from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from pocket import drawing
from pocket.captions import plain
from pocket.measure import POCKET, judge, model_options
from pocket.train_vae import as_pixels
from tests.pocket.test_model import ASKED, asked_for, generate, obeys
from training.loss import NoisyBatch, training_loss
from training.options import read_arguments, training_parser
from wan.family import Wan, family_for_training
from wan.model import WanModel
from wan.options import WanTrainingOptions
from wan.t5 import TOKENIZER, load_t5
from wan.tokens import WanTokens
from wan.vae import load_vae

CPU = torch.device("cpu")
LOSS = 0.25  # of the pocket model on drawn clips at the noise below: 0.2 with everything right
Mutate = Callable[[pytest.MonkeyPatch], None]


def in_tokens(change: Callable[[WanTokens], dict[str, Any]]) -> Mutate:
    """What the blocks are given beside the video tokens is changed."""
    embed = WanModel.embed

    def mutate(patch: pytest.MonkeyPatch) -> None:
        def mutated(self: WanModel, *args: Any) -> tuple[Tensor, WanTokens]:
            x, tokens = embed(self, *args)
            return x, dataclasses.replace(tokens, **change(tokens))

        patch.setattr(WanModel, "embed", mutated)

    return mutate


def in_forward(change: Callable[..., Tensor]) -> Mutate:
    """change(forward, noisy, timesteps, text, ...) stands in for the forward pass."""
    forward = WanModel.forward

    def mutate(patch: pytest.MonkeyPatch) -> None:
        def mutated(self: WanModel, *args: Any, **options: Any) -> Tensor:
            return change(lambda *given: forward(self, *given, **options), *args)

        patch.setattr(WanModel, "forward", mutated)

    return mutate


def swapped(tokens: WanTokens, first: int, second: int) -> dict[str, Any]:
    """Rotary turns of one axis at places of another: both sides are cut to the shorter one and repeat."""
    table = tokens.rotary.unflatten(0, tokens.grid)
    places = [torch.arange(size) for size in tokens.grid]
    index = list(torch.meshgrid(*places, indexing="ij"))
    index[first], index[second] = index[second] % tokens.grid[first], index[first] % tokens.grid[second]
    return {"rotary": table[tuple(index)].flatten(0, 2)}


def shuffled(patch: pytest.MonkeyPatch) -> None:
    """Each text goes to its neighbour: in a batch of training, and among the prompts of a file."""
    in_forward(lambda forward, noisy, times, text, *rest: forward(noisy, times, [*text[1:], text[0]], *rest))(
        patch
    )
    encode = session.Session.texts

    def neighbours(self: session.Session, wanted: Any) -> Any:
        found = encode(self, wanted)
        return found[1:] + found[:1]

    patch.setattr(session.Session, "texts", neighbours)


MUTATIONS: dict[str, Mutate] = {
    "modulation dropped": in_tokens(lambda tokens: {"modulation": torch.zeros_like(tokens.modulation)}),
    "rows and columns of the rotary table swapped": in_tokens(lambda tokens: swapped(tokens, 1, 2)),
    "frames and columns of the rotary table swapped": in_tokens(lambda tokens: swapped(tokens, 0, 2)),
    "texts of a batch shuffled": shuffled,
    "sign of the velocity": in_forward(lambda forward, *args: -forward(*args)),
    "timesteps as 0..1": in_forward(lambda forward, noisy, times, *rest: forward(noisy, times / 1000, *rest)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_detectors_see_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {seed: ASKED[seed] for seed in (1, 2, 3, 4)}
    MUTATIONS[name](monkeypatch)

    accuracy = judge(asked, generate(tmp_path, asked_for(*asked)))

    assert not obeys(accuracy), accuracy


@pytest.fixture(scope="module")
def family() -> Wan:
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    args = read_arguments(
        parser, [*model_options(POCKET), "--dataset_config", "-", "--output_dir", "-", "--output_name", "-"]
    )
    return family_for_training(read_options(WanTrainingOptions, args))


@pytest.fixture(scope="module")
def noisy_batch() -> NoisyBatch:
    """24 drawn clips with their captions, each at another noise."""
    random, count = np.random.default_rng(11), 24
    scenes = [drawing.scene(random) for _ in range(count)]
    captions = [plain(scene.things[0]) for scene in scenes]
    vae = load_vae(POCKET / "vae.safetensors", CPU, torch.float32)
    t5, tokenize = load_t5(POCKET / "t5.safetensors", CPU), TOKENIZER.load(None, POCKET / "t5.safetensors")
    with torch.no_grad():
        latents = vae.encode(as_pixels(np.stack([drawing.draw(scene) for scene in scenes])))
        texts = [t5([torch.tensor(tokenize(caption))])[0].float() for caption in captions]
    sigmas = torch.linspace(0.3, 0.95, count)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    batch = Batch({"latents": latents, "t5": texts}, tuple(captions), tuple(captions))
    return NoisyBatch(batch, noise, sigmas, 1000 * sigmas + 1, torch.ones(count))


def loss(family: Wan, noisy_batch: NoisyBatch) -> float:
    dit = family.load_dit(Placement(CPU, compute_dtype=torch.float32, storage_dtype=torch.float32))
    with torch.no_grad():
        return float(training_loss(family, dit, noisy_batch, nullcontext))


def test_the_training_loss_is_low(family: Wan, noisy_batch: NoisyBatch) -> None:
    assert loss(family, noisy_batch) < LOSS


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_training_loss_sees_it(
    name: str, family: Wan, noisy_batch: NoisyBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS[name](monkeypatch)

    assert loss(family, noisy_batch) > LOSS
