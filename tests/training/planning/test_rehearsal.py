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
from krea2.family import family_for_training as krea2_family
from krea2.options import Krea2TrainingOptions
from modules.devices import GIB
from modules.options import Options, read_options
from modules.parser import add_options
from networks.adapter import make_network
from protocols.data import Batch
from protocols.family import Family
from protocols.loading import Placement
from runtime.offload import checkpointing
from runtime.planning.dry_run import (
    ADAPTER,
    BATCH,
    GRADIENTS,
    HOST,
    NETWORK,
    WEIGHTS,
    BytesByKind,
    Ledger,
    find_peak_phase,
)
from runtime.planning.kernels import PlannedKernels
from tests.manifests import tensor_list, write_hollow
from tests.tiny import hunyuan_dit, krea2, wan_dit
from tests.tiny.project import write_lora
from training.features.composing import options_by_expert
from training.learning_options import ExpertTrainingOptions, FullDitOptions, PartsOptions
from training.loss import NoisyBatch
from training.options import TrainingOptions, read_arguments, training_parser
from training.planning import rehearsal
from training.planning.memory import predict_memory
from training.planning.rehearsal import rehearse
from wan.family import family_for_training as wan_family
from wan.options import WanTrainingOptions

GIVEN = ["--dataset_config", "data.toml", "--output_dir", "out", "--output_name", "name"]
LAYERS = 5  # more than a rehearsal runs
CHECKPOINTED = ["--mixed_precision", "bf16", "--gradient_checkpointing"]


def read_family(record: type[Options], is_full: bool, *words: object) -> tuple[Options, TrainingOptions]:
    """Options of a family and of a training. is_full: the model itself learns, else a LoRA of rank 4."""
    parser = training_parser("", FullDitOptions) if is_full else training_parser("")
    add_options(parser, record, ExpertTrainingOptions, *options_by_expert())
    network = () if is_full else ("--network_module", "networks.lora", "--network_dim", "4")
    args = read_arguments(parser, [*GIVEN, *network, *map(str, words)], {})
    return read_options(record, args), read_options(TrainingOptions, args)


def wan(folder: Path, *more: str, is_full: bool = False) -> tuple[Family, TrainingOptions]:
    state = wan_dit.tiny_state("t2v", dtype=torch.bfloat16, num_layers=LAYERS)
    words = ("--task", "t2v-1.3B", "--dit", wan_dit.write_dit(folder, state), *more)
    own, options = read_family(WanTrainingOptions, is_full, *words)
    return wan_family(own), options


def hunyuan(folder: Path, *more: str) -> tuple[Family, TrainingOptions]:
    state = hunyuan_dit.tiny_state("t2v", dtype=torch.bfloat16, double_blocks=5, single_blocks=LAYERS)
    words = ("--dit", hunyuan_dit.write_dit(folder, state), *more)
    own, options = read_family(HunyuanTrainingOptions, False, *words)
    return hunyuan_family(own), options


def wan_batch(count: int = 1, size: tuple[int, int, int] = (3, 8, 8)) -> NoisyBatch:
    texts = [torch.zeros(7 + index, 32, dtype=torch.bfloat16) for index in range(count)]
    return noisy({"latents": torch.zeros(count, 16, *size, dtype=torch.bfloat16), "t5": texts})


def noisy(tensors: Mapping[str, Tensor | list[Tensor]]) -> NoisyBatch:
    latents = tensors["latents"]
    assert isinstance(latents, Tensor)
    count = len(latents)
    batch, times = Batch(tensors, ("",) * count, ("",) * count), torch.full((count,), 0.5)
    return NoisyBatch(batch, torch.zeros(latents.shape), times, 1000 * times, torch.ones(count))


def predicted(family: Family, options: TrainingOptions, batch: NoisyBatch) -> dict[str, BytesByKind]:
    found, *_ = rehearse(family, options, family.load_dit(placement(options, "meta")), batch)
    return found


def see_all(module: nn.Module, ledger: Ledger, kind: str = WEIGHTS) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        ledger.track(tensor, kind)


