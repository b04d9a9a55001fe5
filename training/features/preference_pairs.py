"""The loss of pairs of a preferred and a rejected image or clip, and a check of their caches: --preference.

Compared with the model without the network, the network learns to predict preferred items more exactly and
rejected items less exactly. Source: Diffusion-DPO, Wallace et al. 2023, arXiv 2311.12908, for a flow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dataset.batches.items import CachingCommands, TrainingItem
from dataset.batches.reading import explain_no_rejected
from dataset.cache.store import Stores
from modules.errors import CacheError, DatasetError
from protocols.data import HAS_AUDIO, REJECTED_LATENTS
from training.features.hooks import Tally
from training.loss import NoisyAudio, NoisyBatch
from training.targets.passes import (
    RunPasses,
    StreamErrors,
    TrainingPasses,
    compute_target_velocity,
    measure_errors,
)

# number of items whose headers are read before anything is loaded; other headers are read during training
NUM_CHECKED_ITEMS = 1000


@dataclass(frozen=True)
class Preference:
    """Preference strength (beta of DPO), and the weight of the ordinary loss of the better items."""

    beta: float
    data_weight: float = 0.0  # factor on the usual loss of the preferred item, which is added


def require_pairs(items: Sequence[TrainingItem], stores: Stores, commands: CachingCommands) -> None:
    """Raise DatasetError or CacheError if a training item has no rejected counterpart in its cache file.

    Only the headers of about NUM_CHECKED_ITEMS items, spread over all dataset tables, are read.
    """
    tables = {item.table.index: item.table for item in items}
    for table in tables.values():
        if table.source.directory is not None and table.source.worse_directory is None:
            raise DatasetError(
                f"{table.name}: --preference learns from pairs, and this table has no worse_directory. "
                "Give it a folder with the worse ones, named like the better ones, or remove the table"
            )
    first_items: dict[int, TrainingItem] = {}
    for item in items:
        first_items.setdefault(item.table.index, item)
    stride = len(items) // NUM_CHECKED_ITEMS + 1
    for item in [*first_items.values(), *items[::stride]]:
        is_encoded_while_training = item.cache_info.on_the_fly_buckets is not None
        if is_encoded_while_training:
            raise CacheError(
                f"{item.table.name}: --preference needs the latents of the worse images, which are not "
                f"encoded while training. Cache them first:\n  {commands.latents}"
            )
        header = stores.latent_store(item.table).read(item.file_name, is_full=False)
        if REJECTED_LATENTS not in header.keys:
            raise CacheError(explain_no_rejected(item.latent_path, commands))


def pair_passes(
    preference: Preference,
    logged_metrics: Tally,
    _: RunPasses,
    passes: TrainingPasses,
    noisy_batch: NoisyBatch,
) -> Iterator[StreamErrors]:
    """Yield the losses of a batch's pairs, B; the caller applies loss weights as for single samples."""
    pairs = join_pairs(noisy_batch)
    passes = replace(passes, latents=passes.family.latent.to_model(pairs.batch.tensor("latents")))
    target = compute_target_velocity(passes, pairs)
    base_errors = add_streams(measure_errors(passes, passes.predict_base_model(pairs), target, pairs), pairs)
    passes.reset_network_seed(noisy_batch)
    errors = add_streams(measure_errors(passes, passes.predict_with_gradients(pairs), target, pairs), pairs)
    losses, logged_metrics.metrics = compare_pairs(errors, base_errors, preference)
    yield (losses,)


def join_pairs(noisy_batch: NoisyBatch) -> NoisyBatch:
    """Return a batch of 2B samples: B chosen items, then their rejected items with equal noise and text."""
    batch = noisy_batch.batch
    assert batch.rejected is not None  # the feed reads them because the feature needs REJECTED_ONES
    tensors = {
        name: ([*value, *value] if isinstance(value, list) else _stack_twice(value))
        for name, value in batch.tensors.items()
    }
    tensors["latents"] = torch.cat([batch.tensor("latents"), batch.rejected])
    doubled_batch = replace(
        batch,
        tensors=tensors,
        captions=batch.captions * 2,
        keys=batch.keys * 2,
        loss_weights=batch.loss_weights * 2,
        undropped={},  # this and `empty_text` are for other targets, which --preference excludes
        empty_text={},
        has_empty_text=batch.has_empty_text * 2,
        rejected=None,
    )
    perturbation, clean_tokens = noisy_batch.perturbation, noisy_batch.clean_tokens
    return replace(
        noisy_batch,
        batch=doubled_batch,
        noise=_stack_twice(noisy_batch.noise),
        sigmas=_stack_twice(noisy_batch.sigmas),
        timesteps=_stack_twice(noisy_batch.timesteps),
        weights=_stack_twice(noisy_batch.weights),
        perturbation=None if perturbation is None else _stack_twice(perturbation),
        audio=None
        if noisy_batch.audio is None
        else NoisyAudio(
            noise=_stack_twice(noisy_batch.audio.noise),
            sigmas=_stack_twice(noisy_batch.audio.sigmas),
            timesteps=_stack_twice(noisy_batch.audio.timesteps),
            weights=_stack_twice(noisy_batch.audio.weights),
            levels=noisy_batch.audio.levels * 2,
        ),
        clean_tokens=None if clean_tokens is None else clean_tokens.map_tensors(_stack_twice),
        levels=noisy_batch.levels * 2,
    )


def _stack_twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def add_streams(streams: Sequence[Tensor], pairs: NoisyBatch) -> Tensor:
    """Return the error of each sample, B, summed over its images and its audio if it has any."""
    image, *audios = streams
    if not audios:
        return image
    has_sound = pairs.batch.tensor(HAS_AUDIO).to(image)
    return image + audios[0] * has_sound


def compare_pairs(errors: Tensor, base_errors: Tensor, preference: Preference) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair and the mean values for the logs.

    With the margin m = (base_better - better) + (rejected - base_rejected), the loss is

        -log sigmoid(beta / 2 * m) + data_weight * better

    and the network orders a pair correctly if its margin is above 0.

    Args:
        errors: Errors of the network, 2B: errors of the better items first, then of the rejected items.
        base_errors: Errors of the model without the network, in the same order.
        preference: Strength beta, and the weight of the ordinary loss of the better items.

    Returns:
        The loss of each pair, B, and three means without gradients: error of the better items, error of the
        rejected items, fraction of pairs in the right order.
    """
    better, rejected = errors.chunk(2)
    base_better, base_rejected = base_errors.chunk(2)
    margin = (base_better - better) + (rejected - base_rejected)
    losses = -logsigmoid(preference.beta / 2 * margin)
    if preference.data_weight:
        losses = losses + preference.data_weight * better
    means = torch.stack([better.mean(), rejected.mean(), (margin > 0).float().mean()])
    return losses, means.detach()
