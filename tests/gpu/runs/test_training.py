"""Training from the command lines of all families: a device's losses are the CPU's, and what saves memory
changes no bit.

Batches, noise and timesteps are drawn on the CPU, whatever the device: all that differs is rounding. On the
CPU the losses of bf16 are up to 0.33 % from those of float32, and noise in the last bit of all weights moves
those of float32 by 2e-6 at most.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints.stored.fp8_products import supports_fp8
from tests.gpu.measuring import equal_bits
from tests.gpu.runs.project import CPU, DEEP, ON_GPU, OTHERS, Project, Trained

pytestmark = ON_GPU

Find = Callable[[str], Project]
BF16 = ("--mixed_precision", "bf16")
FP8 = ("--fp8_base", "--fp8_scaled")
CHECKPOINTED = ("--gradient_checkpointing",)
OFFLOADED = (*CHECKPOINTED, "--gradient_checkpointing_cpu_offload")
KEPT = (*CHECKPOINTED, "--gradient_checkpointing_keep", "attention")


@pytest.fixture(params=DEEP)
def project(request: pytest.FixtureRequest, project_of: Find) -> Project:
    return project_of(request.param)


def assert_same(ours: Trained, theirs: Trained) -> None:
    """To the bit, and not because nothing was learned."""
    assert ours.losses == theirs.losses
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert [name for name in theirs.tensors if not equal_bits(ours.tensors[name], theirs.tensors[name])] == []
    assert any(tensor.any() for name, tensor in ours.tensors.items() if "lora_up" in name)


@pytest.mark.parametrize(
    ("precision", "bar"), [((), 1e-4), (BF16, 1e-2), ((*BF16, *FP8), 1e-2)], ids=["float32", "bf16", "fp8"]
)
@pytest.mark.parametrize("name", [*DEEP, *OTHERS])
def test_losses_are_those_of_the_cpu(
    name: str, project_of: Find, device: torch.device, precision: tuple[str, ...], bar: float
) -> None:
    ours, theirs = (project_of(name).train(where, where.type, *precision) for where in (device, CPU))
    assert ours.losses == pytest.approx(theirs.losses, rel=bar)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("precision", [(), BF16, (*BF16, *FP8)], ids=["float32", "bf16", "fp8"])
def test_what_saves_memory_changes_no_bit(
    project: Project, device: torch.device, precision: tuple[str, ...]
) -> None:
    """Swapped blocks, activations computed again, held on the host, and attention's results kept."""
    swap = ("--blocks_to_swap", project.swappable, "--img_in_txt_in_offloading")
    expected = project.train(device, "plain", *precision)
    for options in (CHECKPOINTED, OFFLOADED, KEPT, swap, (*OFFLOADED, *swap), (*OFFLOADED, *KEPT, *swap)):
        assert_same(project.train(device, "saving", *precision, *options), expected)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("how", [(), BF16, (*BF16, *FP8, *OFFLOADED)], ids=["float32", "bf16", "fp8"])
def test_a_resumed_run_ends_with_equal_bytes(
    project: Project, device: torch.device, how: tuple[str, ...]
) -> None:
    """Dropout and the optimizer's moments go on where they stopped, and so do the order and all noise."""
    random = ("--network_dropout", "0.2", "--lr_scheduler", "cosine", "--gradient_accumulation_steps", "2")
    full = project.train(device, "whole", *how, *random, steps=5)
    project.train(device, "stopped", *how, *random, "--save_every_n_steps", "2", "--save_state", steps=5)
    resumed = project.train(
        device, "resumed", *how, *random, "--resume", "output/stopped-step00000002-state", steps=5
    )
    assert_same(resumed, Trained(full.losses[2:], full.tensors))
    output = project.folder / "output"
    assert tensor_bytes(output / "resumed.safetensors") == tensor_bytes(output / "whole.safetensors")


def tensor_bytes(path: Path) -> bytes:
    """A safetensors file without its header, which has the run's name and time."""
    file = path.read_bytes()
    return file[8 + int.from_bytes(file[:8], "little") :]


