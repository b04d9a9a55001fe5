"""Make the network that a training puts into a model: a LoRA, or what the family makes in its place."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from contract.family import Family, Trains
from contract.made_networks import MadeNetwork, WritesNetwork, made_network_of
from contract.new_words import taught_word_of
from dataset.batches.items import TrainingItem
from dataset.sources.captions import complete_caption, lines_of
from dataset.sources.media_source import MediaSource
from dataset.table import DatasetConfig, DatasetTable
from modules.errors import DatasetError
from modules.seeds import derive_seed
from networks.adapter import ForeignNetwork, TrainableNetwork, make_network
from networks.options import NetworkOptions

logger = logging.getLogger(__name__)


def make_trained_network(
    family: Trains,
    options: NetworkOptions,
    dit: nn.Module,
    seed: int,
    *,
    encoders: Mapping[str, nn.Module],
    in_dit: bool,
    resumed: Mapping[str, Tensor] | None = None,
    with_values: bool = True,
) -> TrainableNetwork:
    """Return the network that learns, put into the loaded model.

    with_values: it begins with those of its file. The rest as in `networks.adapter.make_network`.
    """
    made = made_network_of(family)
    if made is None:
        return make_network(
            options,
            family.lora_module,
            dit,
            seed,
            encoders=encoders,
            in_dit=in_dit,
            resumed=resumed,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "network"))
        module = made.make(nn.ModuleDict(encoders) if made.in_texts else dit, with_values)
    return ForeignNetwork(module.requires_grad_(True), dit)


def written_by(family: Family) -> WritesNetwork | None:
    """Return what writes files of a made network that have a form of their own."""
    made = made_network_of(family)
    return None if made is None else made.write


def check_data(made: MadeNetwork | None, config: DatasetConfig, kept: str) -> DatasetConfig:
    """Check the tables of a made network: its control pictures, or that all pictures are of what it learns.

    kept: attribute of tables whose samples stay as the model without a network predicts them. Returns the
    tables; with sentences in place of captions, pictures need none. Raises DatasetError.
    """
    if made is None:
        return config
    if not made.in_texts:
        from dataset.control_pairs import check_pairs  # other trainings read caches alone

        check_pairs(config, made.called)
        return config
    for table in config.datasets:
        if table.is_reg:
            raise DatasetError(
                f"{table.name}: {made.called} learns nothing from regularisation pictures, as their captions "
                "lack the word. Leave them out"
            )
        if kept in table.attributes:
            raise DatasetError(
                f"{table.name}: {kept} compares a network in the transformer with the model without it, and "
                f"{made.called} has none there. Leave it out"
            )
    if not made.sentences:
        return config
    tables = tuple(replace(table, class_tokens=table.class_tokens or "") for table in config.datasets)
    return replace(config, datasets=tables)


def find_caption_reader(family: Family) -> MadeNetwork | None:
    """Return what learns from captions alone in a training: the only network, or a word next to a LoRA."""
    taught = taught_word_of(family)
    made = made_network_of(family) if taught is None else taught.network
    return made if made is not None and made.in_texts and not made.sentences else None


def check_captions(family: Family, items: Sequence[TrainingItem]) -> None:
    """Check the captions of what learns in text encoders. Raises DatasetError."""
    made = find_caption_reader(family)
    if made is None:
        return
    captions = [
        _complete(item.kind.caption(item.source_stem, number), item.table)
        for item in items
        if not item.table.is_reg  # which a LoRA next to it learns from
        for number in range(item.captions)
    ]
    remark = made.check_captions(captions)
    if remark:
        logger.warning("%s", remark)


def check_source_captions(
    family: Family, listed: Sequence[tuple[DatasetTable, Sequence[MediaSource]]]
) -> str:
    """Return a remark about the captions of the sources of tables, "" if there is none.

    Raises DatasetError as `check_captions`.
    """
    made = find_caption_reader(family)
    if made is None:
        return ""
    captions = [
        _complete(caption, table)
        for table, sources in listed
        if not table.is_reg
        for source in sources
        for caption in (source.caption, *source.more_captions)
        if caption is not None
    ]
    return made.check_captions(captions) if captions else ""


def _complete(caption: str, table: DatasetTable) -> str:
    """Return a caption with what is added to it at each step, if captions vary."""
    if not table.changes.is_raw:  # the source has it as it is trained
        return caption
    if not table.changes.wildcards:
        caption = next(iter(lines_of(caption)), "")
    return complete_caption(caption, table.trigger_word, table.caption_prefix, table.caption_suffix)
