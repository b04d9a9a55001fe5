"""Count the operators that a training step of FLUX.1 starts.

    python benchmarks/launches.py

A fast GPU ends the kernels of a small image sooner than the host starts them, so that a step takes as long as
the host needs for its operators. They are counted on the CPU, in a tiny FLUX.1 in bf16 with a LoRA on all
linear layers of its blocks: the forward pass with checkpointing, its backward pass, clipping and a step of
AdamW. The baseline is diffusers' class of the same sizes with a LoRA of PEFT, the same steps and optimizer.
Its layers for q, k and v are one layer here. Views are not counted. benchmarks/traffic.py has the kernels of
a released model (column `kernels`).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.traffic_count import FREE  # noqa: E402

RANK = 4
# the linear layers of diffusers' blocks, by the end of their names
BASELINE_TARGETS = [
    *("norm1.linear", "norm1_context.linear", "norm.linear", "to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp", "proj_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]


class Operators(TorchDispatchMode):
    """Counts operators by name, without views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not func.is_view and not FREE.match(name):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_step(predict: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Counter[str]:
    """Return the operators of the second step, because the first creates the optimizer's states."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    counts: Counter[str] = Counter()
    for _ in range(2):
        with Operators() as operators:
            with torch.autocast("cpu", torch.bfloat16):
                output = predict()
            output.float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts = operators.counts
    return counts


def count_ours(blocks: int) -> Counter[str]:
    """Count a step of our network with `blocks` blocks in each of its two lists."""
    from networks.cast_factors import cast_before_pass
    from running.offload.checkpointing import checkpoint_blocks
    from tests.flux.making import tiny_inputs
    from tests.tiny.dits import DITS

    (tiny,) = (each for each in DITS if each.name == "flux dev")
    dit, network = tiny.with_lora(blocks=blocks)
    dit.to(torch.bfloat16).train()
    for layer in network.layers:
        layer.joins_from = 0  # as in layers of released sizes
    cast_before_pass(dit, network.layers_of_dit())
    checkpoint_blocks(dit, tiny.spec)
    inputs = tiny_inputs("dev", lengths=(5,))
    return count_step(lambda: dit(**inputs), list(network.parameters()))


def count_baseline(blocks: int) -> Counter[str]:
    """Count a step of diffusers' network with PEFT."""
    from dataclasses import replace

    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    from tests.flux.making import run_there, tiny_inputs
    from tests.tiny.flux import CONFIGS

    config = replace(CONFIGS["dev"], double_blocks=blocks, single_blocks=blocks)
    width = config.dim // config.num_heads
    side = 7 * width // 16
    model: Any = FluxTransformer2DModel(
        in_channels=config.token_dim,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=width,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=True,
        axes_dims_rope=(width - 2 * side, side, side),
    )
    model.requires_grad_(False).to(torch.bfloat16).train()
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=BASELINE_TARGETS))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()  # as diffusers' training scripts do
    model.enable_gradient_checkpointing()
    inputs = tiny_inputs("dev", lengths=(5,))
    return count_step(lambda: run_there(model, inputs, 0), parameters)


def main() -> None:
    """Print the operators of both, and those that differ most."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=10, help="operators that are listed; default 10")
    args = parser.parse_args()
    ours, baseline = ([count(2), count(3)] for count in (count_ours, count_baseline))
    of_blocks = [sum(three.values()) - sum(two.values()) for two, three in (ours, baseline)]
    wholes = [sum(each[0].values()) for each in (ours, baseline)]
    print(f"step with 2 + 2 blocks: {wholes[0]} operators, diffusers and PEFT {wholes[1]}", end="")
    print(f", ratio {wholes[0] / wholes[1]:.3f}")
    print(f"one more block of each kind: {of_blocks[0]}, diffusers and PEFT {of_blocks[1]}", end="")
    print(f", ratio {of_blocks[0] / of_blocks[1]:.3f}")
    for name, count in (ours[1] - ours[0]).most_common(args.maximum):
        print(f"  {count:4d} {name} (there {baseline[1][name] - baseline[0][name]})")


if __name__ == "__main__":
    main()
