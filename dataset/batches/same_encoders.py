"""Check that all caches of a training were made by the same encoders, as far as the files record them."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dataset.batches.items import NO_COMMANDS, CachingCommands
from modules.contract.data import LATENTS_MADE, SOUND_MADE, MadeBy

logger = logging.getLogger(__name__)

# of a network's file: `modules.checkpoints.opening.fingerprint`
_FINGERPRINT = re.compile(r"([0-9a-f]{8})[0-9a-f]{24}")
SHORTENED = r"\1..."
# key of `Family.media_identity` for the conditions stored with the latents, in which tables may differ
_BESIDE_LATENTS = frozenset({"image", "sections"})


@dataclass
class SameEncoders:
    """Compare the encoders of cached batches, and warn once for each part (latents, each encoder's texts).

    Never an error: two files with different fingerprints may hold one network, and the small difference of
    another dtype does no harm. Files of other programs do not record their encoders.
    """

    commands: CachingCommands = NO_COMMANDS
    _first: dict[str, MadeBy] = field(default_factory=dict)  # by part
    _told: set[str] = field(default_factory=set)  # parts

    def warn(self, made_by: Iterable[MadeBy]) -> None:
        """Warn if caches were made by other encoders than those read before."""
        said = self.difference(made_by)
        if said is not None:
            logger.warning(said)

    def difference(self, made_by: Iterable[MadeBy]) -> str | None:
        """Return the text of the warning; None if there is nothing new."""
        files, parts, has_other_networks = list[str](), set[bool](), False
        for made in made_by:
            first = self._first.setdefault(made.part, made)
            keys = made.encoder.keys() | first.encoder.keys()
            if made.part == LATENTS_MADE:  # without image conditions a file has no image encoder
                keys = (made.encoder.keys() & first.encoder.keys()) - _BESIDE_LATENTS
            keys = {key for key in keys if first.encoder.get(key) != made.encoder.get(key)}
            if made.part in self._told or not keys:
                continue
            self._told.add(made.part)
            parts.add(first.part in (LATENTS_MADE, SOUND_MADE))
            for one in (first, made):
                texts = {key: one.encoder.get(key, "none") for key in sorted(keys)}
                has_other_networks |= any(map(_FINGERPRINT.fullmatch, texts.values()))
                said = [f"{key} {_FINGERPRINT.sub(SHORTENED, text)}" for key, text in texts.items()]
                files.append(f"{one.path}: {', '.join(said)}")
        if not files:
            return None
        again = ([self.commands.latents] if True in parts else []) + (
            [self.commands.text] if False in parts else []
        )
        consequence = (
            "Unless the encoders' files hold the same network, the model learns a mixture that fits neither."
            if has_other_networks
            else "Their values differ slightly."
        )
        remedy = f"{consequence} To make all caches alike, cache again with:"
        return "\n  ".join(["Not all caches were made by the same encoders:", *files, remedy, *again])


def describe_identity(identity: Mapping[str, str]) -> list[str]:
    """Return the facts that identify an encoder, a line each; fingerprints are shortened."""
    return [
        f"{key.replace('_', ' ')}: " + _FINGERPRINT.sub("fingerprint \\1...", value)
        for key, value in identity.items()
    ]
