"""What acts on the FramePack transformer from outside, as far as it is not alike in all families
(tests/modules has that).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from frame_pack.checkpoints import load_dit
from frame_pack.configs import DIT
from frame_pack.sections import ANTI_DRIFTING, F1, Order
from modules.compile import compile_blocks
from modules.compile_options import Compilation
from modules.contract.loading import Placement
from modules.speed_options import Quantisation
from tests.fp8_reference import emulated_product
from tests.frame_pack.making import tiny_inputs, tiny_model
from tests.tiny.framepack_dit import CONFIG, tiny_state, write_dit

SIZES = {"double_blocks": 2, "single_blocks": 3}
LINEAR = 2 * (8 + 4) + 3 * 5  # layers that 8 bits are for: of attention and feed-forwards
ONE = tiny_inputs((11,))  # one sample, of tokens enough to multiply in 8 bits
WINDOW = ONE["noisy"].shape[2]
CPU = Placement(torch.device("cpu"))
NEAR = 1e-5  # of the largest value, float32: sums in another order


@pytest.mark.parametrize(("asked", "counts"), [(1, (0, 3)), (4, (2, 5)), (36, (18, 37)), (38, (19, 39))])
def test_blocks_to_swap_are_spread_over_the_lists_as_in_hunyuanvideo(
    asked: int, counts: tuple[int, int]
) -> None:
    assert DIT.swap_counts(asked) == counts


@pytest.mark.parametrize("kind", ["cast", "rows"])
@pytest.mark.parametrize("fast", [False, True], ids=["", "fast"])
def test_blocks_in_8_bits_stay_near_and_norms_are_left_alone(tmp_path: Path, kind: str, fast: bool) -> None:
    path, calls = write_dit(tmp_path, tiny_state()), list[Tensor]()

    def product(a: Tensor, *others: Any) -> Tensor:
        calls.append(a)
        return emulated_product(a, *others)

    fp8 = Quantisation(kind, fp8_matmul=True, product=product) if fast else Quantisation(kind)
    dit = load_dit(path, replace(CPU, fp8=fp8))

    in_8_bits = {name for name, weight in dit.named_parameters() if weight.dtype.itemsize == 1}
    in_8_bits |= {name for name, tensor in dit.named_buffers() if tensor.dtype.itemsize == 1}
    assert len(in_8_bits) == LINEAR
    assert not any(".norm" in name for name in in_8_bits)
    expected = load_dit(path, CPU)(**ONE)
    assert 0 < (dit(**ONE) - expected).abs().max() <= 0.15 * expected.abs().max()  # three digits of mantissa
    assert len(calls) == (LINEAR if fast else 0)


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
