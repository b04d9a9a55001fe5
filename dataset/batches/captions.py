"""Choose which text each sample of a micro-batch is trained with.

A function of the run's seed, the micro-batch's number in the run and the sample's place in it.
"""

import random
from collections.abc import Sequence

from dataset.batches.items import TrainingItem
from dataset.cache.files import EMPTY
from modules.seeds import derive_seed


def choose_captions(items: Sequence[TrainingItem], seed: int, number: int) -> tuple[int, ...]:
    """Return for each item which of its captions is used, from 0, or EMPTY.

    number: of the micro-batch, in the whole run. EMPTY is chosen with the table's caption_dropout_rate;
    captions are equally likely.
    """
    return tuple(_choose(item, seed, number, place) for place, item in enumerate(items))


def _choose(item: TrainingItem, seed: int, number: int, place: int) -> int:
    rate = item.table.caption_dropout_rate
    if not rate and item.captions == 1:
        return 0
    numbers = random.Random(derive_seed(seed, "caption", number, place))
    is_dropped = numbers.random() < rate
    return EMPTY if is_dropped else numbers.randrange(item.captions)
