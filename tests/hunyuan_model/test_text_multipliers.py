import torch
from torch import nn

from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.text_multipliers import multiply_text
from hunyuan_model.token_refiner import TokenRefiner
from modules.attention_options import SDPA

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


class Dit(nn.Module):
    """As much of a transformer as the option touches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.txt_in = TokenRefiner(CONFIG)

    @torch.no_grad()
    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.txt_in(text, torch.tensor([500.0]), None, torch.float32)


TEXT = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))


def test_each_block_and_the_mean_text_are_multiplied() -> None:
    dit, plain = Dit(), Dit().txt_in
    with torch.no_grad():
        vector = plain.t_embedder(torch.tensor([500.0])) + 3 * plain.c_embedder(TEXT.mean(dim=1))
        expected = plain.input_embedder(TEXT)
        for block in plain.individual_token_refiner.blocks:
            expected = 2 * block(expected, vector, None, SDPA)

    multiply_text(dit, llm=2, clip=3)

    torch.testing.assert_close(dit(TEXT), expected)


def test_each_of_the_two_acts_alone_and_one_changes_nothing() -> None:
    plain = Dit()(TEXT)
    found = []
    for llm, clip in ((1.0, 1.0), (1.5, 1.0), (1.0, 1.5)):
        dit = Dit()
        multiply_text(dit, llm, clip)
        found.append(dit(TEXT))
    assert torch.equal(found[0], plain)
    assert not torch.allclose(found[1], plain)
    assert not torch.allclose(found[2], plain)
    assert not torch.allclose(found[1], found[2])
