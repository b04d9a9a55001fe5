"""What a rehearsal counts, what keeps its values, and what a real device counts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.devices import GIB
from modules.layers.convolution import compute_piece
from runtime.planning.device_memory import MemoryWatch, bytes_on, free_host_memory, spills
from runtime.planning.dry_run import (
    ACCELERATOR,
    ACTIVATIONS,
    ATTENTION,
    GRANULE,
    TEMPORARY,
    WEIGHTS,
    BytesByKind,
    Counts,
    allocate_empty_weights,
    dry_run,
    extrapolate,
    find_peak_phase,
    track_blocks,
    truncate_blocks,
)

SIZE = 1 << 20  # elements


def test_storages_count_while_they_live_and_rounded_up() -> None:
    with dry_run() as ledger:
        first = torch.empty(SIZE, device=ACCELERATOR)
        view = first[:10]
        assert ledger.bytes_by_kind[TEMPORARY] == 4 * SIZE
        del first
        assert ledger.bytes_by_kind[TEMPORARY] == 4 * SIZE  # its view holds it
        del view
        assert ledger.bytes_by_kind[TEMPORARY] == 0
        small = torch.empty(1, device=ACCELERATOR)
        assert ledger.bytes_by_kind[TEMPORARY] == GRANULE
        del small


def test_the_host_does_not_count() -> None:
    with dry_run() as ledger:
        host = torch.empty(SIZE)
        assert sum(ledger.bytes_by_kind.values()) == 0
        device = host.to(ACCELERATOR)
        assert ledger.bytes_by_kind[TEMPORARY] == 4 * SIZE
        assert device.cpu().device != device.device


def test_each_place_has_its_own_peak() -> None:
    with dry_run() as ledger:
        kept = torch.empty(SIZE, device=ACCELERATOR)
        ledger.begin_phase("here")
        more = torch.empty(2 * SIZE, device=ACCELERATOR)
        del more
        ledger.begin_phase("there")
        assert ledger.peaks["here"] == {ACTIVATIONS: 4 * SIZE, TEMPORARY: 8 * SIZE}
        assert ledger.peaks["there"] == {ACTIVATIONS: 4 * SIZE, TEMPORARY: 0}
        assert find_peak_phase(ledger.peaks)[0] == "here"
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
    shape, of_rows = (batch, heads, length, width), 4 * batch * length * heads
    with dry_run() as ledger:
        made = [torch.empty(shape, dtype=torch.bfloat16, device=ACCELERATOR) for _ in range(3)]
        tensors = [tensor.requires_grad_() for tensor in made]
        ledger.begin_phase("forward")
        result = functional.scaled_dot_product_attention(*tensors)
        assert ledger.peaks["forward"][TEMPORARY] == pytest.approx(size + of_rows, abs=2 * GRANULE)
        gradient = torch.empty_like(result)
        ledger.begin_phase("backward")
        torch.autograd.grad(result, tensors, gradient)
        peak = ledger.peaks["backward"]
        assert peak[TEMPORARY] == pytest.approx(3 * size, abs=8 * GRANULE)
        assert peak[ATTENTION] == pytest.approx(of_rows * (width + 1), abs=8 * GRANULE)


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


def measured(counts: Counts, is_direct: bool) -> dict[str, BytesByKind]:
    """The moments of a forward and backward pass, all blocks run or most of them extrapolated."""
    with torch.device("meta"):
        model = Model(*counts)
    blocks = {"firsts": list(model.firsts), "seconds": list(model.seconds)}
    with dry_run() as ledger:
        allocate_empty_weights(model, ledger)
        track_blocks(blocks, ledger)

        def measure(some: Counts) -> dict[str, BytesByKind]:
            truncate_blocks(model, blocks, some, ledger)
            ledger.begin_phase("outside")
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
    for where, moment in found.items():
        assert sum(moment.values()) == sum(real[where].values())  # to the byte
    assert sum(find_peak_phase(found)[1].values()) == sum(
        find_peak_phase(real)[1].values()
    )  # also of the blocks between


def test_a_network_has_its_weights_once() -> None:
    with torch.device("meta"):
        layer = nn.Linear(512, 512)
        tied = nn.ModuleList([layer, nn.Linear(512, 512)])
    tied[1].weight = layer.weight
    with dry_run() as ledger:
        allocate_empty_weights(tied, ledger)
        assert ledger.bytes_by_kind[WEIGHTS] == 4 * (512 * 512 + 2 * 512)
        assert tied[0].weight is tied[1].weight


class Compute:
    """Doubles the sides of a piece by way of a tensor four times as large as its result, and counts."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, piece: Tensor) -> Tensor:
        self.shapes.append(tuple(piece.shape))
        work = piece.repeat_interleave(4, -1).repeat_interleave(4, -2)
        return work[..., ::2, ::2].clone()


