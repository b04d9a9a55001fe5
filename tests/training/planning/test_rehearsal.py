"""What a rehearsal predicts is what the same step counts when it really runs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hunyuan_model.family import family_for_training as hunyuan_family
from hunyuan_model.options import HunyuanTrainingOptions
from modules import dressing
from modules.contract.data import Batch
from modules.contract.family import Family
from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from modules.planning.dry_run import ADAPTER, BATCH, HOST, NETWORK, WEIGHTS, Ledger, Moment, largest
from modules.planning.kernels import PlannedKernels
from modules.planning.memory_plan import GIB
from networks.adapter import make_network
from tests.manifests import tensor_list, write_hollow
from tests.tiny import hunyuan_dit, wan_dit
from tests.tiny.project import write_lora
from training.learning_options import WholeDitOptions
from training.loss import NoisyBatch
from training.options import TrainingOptions, read_arguments, training_parser
from training.planning import rehearsal
from training.planning.memory import predict
from training.planning.rehearsal import rehearse
from wan.family import family_for_training as wan_family
from wan.options import WanTrainingOptions

GIVEN = ["--dataset_config", "data.toml", "--output_dir", "out", "--output_name", "name"]
LAYERS = 5  # more than a rehearsal runs
CHECKPOINTED = ["--mixed_precision", "bf16", "--gradient_checkpointing"]


def wan(folder: Path, *more: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Family, TrainingOptions]:
    path = wan_dit.write_dit(folder, wan_dit.tiny_state("t2v", dtype=dtype, num_layers=LAYERS))
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    network = ["--network_module", "networks.lora_wan", "--network_dim", "4"]
    args = read_arguments(parser, [*GIVEN, *network, "--task", "t2v-1.3B", "--dit", str(path), *more], {})
    return wan_family(read_options(WanTrainingOptions, args)), read_options(TrainingOptions, args)


def hunyuan(folder: Path, *more: str, is_whole: bool = False) -> tuple[Family, TrainingOptions]:
    state = hunyuan_dit.tiny_state("t2v", dtype=torch.bfloat16, double_blocks=5, single_blocks=LAYERS)
    path = hunyuan_dit.write_dit(folder, state)
    parser = training_parser("", WholeDitOptions) if is_whole else training_parser("")
    add_options(parser, HunyuanTrainingOptions)
    network = [] if is_whole else ["--network_module", "networks.lora", "--network_dim", "4"]
    args = read_arguments(parser, [*GIVEN, *network, "--dit", str(path), *more], {})
    return hunyuan_family(read_options(HunyuanTrainingOptions, args)), read_options(TrainingOptions, args)


def wan_batch(count: int = 1, size: tuple[int, int, int] = (3, 8, 8)) -> NoisyBatch:
    latents = torch.zeros(count, 16, *size, dtype=torch.bfloat16)
    return noisy(
        {
            "latents": latents,
            "t5": [torch.zeros(7 + index, 32, dtype=torch.bfloat16) for index in range(count)],
        }
    )


def hunyuan_batch(lengths: tuple[int, ...] = (5,), size: tuple[int, int, int] = (3, 8, 8)) -> NoisyBatch:
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    return noisy(
        {
            "latents": torch.zeros(len(lengths), 16, *size, dtype=torch.bfloat16),
            "llm": torch.zeros(len(lengths), 8, 48, dtype=torch.float16),
            "llm_mask": mask,
            "clipL_mask": mask,
            "clipL": torch.zeros(len(lengths), 24, dtype=torch.float16),
        }
    )


def noisy(tensors: Mapping[str, Tensor | list[Tensor]]) -> NoisyBatch:
    latents = tensors["latents"]
    assert isinstance(latents, Tensor)
    count = len(latents)
    times = torch.full((count,), 0.5)
    return NoisyBatch(
        Batch(tensors, ("",) * count, ("",) * count),
        torch.zeros(latents.shape),
        times,
        1000 * times,
        torch.ones(count),
    )


def predicted(family: Family, options: TrainingOptions, batch: NoisyBatch) -> dict[str, Moment]:
    found, *_ = rehearse(family, options, family.load_dit(placement(options, "meta")), batch)
    return found


def see_all(module: nn.Module, ledger: Ledger, kind: str = WEIGHTS) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        ledger.see(tensor, kind)


def counted(
    family: Family, options: TrainingOptions, batch: NoisyBatch, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Moment]:
    """The same step with real tensors on the CPU and all blocks; of a second expert its weights, and its own
    LoRA too.
    """
    monkeypatch.setattr(rehearsal, "place", see_all)
    dit, *others = (family.load_dit(placement(options, "cpu"), index) for index in range(len(family.experts)))
    with PlannedKernels(), Ledger(HOST) as ledger:
        real = rehearsal.dress_trainable(family, options, dit, ledger)
        for other in others:
            if not options.by_expert.offload_inactive_dit:  # else it waits on the host
                see_all(other, ledger)
            if options.by_expert.lora_per_expert:
                network = make_network(options.network, family.lora_module, other, seed=0)
                see_all(network.module, ledger, NETWORK)
                groups, _ = network.parameter_groups(options.optimizer.learning_rate)
                for group in groups:
                    real.optimizer.add_param_group(dict(group))
                    real.parameters += group["params"]
        found = real.measure_step()
        with ledger.allocating(BATCH):
            moved = batch.moved(lambda tensor: tensor.clone() if tensor.is_floating_point() else tensor)
        return found | real.measure(moved, real.counts)


def placement(options: TrainingOptions, device: str) -> Placement:
    whole = options.whole_dit
    dtype = None if whole is None else torch.bfloat16 if whole.full_bf16 else torch.float32
    return Placement(torch.device(device), storage_dtype=dtype)


def assert_alike(found: Mapping[str, Moment], real: Mapping[str, Moment], tolerance: float = 0.02) -> None:
    """tolerance: 2 % of the total; the host, with tables of positions and counts of steps, is the device of
    the real run.
    """
    (place, moment), (real_place, real_moment) = largest(found), largest(real)
    total, real_total = sum(moment.values()), sum(real_moment.values())
    assert abs(total - real_total) <= tolerance * real_total, (
        f"{place}: {moment}, really {real_place}: {real_moment}"
    )
    for kind in (WEIGHTS, NETWORK):
        assert moment.get(kind, 0) == real_moment.get(kind, 0), kind


@pytest.mark.parametrize(
    "checkpointing", [[], ["--gradient_checkpointing"]], ids=["all kept", "checkpointing"]
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_wan_step_takes_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: list[str], precision: str
) -> None:
    family, options = wan(tmp_path, *checkpointing, "--mixed_precision", precision)
    for batch in (wan_batch(), wan_batch(3, (2, 12, 8))):
        with monkeypatch.context() as patch:
            real = counted(family, options, batch, patch)
        assert_alike(predicted(family, options, batch), real)


def test_an_adapter_and_a_teacher_take_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's factors are there in the dtype to compute in."""
    path = tmp_path / "adapter.safetensors"
    write_lora(path, tmp_path / "none", rank=64)
    words = [*CHECKPOINTED, "--training_adapter", str(path), "--teacher", "base"]
    family, options = wan(tmp_path, *words)
    batch = wan_batch()
    with monkeypatch.context() as patch:
        real = counted(family, options, batch, patch)

    found = predicted(family, options, batch)

    assert_alike(found, real)
    factors = 2 * sum(tensor.numel() for tensor in load_file(path).values() if tensor.ndim)
    assert largest(found)[1][ADAPTER] == factors


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param([], marks=pytest.mark.slow), ["--gradient_checkpointing"]],
    ids=["all kept", "checkpointing"],
)
def test_a_hunyuan_step_takes_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: list[str]
) -> None:
    family, options = hunyuan(tmp_path, *checkpointing, "--mixed_precision", "bf16")
    for batch in (hunyuan_batch(), hunyuan_batch((8, 3), (2, 12, 8))):
        with monkeypatch.context() as patch:
            real = counted(family, options, batch, patch)
        assert_alike(predicted(family, options, batch), real)


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer_type", "AdamW"],
        [
            *("--optimizer_type", "Adafactor", "--full_bf16", "--fused_backward_pass"),
            *("--optimizer_args", "relative_step=False"),
        ],
        pytest.param(["--optimizer_type", "AdamW", "--full_bf16"], marks=pytest.mark.slow),
    ],
    ids=["adamw", "adafactor, fused backward, bf16", "adamw, bf16"],
)
def test_fine_tuning_takes_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    family, options = hunyuan(tmp_path, *CHECKPOINTED, *more, is_whole=True)
    batch = hunyuan_batch()
    with monkeypatch.context() as patch:
        real = counted(family, options, batch, patch)
    assert_alike(predicted(family, options, batch), real)


