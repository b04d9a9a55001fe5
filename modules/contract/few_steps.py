"""Tell from its names whether a transformer was distilled to few steps, which training takes from it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_ANYWHERE = "turbo|lightning|schnell|distill?ed|distill|lightx2v|causvid|accvid|fusionx|fastwan|fasthunyuan"
_WORDS = r"lcm|dmd2?|hyper|[248](?:_steps|steps?)"  # whole words alone: they are part of others
# such a model undone again, or one that was distilled only to take its guidance as a number
_UNDONE = re.compile(r"(?:de|un|non)_?(?:turbo|schnell|distill?(?:ed)?)|(?:cfg|guidance)_?distill?(?:ed)?")
_TITLES = ("modelspec.title", "modelspec.architecture", "title", "name", "general.name", "model_name")
# names of files that say nothing of their model, which their folder then does
_PLAIN = re.compile(r"(diffusion_pytorch_)?model.*|transformer.*|unet.*")
_FOLDERS = 4  # a release's folder is so far above its transformer's file, in the hub's cache too


@dataclass(frozen=True)
class FewSteps:
    """What a model's releases of few steps are called, and what to train instead of one."""

    # completes the warning: a sentence or two
    instead: str = (
        "Train on the model that it was made from, or give --training_adapter with a LoRA that undoes the "
        "distillation"
    )
    words: str = ""  # regular expression of further words in names
    unless: str = ""  # names with this word are of the model itself

    def found_in(self, path: Path, metadata: Mapping[str, str]) -> str | None:
        """Return what says that a transformer was distilled: the name of its file or folder, or its metadata.

        None if nothing does.
        """
        path = path.absolute()
        names = [path.name if path.is_dir() else path.stem]
        if _PLAIN.fullmatch(names[0].lower()):
            names += [folder.name for folder in path.parents[:_FOLDERS]]
        names += [metadata[key] for key in _TITLES if key in metadata]
        return next((name for name in names if self._says(name)), None)

    def _says(self, name: str) -> bool:
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
        if self.unless and self.unless in plain:
            return False
        words = "|".join(filter(None, (_WORDS, self.words)))
        pattern = rf"{_ANYWHERE}|(?<![a-z0-9])(?:{words})(?![a-z0-9])"
        return re.search(pattern, _UNDONE.sub("", plain)) is not None
