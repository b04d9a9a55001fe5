"""Random numbers of a micro-batch follow from the seed and its number in the run."""

from pathlib import Path

import pytest
import torch

from dataset.batches.items import NO_COMMANDS, find_items
from dataset.batches.order import BatchOrder
from dataset.config import load_dataset_config
from modules.contract.data import Batch
from modules.contract.family import NoiseSpec
from modules.errors import CacheError
from tests.training.toy import LATENT, record_encoders, toy_options, write_caches
from training.data.feed import Feed, MicroBatch, MicroBatches, Packed, Randomness, draw_given_frames
from training.loss import NoisyBatch
from training.steps import StepPlan


def micro_batches(folder: Path, seed: int = 3, *arguments: object) -> MicroBatches:
    order = BatchOrder(find_items(load_dataset_config(folder / "dataset.toml"), "toy", LATENT).items, seed)
    return MicroBatches(
        order, LATENT, Randomness(toy_options(folder, *arguments).timesteps, seed), NO_COMMANDS
    )


def test_a_micro_batch_is_the_same_whatever_was_read_before(tmp_path: Path) -> None:
    write_caches(tmp_path, count=5)
    one, other = micro_batches(tmp_path), micro_batches(tmp_path)
    first = one[(1, 2)]
    for key in ((0, 4), (2, 0), (1, 2)):
        again = other[key]

    assert first.number == again.number == 7
    assert first.data.batch.keys == again.data.batch.keys
    for name in ("noise", "sigmas", "timesteps", "weights"):
        assert torch.equal(getattr(first.data, name), getattr(again.data, name))


def test_timestep_buckets_count_samples_across_batches_and_epochs(tmp_path: Path) -> None:
    write_caches(tmp_path, count=5, batch_size=2)  # batches of 2, 2 and 1
    batches = micro_batches(tmp_path, 3, "--timestep_sampling", "uniform", "--num_timestep_buckets", 5)

    for epoch in range(2):
        sigmas = torch.cat([batches[(epoch, index)].data.sigmas for index in range(3)])
        assert sorted((sigmas * 5).int().tolist()) == [0, 1, 2, 3, 4]


def test_a_batch_is_sent_from_any_memory_where_the_driver_locks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    write_caches(tmp_path, count=1)
    batch = micro_batches(tmp_path)[(0, 0)]
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)

    packed = Packed.of(batch)
    assert isinstance(packed, Packed)
    found = packed.pin_memory().unpacked()

    assert found.number == batch.number
    assert torch.equal(found.data.noise, batch.data.noise)


def test_a_process_gets_its_share_in_order_from_where_it_starts(tmp_path: Path) -> None:
    write_caches(tmp_path, count=5)
    plan = StepPlan(num_batches=5, processes=2, accumulation=1, total_steps=5)
    feed = Feed(micro_batches(tmp_path), plan, process=1, workers=0, pin_memory=False)

    assert [one.number for one in feed.start(0, 2)] == [3, 6, 8]


def test_a_damaged_cache_names_file_and_command_also_from_a_worker(tmp_path: Path) -> None:
    write_caches(tmp_path, count=2)
    for path in (tmp_path / "cache").glob("*32_toy.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    feed = Feed(micro_batches(tmp_path), StepPlan(2, 1, 1, 2), 0, workers=1, pin_memory=False)

    with pytest.raises(CacheError, match=r"clip\d_0032x0032_toy(?s:.)*Make it again with") as error:
        list(feed.start(0, 0))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(("workers", "process", "processes"), [(0, 0, 1), (1, 0, 1), (0, 1, 2)])
def test_the_first_process_warns_once_of_caches_that_other_encoders_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, process: int, processes: int
) -> None:
    write_caches(tmp_path, count=4)
    # clip3: another program's
    record_encoders(tmp_path, {"clip0": "first", "clip1": "first", "clip2": "second"})
    plan = StepPlan(4, processes, 1, total_steps=20)

    list(Feed(micro_batches(tmp_path), plan, process, workers, pin_memory=False).start(0, 0))

    said = [
        message
        for message in caplog.messages
        if message.startswith("Not all caches were made by the same encoders:")
    ]
    assert len(said) == (1 if process == 0 else 0)
    assert all("letters second" in message and "letters first" in message for message in said)


def test_how_often_the_first_frame_is_given_follows_from_seed_and_number() -> None:
    def given(probability: float, frames: int = 2, seed: int = 3) -> list[int]:
        spec = NoiseSpec(first_frame_probability=probability)
        return [draw_given_frames(spec, frames, seed, "given frames", number) for number in range(400)]

    assert given(0.5) == given(0.5)
    assert given(0.5) != given(0.5, seed=4)
    assert abs(sum(given(0.25)) - 100) < 30  # 3.5 standard deviations
    assert (set(given(0)), set(given(1)), set(given(1, frames=1))) == ({0}, {1}, {0})


def test_a_packed_micro_batch_comes_out_as_it_went_in() -> None:
    """Tensors of several dtypes and odd sizes, a list of them, and one that does not lie in one piece."""
    lists = [torch.randn(3, 5), torch.randn(1, 5)]
    tensors = {
        "latents": torch.randn(1, 2, 1, 3, 3).bfloat16(),
        "t5": lists,
        "clip": torch.randn(7, 3).half().T,
    }
    sigmas = torch.rand(1)
    data = NoisyBatch(
        *(Batch(tensors, ("a",), ("b",)), torch.randn(1, 2, 1, 3, 3), sigmas, 1000 * sigmas, torch.ones(1)),
        given_frames=1,
    )

    packed = Packed.of(MicroBatch(3, data))
    assert isinstance(packed, Packed)
    out = packed.unpacked()

    assert (out.number, out.data.batch.captions, out.data.batch.keys) == (3, ("a",), ("b",))
    assert out.data.given_frames == 1
    torch.testing.assert_close(dict(out.data.batch.tensors), tensors, rtol=0, atol=0)
    for name in ("noise", "sigmas", "timesteps", "weights"):
        assert torch.equal(getattr(out.data, name), getattr(data, name))