def counted(
    family: Family, options: TrainingOptions, batch: NoisyBatch, monkeypatch: pytest.MonkeyPatch
) -> dict[str, BytesByKind]:
    """The same step with real tensors on the CPU and all blocks; of a second expert its weights, and its own
    LoRA too.
    """
    monkeypatch.setattr(rehearsal.dry, "allocate_empty_weights", see_all)
    dit, *others = (family.load_dit(placement(options, "cpu"), index) for index in range(len(family.experts)))
    with PlannedKernels(), Ledger(HOST) as ledger:
        real = rehearsal.set_up_trainable(family, options, dit, ledger)
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
        found = real.rehearse_optimizer()
        with ledger.allocating(BATCH):
            moved = batch.moved(lambda tensor: tensor.clone() if tensor.is_floating_point() else tensor)
        return found | real.measure_passes(moved, real.num_blocks)


def placement(options: TrainingOptions, device: str) -> Placement:
    full = options.full_dit
    dtype = None if full is None else torch.bfloat16 if full.full_bf16 else torch.float32
    return Placement(torch.device(device), storage_dtype=dtype)


def assert_alike(
    found: Mapping[str, BytesByKind], real: Mapping[str, BytesByKind], tolerance: float = 0.02
) -> None:
    """tolerance: 2 % of the total; the host, with tables of positions and counts of steps, is the device of
    the real run.
    """
    (place, moment), (real_place, real_moment) = find_peak_phase(found), find_peak_phase(real)
    total, real_total = sum(moment.values()), sum(real_moment.values())
    assert abs(total - real_total) <= tolerance * real_total, (
        f"{place}: {moment}, really {real_place}: {real_moment}"
    )
    for kind in (WEIGHTS, NETWORK):
        assert moment.get(kind, 0) == real_moment.get(kind, 0), kind


def assert_takes_what_was_predicted(
    family: Family, options: TrainingOptions, batch: NoisyBatch, monkeypatch: pytest.MonkeyPatch
) -> Mapping[str, BytesByKind]:
    """Returns what was predicted."""
    with monkeypatch.context() as patch:
        real = counted(family, options, batch, patch)
    found = predicted(family, options, batch)
    assert_alike(found, real)
    return found


@pytest.mark.slow_cases("one-all kept in float32", "three-all kept in float32", "three-checkpointing in bf16")
@pytest.mark.parametrize(
    "words", [CHECKPOINTED, ["--mixed_precision", "no"]], ids=["checkpointing in bf16", "all kept in float32"]
)
@pytest.mark.parametrize("batch", [wan_batch(), wan_batch(3, (2, 12, 8))], ids=["one", "three"])
def test_a_wan_step_takes_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], batch: NoisyBatch
) -> None:
    assert_takes_what_was_predicted(*wan(tmp_path, *words), batch, monkeypatch)


