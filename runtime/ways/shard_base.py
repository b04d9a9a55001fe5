"""Split the blocks of a transformer over processes: --shard_base. Standard library only.

How they are split and gathered is in `runtime/offload/sharding.py`; a whole model in training is saved by
`training/saving/split_model.py`.
"""

from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import BETWEEN_BLOCKS, option
from runtime.ways.contract import RunModes, RunUses, WayOptions, WayToRun

if TYPE_CHECKING:
    import torch

    from protocols.loading import BlockSharder


class ShardBaseOptions(
    WayOptions,
    keeps_pixels=True,
    shares="weights",
    accelerate_advice="--shard_base, which splits the model",
    accelerate_features={
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_FSDP": "accelerate's FSDP",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (tensor and pipeline parallelism)",
        "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    },
):
    """Option that splits the transformer's weights among processes."""

    shard_base: bool = option(
        "with several processes (accelerate launch --multi_gpu --num_processes N): each keeps a part of "
        "every block of the transformer, frozen or trained, and of large text encoders, and gathers a block "
        "when it runs. Embeddings, LoRAs and the VAE are in every process",
        facts={**BETWEEN_BLOCKS, "division": "shards_weights"},
    )


def _reject_fp16(precision: str) -> None:
    if precision == "fp16":
        raise OptionError(
            "--shard_base with --mixed_precision fp16: each process has parts of the gradients, and cannot "
            "tell whether fp16's scaled ones overflowed in others. Use bf16 or no"
        )


def _check_uses(uses: RunUses) -> None:
    """Raise OptionError if a run uses something that --shard_base does not support."""
    for model in uses.further_models:  # the first one is named
        raise OptionError(
            f"{model.option} with --shard_base: {model.name} would not be split over the processes. Omit "
            "one of the two"
        )
    if uses.turn_taking_options:
        raise OptionError(
            f"{uses.turn_taking_options[0]} and --shard_base cannot be used together: each process has a "
            "part of both transformers, and they stay on the devices. Omit one of the two options"
        )
    if uses.separate_sample_model:
        raise OptionError(
            "--shard_base: samples by further transformers need networks that take turns, which are not "
            f"split over processes. Omit {uses.separate_sample_model}"
        )
    if uses.foreign_module:
        raise OptionError(
            f"--shard_base with --network_module {uses.foreign_module}: modules of other packages may read "
            "whole weights, and each process has parts of them. Use one of "
            f"{', '.join(uses.own_modules)}"
        )


def _make_sharded_blocks(device: "torch.device") -> "BlockSharder | None":
    from runtime.offload.joining import have_joined  # imports torch: only where networks are loaded

    if not have_joined():
        return None
    from runtime.offload.sharding import ShardedBlocks

    return ShardedBlocks(device, "--shard_base")


def _join(run: RunModes, options: ShardBaseOptions) -> None:
    """Add --shard_base to the modes of a run; raise OptionError if blocks are swapped too."""
    swap_flag = run.speed.swap.used_flag
    if swap_flag:
        raise OptionError(
            f"--shard_base and {swap_flag} both say where the weights wait: in the other processes, "
            "or in host memory. Pass one of them; fp8 and more processes save memory together with "
            "--shard_base"
        )
    run.flags.append("--shard_base")
    run.splits_weights = "--shard_base"
    run.single_process_effects["--shard_base"] = "holds the whole model"
    # a model that needs several GPUs in training needs them in generation too
    run.flags_for_generation["--shard_base"] = True
    run.hooks.check_full_training.append(_reject_fp16)
    run.hooks.check_uses.append(_check_uses)
    run.hooks.make_block_sharder.append(_make_sharded_blocks)


SHARD_BASE = WayToRun(
    name="shard_base",
    options=ShardBaseOptions,
    is_on=lambda options: options.shard_base,
    join=_join,
)