def test_in_a_rehearsal_the_largest_of_a_kind_is_computed() -> None:
    compute = Compute()
    with dry_run():
        for size in ((8, 16, 16), (8, 16, 16), (8, 4, 16), (3, 16, 16), (8, 16, 32), (8, 16, 16)):
            made = compute_piece(compute, torch.empty(size, device=ACCELERATOR))
            assert made.shape == (size[0], 2 * size[1], 2 * size[2])
            assert made.device == ACCELERATOR
    assert compute.shapes == [(8, 16, 16), (3, 16, 16), (8, 16, 32)]


def test_a_piece_that_is_not_computed_takes_its_share() -> None:
    peaks = []
    for is_first in (True, False):
        compute = Compute()
        with dry_run() as ledger:
            if not is_first:
                compute_piece(compute, torch.empty(64, 32, 32, device=ACCELERATOR))
            ledger.begin_phase("here")
            given = torch.empty(64, 32, 16, device=ACCELERATOR)
            compute_piece(compute, given)
            assert len(compute.shapes) == 1
            peaks.append(sum(ledger.peaks["here"].values()))

    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("free", "reserved", "expected"),
    [
        (0.0, 26.0, True),  # more than the card has
        (0.1, 23.5, True),  # nearly all of it, and nothing is free
        (2.0, 21.0, False),
        (2.0, 23.5, False),  # cached, the driver has room
    ],
)
def test_what_a_card_cannot_hold_lies_in_host_memory(free: float, reserved: float, expected: bool) -> None:
    assert spills(24 * GIB, int(free * GIB), int(reserved * GIB)) == expected


def test_the_bytes_of_a_network_are_those_on_that_device() -> None:
    network = nn.ModuleList([nn.Linear(3, 5), nn.Linear(7, 2, device="meta")])
    network.register_buffer("table", torch.zeros(4, dtype=torch.float16))
    assert bytes_on(network, torch.device("cpu")) == 4 * (3 * 5 + 5) + 2 * 4
    assert bytes_on(network, torch.device("meta")) == 4 * (7 * 2 + 2)


def test_the_room_of_the_host_is_what_linux_says_or_not_known(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:     2000 kB\n", encoding="ascii")
    assert free_host_memory(tmp_path / "meminfo") == 2000 * 1024
    assert free_host_memory(tmp_path / "none") is None


class Counter:
    """CUDA's count of the most bytes so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.maximum = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.maximum)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: self.take(0, anew=True))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * GIB, 16 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 * GIB)

    def take(self, size: int, anew: bool = False) -> None:
        self.maximum = size if anew else max(self.maximum, size)


def test_the_peak_of_a_step_is_not_that_of_the_samples_before_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counter = Counter(monkeypatch)
    watch = MemoryWatch(torch.device("cuda"), predicted=4 * GIB, largest=100)

    def step(elements: int, size: int) -> None:
        counter.take(size)
        watch.see_batch(elements)
        watch.after_step()

    caplog.set_level("INFO")
    step(100, 6 * GIB)  # the first one makes the optimizer's states
    step(50, 3 * GIB)
    counter.take(9 * GIB)  # samples
    watch.after_pause()
    assert watch.measured is None
    step(100, 4 * GIB)
    assert watch.measured == 4 * GIB
    assert "predicted 4.00 GiB, measured 4.00 GiB" in caplog.text
    assert "please report" not in caplog.text

    counter.take(8 * GIB)
    watch.after_pause()
    assert watch.highest == 9 * GIB


def test_a_full_card_is_warned_of_once_with_numbers_and_remedies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Counter(monkeypatch)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 17 * GIB)
    watch = MemoryWatch(torch.device("cuda"))
    for _ in range(2):
        watch.warn_if_full()
    assert caplog.text.count("reserved 17.00 of 16.00 GiB") == 1
    assert "--blocks_to_swap" in caplog.text
