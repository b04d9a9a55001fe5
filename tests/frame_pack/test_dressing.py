"""What acts on the FramePack transformer from outside, as far as it is not alike in all families
(tests/modules has that).
"""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from frame_pack.configs import DIT
from frame_pack.sections import ANTI_DRIFTING, F1, Order
from modules.compile import compile_blocks
from modules.compile_options import Compilation
from tests.frame_pack.making import tiny_inputs, tiny_model
from tests.tiny.framepack_dit import CONFIG

SIZES = {"double_blocks": 2, "single_blocks": 3}
ONE = tiny_inputs((11,))  # one sample, of tokens enough to multiply in 8 bits
WINDOW = ONE["noisy"].shape[2]
NEAR = 1e-5  # of the largest value, float32: sums in another order


@pytest.fixture(params=[ANTI_DRIFTING, F1], ids=["anti-drifting", "f1"])
def sections(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the transformer is given in each section of a video of five."""
    start = torch.randn(1, CONFIG.in_dim, 1, 6, 10, generator=torch.Generator().manual_seed(1))
    order: Order = request.param
    history, found = order.begin(start, None), []
    for section in order.plan(5, WINDOW, ()):
        seen, places = order.seen(start, history), section.indices
        found.append(
            ONE
            | {
                "latent_indices": torch.tensor([places.target]),
                "clean_latents": seen.clean,
                "clean_latent_indices": torch.tensor([places.clean]),
                "clean_latents_2x": seen.clean_2x,
                "clean_latent_2x_indices": torch.tensor([places.clean_2x]),
                "clean_latents_4x": seen.clean_4x,
                "clean_latent_4x_indices": torch.tensor([places.clean_4x]),
            }
        )
        history = order.grown(history, ONE["noisy"])
    return found


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_blocks_of_each_list_share_one_compilation_in_all_sections(
    sections: list[dict[str, Any]],
) -> None:
    dit = tiny_model(**SIZES)
    with torch.no_grad():
        expected = [dit(**inputs) for inputs in sections]
        compile_blocks(dit, DIT, Compilation("eager", fullgraph=True))

        found = [dit(**inputs) for inputs in sections]

    assert counters["stats"]["unique_graphs"] == len(DIT.block_lists) == 2
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= NEAR * other.abs().max()
