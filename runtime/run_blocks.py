"""The one loop over a transformer's blocks, and runners that other code can wrap around it.

Every DiT is embed -> blocks -> unembed (`BlockNetwork`; LTX-2 predicts two velocities in its own `forward`).
For its blocks it calls `run_blocks`, which calls the DiT's runner: `run_in_order`, or a replacement set by
`set_runner`. A runner usually wraps the earlier one, so several stack up:

    inner = get_runner(dit)

    def run(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        before = hidden.x
        inner(dit, hidden, overrides)  # or not at all: a step cache adds the last pass's residual instead
        ...

    set_runner(dit, run)
"""
# Letters: B batch, L tokens, C width

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from protocols.family import DitSpec
from protocols.steps import NO_OVERRIDES, Overrides

_RUNNER = "_runner"  # attribute of a network that stores its runner


@dataclass(eq=False)
class Hidden:
    """The hidden state of one forward pass: `x` goes through the blocks, `tokens` are their other inputs.

    Blocks replace `x` here so that nothing else refers to it, and a block's input is freed when the block is
    done. An `x` passed from function to function would stay on the device until the last of them returns (1.4
    GiB for Wan 14B at 1280x720, 81 frames).
    """

    x: Tensor  # B L C
    tokens: Any  # a record of the other inputs; each model defines its class
    # for each block B L' C, added to the first L' tokens of its result; None: nothing is added
    block_residuals: Sequence[Tensor | None] = ()
    # for each of the first blocks B T C, added to the last T tokens of its result (DeepStack)
    text_residuals: Sequence[Tensor] = ()
    control_tokens: Tensor | None = (
        None  # B L C, input of the blocks of `DitSpec.side_list`; None: they do not run
    )
    control_scales: Tensor | None = None  # B blocks: factor on the hint of each side block
    # called with its number before each block of the main stream, and after the last one; may change `x`
    before_block: Callable[[int, "Hidden"], None] | None = None


Runner = Callable[[nn.Module, Hidden, Overrides], None]  # runs the network's blocks, which change `hidden.x`


def run_blocks(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
    """Run the blocks of a DiT with its runner, a function that may be replaced; it changes `hidden.x`."""
    runner: Runner = dit.__dict__.get(_RUNNER, run_in_order)
    runner(dit, hidden, overrides)


def run_in_order(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
    """Run all blocks in order, except `overrides.skip_blocks`, which pass their input through.

    Blocks are numbered over all lists, in the order of `DitSpec.block_lists`. A block of the side stream
    returns a hint, which is added to `x` after the next block of the main stream.
    """
    spec = get_spec(dit)
    lists = spec.blocks(dit)
    blocks = list(chain.from_iterable(lists.values()))
    order: Sequence[int] = range(len(blocks))
    if spec.side_list:  # its blocks are numbered last, but run between the blocks of the main stream
        order = spec.execution_order([len(blocks_of_list) for blocks_of_list in lists.values()])
    num_main_blocks = len(blocks) - len(lists.get(spec.side_list, ()))
    hint: Tensor | None = None
    for index in order:
        if index < num_main_blocks:
            _run_main_block(blocks[index], index, hidden, overrides)
            if hint is not None:
                hidden.x = hidden.x + hint
                hint = None
        elif hidden.control_tokens is not None:
            # the side stream changes itself, and gives the main stream a hint
            hidden.control_tokens, hint = blocks[index](hidden.control_tokens, hidden.x, hidden.tokens)
            if hidden.control_scales is not None:
                hint = hint * hidden.control_scales[:, index - num_main_blocks, None, None]
    if hidden.before_block is not None:
        hidden.before_block(len(blocks), hidden)


def _run_main_block(block: nn.Module, index: int, hidden: Hidden, overrides: Overrides) -> None:
    """Run a block of the main stream unless it is skipped, and add its residual to `hidden.x`."""
    # Blocks of `overrides.skip_self_attention` get a record of tokens without self-attention.
    if hidden.before_block is not None:
        hidden.before_block(index, hidden)
    if index not in overrides.skip_blocks:
        skips = index in overrides.skip_self_attention
        tokens = hidden.tokens.without_self_attention() if skips else hidden.tokens
        hidden.x = block(hidden.x, tokens)
    residual = hidden.block_residuals[index] if hidden.block_residuals else None
    if residual is not None:
        # residuals are for the first tokens; the remaining ones get zeros
        num_other_tokens = hidden.x.shape[1] - residual.shape[1]
        hidden.x = hidden.x + pad(residual.to(hidden.x.dtype), (0, 0, 0, num_other_tokens))
    if index < len(hidden.text_residuals):
        residual = hidden.text_residuals[index]
        num_other_tokens = hidden.x.shape[1] - residual.shape[1]
        hidden.x = hidden.x + pad(residual.to(hidden.x.dtype), (0, 0, num_other_tokens, 0))


class BlockNetwork(nn.Module):
    """Base of all DiTs. `embed` prepares the inputs of the blocks, `unembed` makes the prediction."""

    spec: DitSpec
    compute_dtype_parameter: ClassVar[
        str
    ]  # a parameter that has the compute dtype in every file; others may be in 8 bits
    embed: Callable[..., Hidden]
    unembed: Callable[[Tensor, Any], Any]  # takes the tokens after the blocks, and `Hidden.tokens`

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the blocks compute: that of the parameter named by `compute_dtype_parameter`."""
        return self.get_parameter(self.compute_dtype_parameter).dtype

    def forward(self, *inputs: Any, overrides: Overrides = NO_OVERRIDES, **named_inputs: Any) -> Any:
        """Predict from the inputs of `embed`.

        Args:
            inputs: Positional inputs of `embed`.
            overrides: Changes to this call.
            named_inputs: Inputs of `embed` by name.
        """
        hidden = self.embed(*inputs, overrides=overrides, **named_inputs)
        run_blocks(self, hidden, overrides)
        return self.unembed(hidden.x, hidden.tokens)


def get_runner(dit: nn.Module) -> Runner:
    """Return the runner of a DiT, the function that runs its blocks; the default one runs all in order."""
    return dit.__dict__.get(_RUNNER, run_in_order)


def set_runner(dit: nn.Module, runner: Runner) -> None:
    """Replace the runner, the function that runs a network's blocks; it gets the network as an argument."""
    setattr(dit, _RUNNER, runner)


def get_stage_files(dit: nn.Module) -> Sequence[tuple[Path, str]]:
    """Return the files of LoRAs that apply only to some stages, each with the option that names it.

    They are the network's field `stage_files`, which most networks do not have.
    """
    files: Sequence[tuple[Path, str]] = getattr(dit, "stage_files", ())
    return files


def get_spec(dit: nn.Module) -> DitSpec:
    """Return the `spec` of a network's class.

    Raises:
        TypeError: If the class has none.
    """
    spec = getattr(dit, "spec", None)
    if not isinstance(spec, DitSpec):
        raise TypeError(f"{type(dit).__name__} has no DitSpec as its `spec`")
    return spec
