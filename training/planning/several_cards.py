"""Compare the ways to train on several GPUs: `--plan 2x24` of a training script."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from dataset.table import DatasetTable
from protocols.family import Family
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.division import TokenCounter, divide_tokens
from runtime.planning.memory_plan import share_blocks
from runtime.planning.several_cards import SingleGpuRun, print_layouts, with_division
from runtime.ways.contract import Division
from training.checks import uses_of
from training.data.live import LiveTexts
from training.loss import NoisyBatch
from training.optimizers.stepping import check_fused_backward
from training.options import TrainingOptions
from training.planning.memory import StepPrediction, cheaper, predict


def plan_ways(
    family: Family,
    options: TrainingOptions,
    noisy_batch: NoisyBatch,
    device: torch.device,
    cards: int,
    room: DeviceMemory,
    sampled: int,
    texts: LiveTexts | None,
    tables: Sequence[DatasetTable],
) -> None:
    """Print the memory of each way to divide a training over `cards` GPUs, and the cheapest one that fits.

    Args:
        family: The model family.
        options: Options of the run.
        noisy_batch: Batch with noise and timesteps.
        device: Device of the run.
        cards: Number of cards.
        room: Memory of each card.
        sampled: Number of transformers that only samples need.
        texts: Text encoders that are loaded.
        tables: Tables of the dataset.
    """

    def estimate_on_one_gpu(options: TrainingOptions, words: tuple[str, ...]) -> SingleGpuRun:
        """Predict the memory of a step on one card; the result has a function to divide it over cards.

        `words` are the flags that were added to the command for these options.
        """
        counter = TokenCounter()
        prediction = predict(
            family,
            options,
            noisy_batch,
            device=device,
            sampled=sampled,
            texts=texts,
            watch=counter.watch,
            tables=tables,
        )
        divide = partial(_divide_prediction, family, options, prediction, counter, cards)
        return SingleGpuRun(words, counter.heads, options.can_swap, divide)

    # the run as it is, then with one more option that saves memory at a time
    def runs() -> Iterator[SingleGpuRun]:
        alone = replace(options, speed=with_division(options.speed, Division(1)))
        yield estimate_on_one_gpu(alone, ())
        flags: tuple[str, ...] = ()
        for line, changed in cheaper(alone, len(family.experts) - 1):
            flags = (*flags, *line.split())
            yield estimate_on_one_gpu(changed, flags)

    print_layouts(runs(), cards, room, is_training=True)


def _divide_prediction(
    family: Family,
    options: TrainingOptions,
    prediction: StepPrediction,
    counter: TokenCounter,
    cards: int,
    division: Division,
) -> StepPrediction:
    """Return the prediction for each of several cards, from the one for a single card.

    Args:
        family: The model family.
        options: Options of the run.
        prediction: The prediction for a single card.
        counter: The counter of tokens that watched the step.
        cards: Number of cards.
        division: How the cards divide the work.

    Raises:
        UserError: If the run cannot be divided in this way.
    """
    moments, waiting, swaps = prediction.moments, prediction.waiting, prediction.swaps
    if options.is_fused:
        check_fused_backward(options.optimizer.optimizer_type, cards)
    if division != Division(cards):  # more than plain data parallelism: the ways may not support it
        uses = uses_of(family, options)
        for check in with_division(options.speed, division).modes.hooks.check_uses:
            check(uses)
    if division.context > 1:  # so many cards share the tokens of a clip
        moments = divide_tokens(moments, division.context, counter)
    if division.shards:  # the weights of blocks are spread over the cards
        swaps = [share_blocks(prediction.block_weights, cards)]
    return replace(prediction, moments=moments, waiting=waiting // division.context, swaps=swaps)