def test_gradients_of_earlier_micro_batches_count(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED, "--gradient_accumulation_steps", "2")
    _, moment = largest(predicted(family, options, wan_batch()))
    # float32 too; the network has an alpha for each pair
    assert moment["gradients"] == pytest.approx(moment[NETWORK], rel=0.15)


@pytest.mark.parametrize(("name", "factor"), [("AdamW", 2.0), ("SGD", 0.0), ("Adagrad", 1.0)])
def test_states_are_those_the_optimizer_really_makes(tmp_path: Path, name: str, factor: float) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED, "--optimizer_type", name)
    _, moment = largest(predicted(family, options, wan_batch()))
    # alpha and step counts are no weights
    assert moment.get("optimizer", 0) == pytest.approx(factor * moment[NETWORK], rel=0.15)


@pytest.mark.parametrize(
    ("name", "per_element"), [("AdamW8bit", 2.03), ("Lion8bit", 1.02), ("PagedAdamW8bit", 0.0)]
)
def test_states_in_8_bits_are_counted_and_end_no_run(tmp_path: Path, name: str, per_element: float) -> None:
    """On a CUDA device every training is rehearsed before it begins, with its optimizer."""
    pytest.importorskip("bitsandbytes")
    family, options = wan(tmp_path, *CHECKPOINTED, "--optimizer_type", name, "--network_dim", "16")
    _, moment = largest(predicted(family, options, wan_batch()))
    assert moment.get("optimizer", 0) == pytest.approx(per_element / 4 * moment[NETWORK], rel=0.15)


