"""A tiny HiDream-O1-Image, its inputs, and the plain network with the same weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hidream_o1.configs import HiDreamO1Config
from hidream_o1.model import HiDreamO1Model
from tests.hidream_o1.plain import PlainHiDreamO1, Shape, predict_clean
from tests.tiny.dit_files import draw_state, frozen
from tests.tiny.hidream_o1 import CONFIG

SMALL = HiDreamO1Config(
    dim=64,
    ffn_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    num_layers=3,
    vocabulary=50,
    bottleneck=16,
    patch_size=4,
    freq_dim=32,
)
LENGTHS = (13, 6)  # tokens of each text with its time
TIMES = (640.0, 77.0)


def shape_of(config: HiDreamO1Config = CONFIG) -> Shape:
    sections = (config.head_width // 2 - 2 * config.row_frequencies, *[config.row_frequencies] * 2)
    return Shape(config.num_layers, config.head_width, sections, config.patch_size, config.freq_dim)


def small_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights with sharp attention, so that no mistake in it stays below the tolerance."""
    state = draw_state(lambda: HiDreamO1Model(SMALL), seed)
    sharp = {name: 2 * tensor for name, tensor in state.items() if "q_norm" in name or "k_norm" in name}
    loud = "language_model.embed_tokens.weight"  # as large as other tokens
    return {**state, **sharp, loud: state[loud] * SMALL.dim**0.5}


def small_model(seed: int = 0) -> HiDreamO1Model:
    return frozen(HiDreamO1Model(SMALL), small_state(seed))


def small_inputs(batch: int = 2, rows: int = 3, columns: int = 5) -> dict[str, Tensor]:
    """Inputs of our network, with texts of unequal lengths."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS[:batch])
    longest = int(lengths.max())
    size = SMALL.patch_size
    return {
        "noisy": 3 * torch.randn(batch, 3, 1, rows * size, columns * size, generator=generator),
        "timesteps": torch.tensor(TIMES)[:batch],
        "text": torch.randint(SMALL.vocabulary, (batch, longest), generator=generator),
        "text_mask": torch.arange(longest) < lengths[:, None],
    }


def plain_model(seed: int = 0) -> PlainHiDreamO1:
    network = PlainHiDreamO1(small_state(seed))
    return network.requires_grad_(False)


def predict_plainly(
    network: PlainHiDreamO1, given: Mapping[str, Tensor], mistake: str = "", config: HiDreamO1Config = SMALL
) -> Tensor:
    """What the plain network makes of the inputs of ours, B 3 1 H W."""
    made = []
    for index, noisy in enumerate(given["noisy"].squeeze(2)):
        ids = given["text"][index][given["text_mask"][index]].tolist()
        sigma = float(given["timesteps"][index]) / 1000
        made.append(predict_clean(network, shape_of(config), ids, noisy, sigma, mistake))
    return torch.stack(made).unsqueeze(2)
