"""What a rehearsal counts, and what keeps its values."""

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.planning.dry_run import (
    ACCELERATOR,
    ATTENTION,
    GRANULE,
    KEPT,
    WEIGHTS,
    WORKING,
    Counts,
    Moment,
    dry_run,
    extrapolate,
    keep_blocks,
    largest,
    place,
    watch_blocks,
)

SIZE = 1 << 20  # elements


def test_storages_count_while_they_live_and_rounded_up() -> None:
    with dry_run() as ledger:
        first = torch.empty(SIZE, device=ACCELERATOR)
        view = first[:10]
        assert ledger.moment[WORKING] == 4 * SIZE
        del first
        assert ledger.moment[WORKING] == 4 * SIZE  # its view holds it
        del view
        assert ledger.moment[WORKING] == 0
        small = torch.empty(1, device=ACCELERATOR)
        assert ledger.moment[WORKING] == GRANULE
        del small


def test_the_host_does_not_count() -> None:
    with dry_run() as ledger:
        host = torch.empty(SIZE)
        assert sum(ledger.moment.values()) == 0
        device = host.to(ACCELERATOR)
        assert ledger.moment[WORKING] == 4 * SIZE
        assert device.cpu().device != device.device


def test_each_place_has_its_own_peak() -> None:
    with dry_run() as ledger:
        kept = torch.empty(SIZE, device=ACCELERATOR)
        ledger.enter("here")
        more = torch.empty(2 * SIZE, device=ACCELERATOR)
        del more
        ledger.enter("there")
        assert ledger.peaks["here"] == {KEPT: 4 * SIZE, WORKING: 8 * SIZE}
        assert ledger.peaks["there"] == {KEPT: 4 * SIZE, WORKING: 0}
        assert largest(ledger.peaks)[0] == "here"
        del kept


def test_small_whole_numbers_have_values() -> None:
    mask = torch.tensor([[True, True, False]])
    with dry_run():
        lengths = mask.sum(dim=1)
        assert lengths.tolist() == [2]
        assert (torch.arange(3) < lengths[:, None]).tolist() == mask.tolist()
        hidden = torch.empty(1, 3, 8, device=ACCELERATOR) * mask.to(ACCELERATOR)[:, :, None]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            hidden.sum().item()


def test_attention_takes_what_flash_attention_takes() -> None:
    batch, length, heads, width = 2, 1000, 4, 64
    size = 2 * batch * length * heads * width  # bytes of a tensor in bfloat16
    with dry_run() as ledger:
        made = [
            torch.empty(batch, heads, length, width, dtype=torch.bfloat16, device=ACCELERATOR)
            for _ in range(3)
        ]
        tensors = [tensor.requires_grad_() for tensor in made]
        ledger.enter("forward")
        result = functional.scaled_dot_product_attention(*tensors)
        rows = 4 * batch * length * heads
        assert ledger.peaks["forward"][WORKING] == pytest.approx(size + rows, abs=2 * GRANULE)
        gradient = torch.empty_like(result)
        ledger.enter("backward")
        torch.autograd.grad(result, tensors, gradient)
        peak, workspace = ledger.peaks["backward"], 4 * batch * length * heads * (width + 1)
        assert peak[WORKING] == pytest.approx(3 * size, abs=8 * GRANULE)
        assert peak[ATTENTION] == pytest.approx(workspace, abs=8 * GRANULE)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return x + scale * self.up(x)[..., :64]


class Model(nn.Module):
    def __init__(self, firsts: int, seconds: int) -> None:
        super().__init__()
        self.firsts = nn.ModuleList(Block() for _ in range(firsts))
        self.seconds = nn.ModuleList(Block() for _ in range(seconds))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.firsts, *self.seconds]:
            x = block(x, 2.0)
        return x


def measured(counts: Counts, is_direct: bool) -> dict[str, Moment]:
    """The moments of a forward and backward pass, all blocks run or most of them extrapolated."""
    with torch.device("meta"):
        model = Model(*counts)
    blocks = {"firsts": list(model.firsts), "seconds": list(model.seconds)}
    with dry_run() as ledger:
        place(model, ledger)
        watch_blocks(blocks, ledger)

        def measure(some: Counts) -> dict[str, Moment]:
            keep_blocks(model, blocks, some, ledger)
            ledger.enter("outside")
            ledger.forget_peaks()
            ledger.is_backward = False
            loss = model(torch.empty(4, 1000, 64, device=ACCELERATOR)).sum()
            ledger.is_backward = True
            loss.backward()
            model.zero_grad()
            return dict(ledger.peaks)

        return measure(counts) if is_direct else extrapolate(measure, counts)


def test_memory_grows_by_the_block() -> None:
    found, real = measured((7, 5), is_direct=False), measured((7, 5), is_direct=True)
    assert {place: sum(moment.values()) for place, moment in found.items()} == {
        place: sum(real[place].values()) for place in found
    }  # to the byte
    assert sum(largest(found)[1].values()) == sum(largest(real)[1].values())  # also of the blocks between


def test_a_network_has_its_weights_once() -> None:
    with torch.device("meta"):
        layer = nn.Linear(512, 512)
        tied = nn.ModuleList([layer, nn.Linear(512, 512)])
    tied[1].weight = layer.weight
    with dry_run() as ledger:
        place(tied, ledger)
        assert ledger.moment[WEIGHTS] == 4 * (512 * 512 + 2 * 512)
        assert tied[0].weight is tied[1].weight
