"""What is refused before a run, the training loop on a toy family, and what feeds it."""

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dataset.batches.finding import find_items
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.config import load_dataset_config
from modules.errors import CacheError, MemoryPlanError, OptionError, OutputError, UserError
from modules.flow.schedule import add_noise
from networks.adapter import make_network
from protocols.data import Batch, Conditions
from protocols.family import NoiseSpec
from protocols.loading import Placement
from tests.dataset.making import make_image
from tests.training import toy
from training.data.feed import BatchSources, Feed, NoiseSampler, PackedBatch, draw_num_clean_frames
from training.loop import take_step
from training.loss import NoisyBatch
from training.optimizers.stepping import StepAfterBackward
from training.reports.logs import DelayedReports, StepReport
from training.run import prepare_run, train_network
from training.steps import StepPlan


def test_products_in_fp8_are_refused_at_start_where_the_device_has_none(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    family = toy.ToyFamily()

    with pytest.raises(OptionError, match=r"--fp8_fast: the device cpu has no fp8 units"):
        toy.train_toy(tmp_path, "--fp8_base", "--fp8_scaled", "--fp8_fast", family=family)

    assert not family.passes
    assert not (tmp_path / "output").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write is needed")
@pytest.mark.parametrize(
    ("option", "folder", "said"),
    [
        ("--logging_dir", "/proc/x", "cannot be created"),
        ("--output_dir", "/proc/self", "nothing can be written there"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(
    tmp_path: Path, option: str, folder: str, said: str
) -> None:
    toy.write_caches(tmp_path, count=0)  # which would be told later

    with pytest.raises(OutputError, match=f"{option} {folder}:? {said}"):
        toy.train_toy(tmp_path, option, folder)


class UnloadedToy(toy.ToyFamily):
    """Takes no texts of the last item, and must not load its model."""

    def load_dit(self, placement: Placement, expert: int = 0) -> torch.nn.Module:
        raise AssertionError("the model is loaded")

    def batch_conditions(self, latents: torch.Tensor, batch: Batch) -> Conditions:
        if batch.keys[0].startswith("clip4"):
            raise CacheError("clip4 is of another release")
        return super().batch_conditions(latents, batch)


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ("clip3_0032x0032_toy.safetensors", "clip3.*damaged"),
        ("clip3_toy_te.safetensors", "clip3.*damaged"),
        (None, "clip4 is of another release"),
    ],
)
def test_caches_that_cannot_be_used_are_told_before_the_model_is_loaded(
    tmp_path: Path, damaged: str | None, said: str
) -> None:
    toy.write_caches(tmp_path, count=5)
    if damaged:
        path = tmp_path / "cache" / damaged
        path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(CacheError, match=said):
        toy.train_toy(tmp_path, family=UnloadedToy())


def test_pictures_without_caches_and_caches_without_pictures_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path, count=3)
    toy.train_toy(tmp_path)
    assert "Cache again" not in caplog.text  # the folder is not there: the caches were copied
    (tmp_path / "images").mkdir()
    for name in ("clip0", "clip2", "new"):
        make_image(tmp_path / "images" / f"{name}.png")

    toy.train_toy(tmp_path)

    new = tmp_path / "images" / "new.png"
    assert f"1 image with no latents, such as {new}: not cached" in caplog.text
    assert "1 image with caches whose file no longer exists, such as clip1: trained on until" in caplog.text


def test_weights_are_those_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    """Five micro-batches, three to a step: the second step of each epoch averages over the two that are
    left.
    """
    toy.write_caches(tmp_path, count=5)
    trained = toy.train_toy(
        tmp_path, "--gradient_accumulation_steps", 3, "--max_train_steps", 4, "--max_grad_norm", 0.5
    )

    options, family = toy.toy_options(tmp_path), toy.ToyFamily()
    dit = family.load_dit(Placement(torch.device("cpu"))).requires_grad_(False)
    network = make_network(options.network, family.lora_module, dit, seed=3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    order = BatchOrder(find_items(load_dataset_config(tmp_path / "dataset.toml"), "toy", toy.LATENT).items, 3)
    for epoch in range(2):
        for group in (range(3), range(3, 5)):
            for index in group:
                batch = read_batch(order.epoch(epoch)[index], toy.LATENT)
                drawn = NoiseSampler(options.timesteps, 3).add_noise(
                    batch, 5 * epoch + index, 5 * epoch + index
                )
                latents = batch.tensor("latents") * toy.LATENT.scale
                noisy = add_noise(latents, drawn.noise, drawn.sigmas)
                velocity = dit(noisy, drawn.timesteps, batch.tensors["letters"])
                ((velocity - (drawn.noise - latents)) ** 2).mean().div(len(group)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    expected = network.module.state_dict()
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_samples_validation_and_saving_change_nothing(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    prompts = toy.write_prompts(tmp_path, "a cat --f 5 --s 2 --d 1\na dog --s 2\n")
    dropout = ["--network_args", "rank_dropout=0.5", "--validation_split", "0.2"]
    plain = toy.train_toy(tmp_path, *dropout)

    samples = ["--sample_prompts", prompts, "--sample_every_n_steps", 3, "--sample_at_first"]
    saving = ["--validate_every_n_steps", 2, "--save_every_n_steps", 1, "--save_state"]
    assert toy.same(plain, toy.train_toy(tmp_path, *dropout, *samples, *saving))


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_item(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, bad=2)

    with pytest.raises(UserError, match=r"step \d+.*clip2"):
        toy.train_toy(tmp_path, "--save_every_n_steps", 1)
    for path in (tmp_path / "output").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_too_little_memory_is_told_with_what_helps(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)

    def fill_up(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And much more")

    with pytest.raises(MemoryPlanError, match=r"(?s)CUDA out of memory\.\n.*--gradient_checkpointing"):
        train_network(toy.ToyFamily(watch=fill_up), toy.toy_options(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    toy.write_caches(tmp_path)
    expected = toy.train_toy(tmp_path, "--output_name", "x")
    other = [*("--output_dir", tmp_path / "stopped"), "--resume", "latest"]

    def interrupt(passes: int) -> None:
        if passes == 3:
            os.kill(os.getpid(), number)

    assert train_network(toy.ToyFamily(watch=interrupt), toy.toy_options(tmp_path, *other)) == 0
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        "x-step00000004.safetensors",
        "x-step00000004-state",
    }

    assert train_network(toy.ToyFamily(), toy.toy_options(tmp_path, *other)) == 0
    assert toy.same(expected, load_file(tmp_path / "stopped" / "x.safetensors"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_mixed_precision_trains_float32_factors_of_a_half_precision_model(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    family = toy.ToyFamily(dtype=torch.bfloat16)

    tensors = toy.train_toy(tmp_path, "--mixed_precision", "bf16", "--save_state", family=family)

    state = toy.state_tensors(tmp_path / "output" / "x-state")["network"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_scaled_gradients_give_the_same_step_and_an_overflow_gives_none(tmp_path: Path) -> None:
    """fp16's gradient scaler; on the CPU it is put in by hand."""
    toy.write_caches(tmp_path)
    options = toy.toy_options(tmp_path, "--gradient_accumulation_steps", 2)
    weights = {}
    for scale in (None, 2.0**10, float("inf")):
        with prepare_run(toy.ToyFamily(), options) as run:
            if scale is not None:
                scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                assert isinstance(run.model.stepping, StepAfterBackward)
                stepping = replace(run.model.stepping, scaler=scaler)
                run = replace(run, model=replace(run.model, scaler=scaler, stepping=stepping))
            with contextlib.closing(run.feed.start(0, 0)) as micro_batches:
                take_step(run, range(2), micro_batches)
            state = run.model.trainable.modules["network"].state_dict()
            weights[scale] = {name: tensor.clone() for name, tensor in state.items()}
    initial = make_network(options.network, "networks.lora_wan", toy.ToyDit(), seed=3).module.state_dict()

    for name, tensor in weights[None].items():
        torch.testing.assert_close(weights[2.0**10][name], tensor, rtol=1e-5, atol=1e-7)
    assert toy.same(weights[float("inf")], initial)
    assert not toy.same(weights[None], initial)


def feed(
    folder: Path, *arguments: object, plan: StepPlan | None = None, process: int = 0, workers: int = 0
) -> Feed:
    order = BatchOrder(find_items(load_dataset_config(folder / "dataset.toml"), "toy", toy.LATENT).items, 3)
    drawn = NoiseSampler(toy.toy_options(folder, *arguments).timesteps, 3)
    plan = plan or StepPlan(order.num_batches, 1, 1, 2)
    return Feed(order, BatchSources(toy.LATENT), drawn, plan, process, workers)


def test_the_next_batch_is_sent_before_the_host_waits_for_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a device has the next step to compute, and its inputs, while the host reads numbers."""
    toy.write_caches(tmp_path)
    events: list[str] = []
    send, flush = NoisyBatch.to, DelayedReports.flush

    def note_sending(batch: NoisyBatch, *arguments: Any) -> NoisyBatch:
        events.append("sent")
        return send(batch, *arguments)

    def note_reading(delayed_reports: DelayedReports) -> StepReport | None:
        events.extend(["read"] * (delayed_reports._pending is not None))
        return flush(delayed_reports)

    monkeypatch.setattr(NoisyBatch, "to", note_sending)
    monkeypatch.setattr(DelayedReports, "flush", note_reading)
    toy.train_toy(tmp_path, "--max_train_steps", 3)

    assert events == ["sent", "sent", "read", "sent", "read", "read"]


def test_every_tensor_of_a_batch_is_pinned_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: only CUDA can lock memory. Without workers, which let torch's loader pin."""
    toy.write_caches(tmp_path)
    pinned: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor

    monkeypatch.setattr("training.data.feed.pin", note)
    with contextlib.closing(replace(feed(tmp_path), pin_memory=True).start(0, 0)) as micro_batches:
        batch = next(micro_batches)

    found: list[int] = []
    batch.moved(lambda tensor: found.append(id(tensor)) or tensor)
    assert found == pinned
    assert {id(batch.noise), id(batch.batch.tensor("latents"))} < set(found)


def test_a_micro_batch_is_the_same_whatever_was_read_before(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=5)
    one, other = feed(tmp_path), feed(tmp_path)
    first = one.read((1, 2))
    for key in ((0, 4), (2, 0), (1, 2)):
        again = other.read(key)

    assert first.number == again.number == 7
    assert first.batch.keys == again.batch.keys
    for name in ("noise", "sigmas", "timesteps", "weights"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_timestep_buckets_count_samples_across_batches_and_epochs(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=5, batch_size=2)  # batches of 2, 2 and 1
    batches = feed(tmp_path, "--timestep_sampling", "uniform", "--num_timestep_buckets", 5)

    rounds = [
        [int(5 * sigma) for index in range(3) for sigma in batches.read((epoch, index)).sigmas]
        for epoch in range(2)
    ]
    assert [sorted(one) for one in rounds] == [[0, 1, 2, 3, 4]] * 2
    assert rounds[0] != rounds[1]


def test_a_batch_is_sent_from_any_memory_where_the_driver_locks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    toy.write_caches(tmp_path, count=1)
    batch = feed(tmp_path).read((0, 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", reject)

    found = PackedBatch.of(batch).pin_memory().unpacked()

    assert torch.equal(found.noise, batch.noise)


def test_a_damaged_cache_names_file_and_command_also_from_a_worker(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=2)
    for path in (tmp_path / "cache").glob("*32_toy.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    damaged = feed(tmp_path, workers=1)

    with pytest.raises(CacheError, match=r"clip\d_0032x0032_toy(?s:.)*Make it again with") as error:
        list(damaged.start(0, 0))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(("workers", "process", "processes"), [(0, 0, 1), (1, 0, 1), (0, 1, 2)])
def test_the_first_process_warns_once_of_caches_that_other_encoders_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, process: int, processes: int
) -> None:
    toy.write_caches(tmp_path, count=4)
    # clip3: another program's
    toy.record_encoders(tmp_path, {"clip0": "first", "clip1": "first", "clip2": "second"})
    plan = StepPlan(4, processes, 1, total_steps=20)

    list(feed(tmp_path, plan=plan, process=process, workers=workers).start(0, 0))

    said = [text for text in caplog.messages if "were made by the same encoders:" in text]
    assert len(said) == (1 if process == 0 else 0)
    assert all("letters second" in message and "letters first" in message for message in said)


def test_how_often_the_first_frame_is_given_follows_from_seed_and_number() -> None:
    def given(probability: float, frames: int = 2, seed: int = 3) -> list[int]:
        spec = NoiseSpec(first_frame_probability=probability)
        return [draw_num_clean_frames(spec, frames, seed, "given frames", number) for number in range(400)]

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
        num_clean_frames=1,
        number=3,
    )

    packed = PackedBatch.of(data)
    out = packed.unpacked()

    assert (out.number, out.batch.captions, out.batch.keys) == (3, ("a",), ("b",))
    assert out.num_clean_frames == 1
    torch.testing.assert_close(dict(out.batch.tensors), tensors, rtol=0, atol=0)
    for name in ("noise", "sigmas", "timesteps", "weights"):
        assert torch.equal(getattr(out, name), getattr(data, name))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--network_args", "loraplus_lr_ratio=4"], "--network_args loraplus_lr_ratio=4: "),
        (
            ["--network_args", "network_reg_lrs=.*0.*=0.1,x=0.01"],
            "--network_args network_reg_lrs .*0.*=0.1: ",
        ),
        (["--network_args", "loraplus_lr_ratio=1"], None),
    ],
)
def test_rates_that_an_optimizer_cannot_have_are_refused_before_a_model_is_loaded(
    tmp_path: Path, words: list[str], named: str | None
) -> None:
    toy.write_caches(tmp_path, count=3)
    rate = ["--optimizer_type", "tests.training.optimizers.test_lr_schedule.OneRate", "--learning_rate", 0.01]

    if named is None:
        toy.train_toy(tmp_path, *rate, *words)
        return
    with pytest.raises(OptionError) as error:
        toy.train_toy(tmp_path, *rate, *words, family=UnloadedToy())
    assert str(error.value).startswith(named)
