"""Show a text in the language of the current page: English, or its translation from a table.

`say("step %(step)s", step=200)` is the English text, and remembers its template and values. Programs compare,
keep and log it in English; a page shows its translation. So a text made by a background job appears in
the language of each reader. A text that the table lacks stays English.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from modules.console import format_duration
from modules.control_codes import escape_control_codes
from modules.errors import OptionError


@dataclass(frozen=True)
class Language:
    """A language: its translations of English text, and the page that is shown in it.

    `code` is the value of HTML's `lang` attribute. `address` is the URL of the page, shown again after the
    language changes. `others` contains the code and native name of every available language.
    """

    code: str = "en"
    translations: Mapping[str, str] = field(default_factory=dict)
    address: str = "/"
    all_languages: tuple[tuple[str, str], ...] = ()


ENGLISH = Language()
_language: ContextVar[Language] = ContextVar("language", default=ENGLISH)


def language() -> Language:
    """Return the language of the current page request; English outside of a request."""
    return _language.get()


@contextlib.contextmanager
def speaking(chosen: Language) -> Iterator[None]:
    """Use a language for all text of a page request, including threads that it starts."""
    before = _language.set(chosen)
    try:
        yield
    finally:
        _language.reset(before)


class TranslatableText(str):
    """An English text (as a `str`) with the key of its translation and the values to insert there."""

    __slots__ = ("key", "values")
    key: str
    values: Mapping[str, Any]

    def __new__(cls, text: str, key: str, values: Mapping[str, Any]) -> "TranslatableText":
        """Make a translatable text that is the English `text` as a `str`."""
        words = super().__new__(cls, text)
        words.key = key
        words.values = values
        return words

    def __str__(self) -> str:  # str(error) keeps what can be translated
        return self

    def __html__(self) -> Markup:  # what `escape` calls
        return escape(escape_control_codes(self.translated()))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TranslatableText":
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.english(),)

    def english(self) -> str:
        """Return the English text."""
        return str.__str__(self)

    def translated(self) -> str:
        """Return the text in the page's language."""
        text = _language.get().translations.get(self.key)
        if text is None:
            return self.english()
        if not self.values:
            return text
        return text % {name: show(value) for name, value in self.values.items()}


class JoinedText(TranslatableText):
    """Several texts joined by a separator; each is translated on its own."""

    __slots__ = ()

    def translated(self) -> str:
        """Return the texts in the page's language, with the separator between them."""
        return self.key.join(str(show(text)) for text in self.values["texts"])


def join(separator: str, texts: Iterable[str]) -> TranslatableText:
    """Join texts with a separator; each translatable text is still translated on its own."""
    row = list(texts)
    return JoinedText(separator.join(row), separator, {"texts": row})


def show(value: Any) -> Any:
    """Return a value for a page template; a translatable text is translated to the page's language."""
    return value.translated() if isinstance(value, TranslatableText) else value


def show_all(value: Any) -> Any:
    """Return a JSON value with its translatable text in the page's language."""
    if not _language.get().translations:
        return value
    if isinstance(value, dict):
        return {name: show_all(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [show_all(item) for item in value]
    return show(value)


def say(text: str, /, **values: Any) -> TranslatableText:
    """Return a translatable English text, with `values` inserted for its `%(name)s`."""
    return TranslatableText(text % values if values else text, text, values)


def refusal(text: str, /, **values: Any) -> OptionError:
    """Return the error that rejects what a user typed or pressed, with a text as `say` returns it."""
    return OptionError(say(text, **values))


def say_count(number: int, singular: str, plural: str, /, **values: Any) -> TranslatableText:
    """Select the singular or plural text for a number; the plural is the key of the translation.

    `%(n)s` in the texts is replaced by the number, with commas between thousands.
    """
    values = {"n": f"{number:,}", **values}
    return TranslatableText((singular if number == 1 else plural) % values, plural, values)


UNITS = (say("%(n)s s"), say("%(n)s min"), say("%(n)s h"), say("%(n)s d"))


def say_duration(seconds: float) -> TranslatableText:
    """Format a duration for people, such as `2 h 10 min`, in the page's language."""
    words = format_duration(seconds).split()
    keys = {unit.split()[1]: unit for unit in UNITS}
    return join(
        " ", (say(keys[unit], n=number) for number, unit in zip(words[::2], words[1::2], strict=True))
    )


def fill_template(text: str, /, **values: Any) -> Markup:
    """Insert values into a template text, which may contain HTML; values other than Markup are escaped."""
    shown = Markup(_language.get().translations.get(text, text))
    return shown % values if values else shown


def fill_counted(number: int, singular: str, plural: str, /, **values: Any) -> Markup:
    """Select the singular or plural template for a number, and insert the number and the values."""
    english = singular if number == 1 else plural
    return Markup(_language.get().translations.get(plural, english)) % {"n": f"{number:,}", **values}
