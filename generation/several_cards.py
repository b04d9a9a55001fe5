"""Compare the ways in which several cards can make clips: `--plan 2x24` of a generation script."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch

from generation.expert_memory import all_requests
from generation.memory import PhasePrediction, predict, predict_largest
from generation.options import GenerationOptions
from generation.together import check_together
from modules.contract.family import Family
from modules.options import override_options
from modules.planning.communication import Division, WorkCounter, divide_tokens
from modules.planning.dry_run import quiet
from modules.planning.memory_plan import Room
from modules.planning.several_cards import Rehearsed, print_ways, with_division


def plan_ways(
    family: Family, options: GenerationOptions, device: torch.device, cards: int, room: Room
) -> None:
    """Print the ways to use `cards` cards, and the cheapest that fits. room: of each."""
    alone = replace(options, speed=with_division(options.speed, Division(1)))
    with quiet():
        prepared, _ = predict_largest(family, alone, all_requests(family, alone), device, room)

    def rehearsed(options: GenerationOptions, *words: str) -> Rehearsed:
        counter = WorkCounter()
        with quiet():
            whole = predict(family, options, prepared, device, room=room, watch=counter.watch)
        work = counter.work(whole.blocks)

        @cache
        def shared() -> PhasePrediction:
            asked = replace(options, speed=with_division(options.speed, Division(cards, shards=True)))
            with quiet():
                return predict(family, asked, prepared, device, room=room)

        def divide(division: Division) -> PhasePrediction:
            if division != Division(cards):
                check_together(family, replace(options, speed=with_division(options.speed, division)))
            prediction = shared() if division.shards else whole
            if division.context == 1:
                return prediction
            return replace(prediction, moments=divide_tokens(prediction.moments, division.context, work))

        return Rehearsed(words, work, True, divide)

    def runs() -> Iterator[Rehearsed]:
        yield rehearsed(alone)
        if alone.speed.fp8.quantisation is None:
            fp8 = replace(alone, speed=override_options(alone.speed, {"fp8_scaled": True}))
            yield rehearsed(fp8, "--fp8_scaled")

    print_ways(runs(), cards, room, is_training=False)