def test_fp8_products_give_nearly_the_losses_of_fp8_weights(project: Project, device: torch.device) -> None:
    if not supports_fp8(device):
        pytest.skip(f"{device} has no fp8 units")
    expected = project.train(device, "weights", *BF16, *FP8)
    found = project.train(device, "products", *BF16, *FP8, "--fp8_fast")
    assert found.losses == pytest.approx(expected.losses, rel=5e-2)
    assert found.losses != expected.losses


@pytest.mark.parametrize("name", DEEP[:3])
def test_compiled_blocks_give_the_losses_of_eager_ones(
    name: str, project_of: Find, device: torch.device
) -> None:
    project = project_of(name)
    expected = project.train(device, "eager", *BF16, *CHECKPOINTED)
    found = project.train(device, "compiled", *BF16, *OFFLOADED, *KEPT, "--compile")
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)


@pytest.mark.usefixtures("repeatable")
def test_a_whole_transformer_swaps_and_steps_in_the_backward_pass(
    project: Project, device: torch.device
) -> None:
    """Trained with the optimizer inside the backward pass, its blocks swapped: the bits of a run without."""
    if not project.family.train_full or "--dit_high_noise" in project.family.train:
        pytest.skip("no script trains the whole transformer")
    adafactor = ("--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False")
    fused = ("--fused_backward_pass", *adafactor, "scale_parameter=False", "--max_grad_norm", "0")
    for how in (BF16, (*BF16, "--full_bf16", *CHECKPOINTED)):
        expected = project.train(device, "plain", *fused, *how, whole=True)
        swapped = project.train(
            device, "swapped", *fused, *how, "--blocks_to_swap", project.swappable, whole=True
        )
        assert swapped.losses == expected.losses
        assert all(equal_bits(swapped.tensors[name], tensor) for name, tensor in expected.tensors.items())
        on_the_cpu = project.train(CPU, "cpu", *fused, *how, whole=True)
        assert expected.losses == pytest.approx(on_the_cpu.losses, rel=2e-2)


ADAFACTOR = ("--optimizer_args", "relative_step=False", "scale_parameter=False")
# the package, the name, further options
PLAIN = (
    ("torch", "AdamW", ()),
    ("torch", "SGD", ("--optimizer_args", "momentum=0.9")),
    ("torch", "torch.optim.Adamax", ()),
    ("transformers", "Adafactor", ADAFACTOR),
    ("lion_pytorch", "Lion", ()),
    ("prodigyopt", "Prodigy", ("--learning_rate", "1")),
    ("schedulefree", "AdamWScheduleFree", ()),
    ("schedulefree", "RAdamScheduleFree", ()),
)
EIGHT_BITS = tuple(("bitsandbytes", name, ()) for name in ("AdamW8bit", "PagedAdamW8bit", "Lion8bit"))
IDS = [name for _, name, _ in (*PLAIN, *EIGHT_BITS)]


@pytest.fixture
def wan(project_of: Callable[[str], Project]) -> Project:
    return project_of("wan t2v-1.3B")


@pytest.mark.parametrize(("package", "name", "more"), PLAIN, ids=IDS[: len(PLAIN)])
def test_losses_of_every_optimizer_are_those_of_the_cpu(
    wan: Project, device: torch.device, package: str, name: str, more: tuple[str, ...]
) -> None:
    pytest.importorskip(package)
    chosen = ("--optimizer_type", name, *more)
    ours, theirs = (wan.train(where, f"{name} {where.type}", *chosen, steps=5) for where in (device, CPU))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert all(tensor.isfinite().all() for tensor in ours.tensors.values())


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize(("package", "name", "more"), [*PLAIN, *EIGHT_BITS], ids=IDS)
def test_a_state_goes_on_to_the_same_bits(
    wan: Project, device: torch.device, package: str, name: str, more: tuple[str, ...]
) -> None:
    pytest.importorskip(package)
    if (package, device.type) == ("bitsandbytes", "cpu") and "Paged" in name:
        pytest.skip("paged memory is CUDA's")
    chosen = ("--optimizer_type", name, *more)
    full = wan.train(device, "whole", *chosen, steps=4)
    wan.train(device, "half", *chosen, "--save_state", steps=2)
    resumed = wan.train(device, "resumed", *chosen, "--resume", "output/half-state", steps=4)
    assert resumed.losses == full.losses[2:]
    assert all(equal_bits(resumed.tensors[key], tensor) for key, tensor in full.tensors.items())