@pytest.mark.slow
def test_an_adapter_and_a_teacher_take_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's factors are there in the dtype to compute in."""
    path = tmp_path / "adapter.safetensors"
    write_lora(path, tmp_path / "none", rank=64)
    words = [*CHECKPOINTED, "--training_adapter", str(path), "--teacher", "base"]

    found = assert_takes_what_was_predicted(*wan(tmp_path, *words), wan_batch(), monkeypatch)

    factors = 2 * sum(tensor.numel() for tensor in load_file(path).values() if tensor.ndim)
    assert find_peak_phase(found)[1][ADAPTER] == factors


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [pytest.param(CHECKPOINTED[:2], marks=pytest.mark.slow), CHECKPOINTED],
    ids=["all kept", "checkpointing"],
)
def test_a_hunyuan_step_takes_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Two clips with texts of several lengths."""
    mask = torch.arange(8) < torch.tensor([8, 3])[:, None]
    texts = {"llm": torch.zeros(2, 8, 48, dtype=torch.float16), "llm_mask": mask, "clipL_mask": mask}
    texts["clipL"] = torch.zeros(2, 24, dtype=torch.float16)
    batch = noisy({"latents": torch.zeros(2, 16, 2, 12, 8, dtype=torch.bfloat16), **texts})

    assert_takes_what_was_predicted(*hunyuan(tmp_path, *words), batch, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--optimizer_type AdamW",
        "--optimizer_type Adafactor --full_bf16 --fused_backward_pass --optimizer_args relative_step=False",
        pytest.param("--optimizer_type AdamW --full_bf16", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_takes_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    made = wan(tmp_path, *CHECKPOINTED, *words.split(), is_full=True)
    assert_takes_what_was_predicted(*made, wan_batch(), monkeypatch)


def test_a_lora_that_is_stepped_in_the_backward_pass_keeps_no_gradients(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED, "--network_dim", "32")
    fused = replace(options, lora_parts=PartsOptions(fused_backward_pass=True))

    kept, freed = (
        max(moment.get(GRADIENTS, 0) for moment in predicted(family, way, wan_batch()).values())
        for way in (options, fused)
    )

    assert 10 * freed < kept


@pytest.mark.slow_cases(
    "Adagrad-1.0-torch", "AdamW8bit-0.5075-bitsandbytes", "PagedAdamW8bit-0.0-bitsandbytes", "SGD-0.0-torch"
)
@pytest.mark.parametrize(
    ("name", "factor", "package"),
    [
        ("SGD", 0.0, "torch"),
        ("Adagrad", 1.0, "torch"),
        ("AdamW8bit", 2.03 / 4, "bitsandbytes"),
        ("PagedAdamW8bit", 0.0, "bitsandbytes"),
    ],
)
def test_states_of_optimizers_and_gradients_of_earlier_micro_batches_count(
    tmp_path: Path, name: str, factor: float, package: str
) -> None:
    """On a CUDA device every training is rehearsed before it begins, with its optimizer."""
    pytest.importorskip(package)
    words = ["--optimizer_type", name, "--network_dim", "16", "--gradient_accumulation_steps", "2"]
    _, moment = find_peak_phase(predicted(*wan(tmp_path, *CHECKPOINTED, *words), wan_batch()))
    # alpha and step counts are no weights; gradients are float32 too
    assert moment.get("optimizer", 0) == pytest.approx(factor * moment[NETWORK], rel=0.15)
    assert moment["gradients"] == pytest.approx(moment[NETWORK], rel=0.15)


@pytest.mark.slow
def test_feed_forwards_in_pieces_take_what_was_predicted_and_less_than_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a CPU, what waits there would count as on the device
    monkeypatch.setattr(checkpointing, "offload_to_host", lambda device: None)
    family, full = wan(tmp_path, *CHECKPOINTED)
    options = replace(full, loop=replace(full.loop, gradient_checkpointing_cpu_offload=True))
    batch = wan_batch(1, (8, 64, 72))  # 9216 tokens, three pieces

    in_pieces = assert_takes_what_was_predicted(family, options, batch, monkeypatch)

    minimum, maximum = (
        sum(find_peak_phase(each)[1].values()) for each in (in_pieces, predicted(family, full, batch))
    )
    assert minimum < 0.9 * maximum


@pytest.mark.slow
def test_norms_in_pieces_keep_what_their_kernels_keep(tmp_path: Path) -> None:
    """A step of Krea 2, whose feed-forwards have their norm in them, is computed again as at first."""
    dit = krea2.write_dit(tmp_path, krea2.tiny_state(dtype=torch.bfloat16))
    words = ("--dit", dit, *CHECKPOINTED, "--gradient_checkpointing_cpu_offload")
    own, options = read_family(Krea2TrainingOptions, False, *words)
    text = torch.zeros(5, krea2.CONFIG.states, krea2.CONFIG.text_dim, dtype=torch.bfloat16)
    latents = torch.zeros(1, 16, 1, 128, 130, dtype=torch.bfloat16)  # 4160 tokens and the text: two pieces

    found = predicted(krea2_family(own), options, noisy({"latents": latents, "krea2_vl_embed": [text]}))

    stream = 4165 * krea2.CONFIG.dim
    assert find_peak_phase(found)[1]["working"] > 2 * 2 * stream


def full_size(folder: Path, *more: str) -> tuple[Family, TrainingOptions, NoisyBatch]:
    """Wan 14B with a LoRA of rank 32, for 832x480 and 81 frames; its checkpoint is a file of holes."""
    path = folder / "model.safetensors"
    write_hollow(path, {name: ("BF16", shape) for name, (_, shape) in tensor_list("wan2.1-t2v-14b").items()})
    words = ("--task", "t2v-14B", "--dit", path, *CHECKPOINTED, "--network_dim", "32", *more)
    own, options = read_family(WanTrainingOptions, False, *words)
    text = torch.zeros(512, 4096, dtype=torch.bfloat16)
    batch = noisy({"latents": torch.zeros(1, 16, 21, 60, 104, dtype=torch.bfloat16), "t5": [text]})
    return wan_family(own), options, batch


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
    prediction = predict_memory(*full_size(tmp_path, *saving), torch.device("cpu"))
    (tmp_path / "model.safetensors").unlink()
    assert prediction.device_bytes(39) < 11.6 * GIB  # 11.48 when written
