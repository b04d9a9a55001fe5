"""--te_multiplier in the token refiners of HunyuanVideo and FramePack."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frame_pack.model import FramePackRefiner as FramePackRefiner
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.token_refiner import FRAMEPACK_REFINER, HUNYUAN_REFINER, TokenRefiner, multiply_text
from modules.speed_options import SDPA
from tests.tiny import framepack_dit

CONFIG = HunyuanVideoConfig(
    dim=128,
    ffn_dim=256,
    num_heads=1,
    double_blocks=1,
    single_blocks=1,
    refiner_blocks=2,
    refiner_ffn_dim=256,
    in_dim=16,
    out_dim=16,
    text_dim=32,
    pooled_dim=16,
)
TIMESTEPS = torch.tensor([500.0])


@dataclass(frozen=True)
class Case:
    """One refiner under the name that its transformer has for it, and what it does to the text by itself."""

    name: str
    make: Callable[[], Any]
    modules: tuple[str, str]
    vector: Callable[[Any, Tensor, float], Tensor]  # refiner, text, factor of the mean's vector
    tokens: Callable[[Any, Tensor], Tensor]  # what the first block is given
    blocks: Callable[[Any], nn.ModuleList]

    def dit(self) -> nn.Module:
        dit = nn.Module()
        torch.manual_seed(5)
        dit.add_module(self.name, self.make())
        return dit.requires_grad_(False)

    def run(self, dit: nn.Module, text: Tensor) -> Tensor:
        arguments = (None, torch.float32) if self.name == "txt_in" else (None, torch.float32, SDPA)
        return dit.get_submodule(self.name)(text, TIMESTEPS, *arguments)


def _framepack_vector(refiner: Any, text: Tensor, factor: float) -> Tensor:
    embedding = refiner.time_text_embed
    without = embedding(TIMESTEPS, torch.zeros_like(text.mean(dim=1))) - embedding.text_embedder(
        torch.zeros_like(text.mean(dim=1))
    )
    return without + factor * embedding.text_embedder(text.mean(dim=1))


CASES = [
    Case(
        "txt_in",
        lambda: TokenRefiner(CONFIG),
        HUNYUAN_REFINER,
        lambda refiner, text, factor: (
            refiner.t_embedder(TIMESTEPS) + factor * refiner.c_embedder(text.mean(dim=1))
        ),
        lambda refiner, text: refiner.input_embedder(text),
        lambda refiner: refiner.individual_token_refiner.blocks,
    ),
    Case(
        "context_embedder",
        lambda: FramePackRefiner(framepack_dit.CONFIG),
        FRAMEPACK_REFINER,
        _framepack_vector,
        lambda refiner, text: refiner.proj_in(text),
        lambda refiner: refiner.token_refiner.refiner_blocks,
    ),
]


def text_of(width: int) -> Tensor:
    return torch.randn(1, 6, width, generator=torch.Generator().manual_seed(1))


TEXTS = {"txt_in": text_of(CONFIG.text_dim), "context_embedder": text_of(framepack_dit.CONFIG.text_dim)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_block_and_the_mean_text_are_multiplied(case: Case) -> None:
    dit, text = case.dit(), TEXTS[case.name]
    plain = case.dit().get_submodule(case.name)
    vector, expected = case.vector(plain, text, 3.0), case.tokens(plain, text)
    assert len(case.blocks(plain)) == 2
    for block in case.blocks(plain):
        expected = 2 * block(expected, vector, None, SDPA)

    multiply_text(dit, case.modules, llm=2, clip=3)

    torch.testing.assert_close(case.run(dit, text), expected)
