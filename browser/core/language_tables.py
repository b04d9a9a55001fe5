"""Read the tables of languages, and write the script that gives a browser the strings of one.

A table is a file in `languages`: sections of English strings and their translations. The section `scripts`
is sent to the browser, for the strings of JavaScript. A second file has one more section: the first sentences
of the help of all training options. Words that a single page uses are in its folder.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLES = HERE / "languages"
PAGES = HERE.parent / "pages"
# HTML code -> the language's own name; the untranslated strings are in the first language
NAMES = (("en", "English"), ("zh", "中文"), ("ja", "日本語"))
CODES = tuple(code for code, _ in NAMES)
HEADER = "Reelsmith-Language"  # sent by a page's scripts: the language of the page
SCRIPTS = "scripts"  # section of a language file
HELPS = "helps"  # section in a separate file
PAGE_WORDS = "page"  # section of the words of a page, beside SCRIPTS


@functools.cache
def read_table(code: str) -> Mapping[str, Mapping[str, str]]:
    """Return the sections of a language's translation table; empty for English."""
    if code == CODES[0]:
        return {}
    sections: dict[str, dict[str, str]] = json.loads((TABLES / f"{code}.json").read_text(encoding="utf-8"))
    sections[HELPS] = json.loads((TABLES / f"{HELPS}_{code}.json").read_text(encoding="utf-8"))
    for path in sorted(PAGES.glob(f"*/words_{code}.json")):
        words = json.loads(path.read_text(encoding="utf-8"))
        sections[SCRIPTS] |= words.pop(SCRIPTS, {})
        sections[path.parent.name] = sections.get(path.parent.name, {}) | words.get(PAGE_WORDS, {})
    return sections


@functools.cache
def read_texts(code: str) -> Mapping[str, str]:
    """Return all translations into a language, by their English strings."""
    return {key: text for section in read_table(code).values() for key, text in section.items() if text}


@functools.cache
def write_script(code: str) -> str:
    """Return a script with the translated strings of all scripts, and functions to look them up."""
    texts = json.dumps(read_table(code).get(SCRIPTS, {}), ensure_ascii=True, separators=(",", ":"))
    return f'"use strict";\nconst LANGUAGE = "{code}", TEXTS = {texts};\n{FUNCTIONS}'


FUNCTIONS = """
// Returns an English text in the language of the page, with %(name)s replaced by values.
function translate(text, values = {}) {
  return (TEXTS[text] ?? text).replace(/%\\((\\w+)\\)s/g, (place, name) => values[name] ?? place);
}

// Returns one of two texts by a number; the plural is the one that the table has.
function translateCount(number, singular, plural, values = {}) {
  const text = number === 1 && TEXTS[plural] === undefined ? singular : plural;
  return translate(text, { n: number.toLocaleString("en"), ...values });
}

// What scripts ask for is in the language of the page, also when another tab has changed it since.
{
  const send = globalThis.fetch;
  globalThis.fetch = (address, options = {}) => {
    const headers = new Headers(options.headers);
    headers.set("HEADER", LANGUAGE);
    return send(address, { ...options, headers });
  };
}
""".replace("HEADER", HEADER)
