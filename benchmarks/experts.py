"""Count what two experts take on a device, and how often each is loaded, over several videos.

    python benchmarks/experts.py

Two tiny random Wan2.2 transformers take turns as in wan_generate_video.py with three prompts in --from_file.
The device is simulated in this machine's memory: weights that are copied there and all tensors of a step are
counted, also while one expert makes room for the other. The peak is divided by that of one expert that runs
all steps alone. Nothing is timed.
"""

import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402  # found from here on
from torch import Tensor, nn  # noqa: E402

from generation.denoise import predictor  # noqa: E402
from generation.experts import Check, ExpertOffloader  # noqa: E402
from modules.parser import Parser  # noqa: E402
from protocols.loading import Placement  # noqa: E402
from protocols.steps import Step  # noqa: E402
from runtime.offload.host_memory import Transfer  # noqa: E402
from runtime.offload.turns import HostCopy  # noqa: E402
from runtime.planning.dry_run import HOST, Ledger  # noqa: E402
from runtime.planning.kernels import PlannedKernels  # noqa: E402
from tests.tiny import wan_dit  # noqa: E402
from wan.configs import TASKS  # noqa: E402
from wan.family import Wan  # noqa: E402
from wan.files import WanFiles  # noqa: E402

AIM = 1.1
VIDEOS = 3
CUDA = torch.device("cuda")  # how turns are taken; nothing is put on one
TIMESTEPS = (999.0, 950.0, 600.0, 200.0)


class Device:
    """Counts the bytes of weights on the device; a `Transfer` whose copies are done at once."""

    def __init__(self) -> None:
        self._plain = Transfer(HOST)
        self.weights = self.maximum = 0
        self.record_event, self.copy, self.wait, self.finish = (
            getattr(self._plain, name) for name in ("record_event", "copy", "wait", "finish")
        )

    def allocate(self, size_bytes: int) -> Tensor:
        """Return memory that counts until nothing holds it."""
        memory = self._plain.allocate(size_bytes)
        self.take(memory.untyped_storage(), size_bytes)
        return memory

    def take(self, owner: object, size_bytes: int) -> None:
        """Count bytes until their owner is gone."""
        self.weights += size_bytes
        self.maximum = max(self.maximum, self.weights)
        weakref.finalize(owner, self._give, size_bytes)

    def _give(self, size_bytes: int) -> None:
        self.weights -= size_bytes

    def log_step(self, activations: int) -> None:
        """Record a step that takes `activations` bytes in addition to the weights."""
        self.maximum = max(self.maximum, self.weights + activations)


def main() -> None:
    """Print the peak, its ratio to one expert alone, and the loads."""
    Parser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as made:
        family = _family(Path(made))
        maximum, loads = _run(family, [1, 0] * VIDEOS, TIMESTEPS)
        alone, _ = _run(family, [0], TIMESTEPS[2:])
    print(
        f"device: {maximum / 1e6:.1f} MB, one expert alone {alone / 1e6:.1f} MB, ratio {maximum / alone:.3f}"
    )
    print(f"loads of {VIDEOS} videos: {', '.join(f'expert {n}: {loads[n]}' for n in sorted(loads))}")
    raise SystemExit(maximum / alone > AIM or max(loads.values()) > 1)


def _family(folder: Path) -> Wan:
    low, high = (
        wan_dit.write_dit(
            folder, wan_dit.tiny_state("t2v", seed, torch.bfloat16, num_layers=8, dim=256), name=f"dit{seed}"
        )
        for seed in range(2)
    )
    return Wan(WanFiles(dit=low, dit_high_noise=high, task=TASKS["t2v-A14B"]), boundary=875.0)


def _run(family: Wan, order: list[int], timesteps: tuple[float, ...]) -> tuple[int, Counter[int]]:
    """Run the steps of the videos; return the peak bytes on the device, and each expert's loads."""
    device, loads = Device(), Counter[int]()

    def read(expert: int) -> nn.Module:
        loads[expert] += 1
        return family.load_dit(Placement(HOST), expert).eval().requires_grad_(False)

    def load(expert: int) -> nn.Module:
        dit = read(expert)
        for tensor in dit.parameters():  # where they are now is the device, until there is a copy
            device.take(tensor.untyped_storage(), tensor.nbytes)
        return dit

    def copy(dit: nn.Module, _: torch.device) -> HostCopy:
        return HostCopy(dit, HOST, None, device)

    def aside(expert: int, check: Check) -> tuple[nn.Module, HostCopy]:
        dit = read(expert)
        return dit, copy(dit, HOST)

    turns = ExpertOffloader(
        *(family.experts, CUDA, load, aside),
        one_at_a_time=True,
        free_host_memory=lambda: None,
        make_copy=copy,
    )
    text: dict[str, Tensor | list[Tensor]] = {"t5": [torch.zeros(7, 32, dtype=torch.bfloat16)]}
    noise = torch.zeros(1, 16, 3, 8, 12)
    with turns.phase(order) as dit_at, torch.no_grad():
        for timestep in timesteps * (order.count(0)):
            dit_at(timestep)
            with PlannedKernels(), Ledger(HOST) as ledger:
                predict = predictor(family, dit_at, Step(0, 4, 1.0, timestep, noise), True)
                _ = predict(text), predict(text)
                device.log_step(max(sum(moment.values()) for moment in ledger.peaks.values()))
    return device.maximum, loads


if __name__ == "__main__":
    main()
