"""Releases of Qwen-Image as data: what each takes beside a text. Their files look alike."""

from dataclasses import dataclass

from encoders.language_encoder import LanguageUse
from modules.contract.rules import ModelRelease, ReferenceRules
from qwen_image.configs import EDIT_RELEASES, QWEN_IMAGE
from qwen_image.options import EDIT, EDIT_2509, EDIT_2511, NAME, ORIGINAL
from qwen_image.text_encoder import EDIT_USE, PLUS_USE, QWEN_USE

MOST = 10  # pictures to edit; trained with up to three


@dataclass(frozen=True)
class Version:
    """A release."""

    name: str  # of the model in caches and saved files
    cache_tag: str
    called: str  # in messages
    release: ModelRelease
    use: LanguageUse
    references: ReferenceRules | None = None
    clean_references: bool = False  # their tokens are modulated with time 0


def _edits(option: str, use: LanguageUse, most: int, clean_references: bool = False) -> Version:
    rules = ReferenceRules(most, seen_by_text=True)
    called = f"{NAME}-{option.capitalize()}"
    return Version("qwen_image_edit", "qie", called, EDIT_RELEASES[option], use, rules, clean_references)


VERSIONS = {
    ORIGINAL: Version("qwen_image", "qi", NAME, QWEN_IMAGE, QWEN_USE),
    EDIT: _edits(EDIT, EDIT_USE, 1),
    EDIT_2509: _edits(EDIT_2509, PLUS_USE, MOST),
    EDIT_2511: _edits(EDIT_2511, PLUS_USE, MOST, clean_references=True),
}