def test_feed_forwards_in_pieces_take_what_was_predicted_and_less_than_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a CPU, what waits there would count as on the device
    monkeypatch.setattr(dressing, "offload_to_host", lambda device: None)
    family, whole = wan(tmp_path, *CHECKPOINTED)
    options = replace(whole, loop=replace(whole.loop, gradient_checkpointing_cpu_offload=True))
    batch = wan_batch(1, (8, 64, 72))  # 9216 tokens, three pieces
    in_pieces = predicted(family, options, batch)
    assert sum(largest(in_pieces)[1].values()) < 0.9 * sum(
        largest(predicted(family, whole, batch))[1].values()
    )
    with monkeypatch.context() as patch:
        assert_alike(in_pieces, counted(family, options, batch, patch))


def full_size(folder: Path, *more: str) -> tuple[Family, TrainingOptions, NoisyBatch]:
    """Wan 14B with a LoRA of rank 32, for 832x480 and 81 frames; its checkpoint is a file of holes."""
    path = folder / "model.safetensors"
    write_hollow(path, {name: ("BF16", shape) for name, (_, shape) in tensor_list("wan2.1-t2v-14b").items()})
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    network = ["--network_module", "networks.lora_wan", "--network_dim", "32", *CHECKPOINTED]
    args = read_arguments(parser, [*GIVEN, *network, "--task", "t2v-14B", "--dit", str(path), *more], {})
    text = torch.zeros(512, 4096, dtype=torch.bfloat16)
    batch = noisy({"latents": torch.zeros(1, 16, 21, 60, 104, dtype=torch.bfloat16), "t5": [text]})
    return wan_family(read_options(WanTrainingOptions, args)), read_options(TrainingOptions, args), batch


@pytest.mark.slow
def test_a_full_size_step_keeps_one_stream_a_block(tmp_path: Path) -> None:
    found = predicted(*full_size(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    stream = 32760 * 5120 * 4  # tokens x width in float32: 671 MB, twice what it would be in bfloat16
    first, last = (found[f"forward of blocks, {which}"]["kept"] for which in ("first", "last"))
    # and a 16-bit copy of each LoRA, which autocast keeps
    assert (last - first) / 39 == pytest.approx(stream, rel=0.02)
    assert 1.4e8 < found["optimizer step"][NETWORK] / 4 < 1.6e8  # 0.15 G numbers of rank 32


@pytest.mark.slow
def test_a_full_size_step_fits_in_12_gib_with_all_that_saves_memory(tmp_path: Path) -> None:
    saving = ["--fp8_base", "--fp8_scaled", "--blocks_to_swap", "39", "--gradient_checkpointing_cpu_offload"]
    prediction = predict(*full_size(tmp_path, *saving), torch.device("cpu"))
    (tmp_path / "model.safetensors").unlink()
    assert prediction.device(39) < 11.6 * GIB  # 11.48 when written
