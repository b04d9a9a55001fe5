"""Datasets in the layout of CogVideoX's tools.

Prompts and clips are in two lists or a table; precomputed tensors may be next to the clips.
"""

import logging
from collections.abc import Mapping
from typing import Any

from dataset.config_keys import FRAMES
from dataset.forms.cogvideox_keys import CogVideoXKeys
from dataset.forms.contract import SourceFormat
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable, get_cache_key_defaults

logger = logging.getLogger(__name__)


class CogVideoX(SourceFormat):
    """Format of clips and prompts that are listed in two text files or in a table, for CogVideoX trainers."""

    name = "CogVideoX"
    source = "cogvideox_root"
    keys = CogVideoXKeys
    shared_keys = ("caption_column",)
    has_dependent_keys = True

    def find_conflict(self, fields: Mapping[str, Any]) -> str | None:
        """Return why alpha_mask and load_tensors cannot be combined; None unless both are set."""
        if fields["format_keys"].load_tensors and fields["alpha_mask"]:
            return "alpha_mask cannot be used with load_tensors, which reads no frames; omit one"
        return None

    def complete(self, fields: dict[str, Any], position: str) -> None:
        """Set whether latents are precomputed; if so, warn about frame keys, which then have no effect."""
        fields["has_precomputed_latents"] = fields["format_keys"].load_tensors
        if not fields["has_precomputed_latents"]:
            return
        unused = [name for name, default in get_cache_key_defaults(FRAMES).items() if fields[name] != default]
        if unused:
            logger.warning(
                "%s: %s is ignored because with load_tensors each clip is what was prepared, whole",
                position,
                " and ".join(unused),
            )

    def list_sources(self, table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
        """Return the clips that the lists or the table name."""
        from dataset.forms.cogvideox_lists import list_cogvideox  # it loads torch

        return list_cogvideox(table, faults)


COGVIDEOX = CogVideoX()
