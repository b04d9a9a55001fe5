"""The model card of a repository that trained files are uploaded to: README.md with YAML front matter.

A card ends with a comment that holds its own SHA-256, so that one that was edited is recognised and kept.
"""

import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from modules.contract.rules import ModelRelease
from modules.control_codes import escape_control_codes

CARD = "README.md"
MOST_PROMPTS = 8
_END = re.compile(r"(?s)(.*)<!-- reelsmith card ([0-9a-f]{12}) ([0-9a-f]{64}) -->\s*")
SETTINGS = {  # what the text says of a run: metadata -> words
    "ss_network_module": "network",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_network_args": "network arguments",
    "ss_optimizer": "optimizer",
    "ss_learning_rate": "learning rate",
    "ss_lr_scheduler": "schedule",
    "ss_max_train_steps": "steps",
    "ss_num_epochs": "epochs",
    "ss_num_train_items": "items with repeats",
    "ss_gradient_accumulation_steps": "gradient accumulation",
    "ss_timestep_sampling": "timesteps",
    "ss_discrete_flow_shift": "flow shift",
    "ss_mixed_precision": "mixed precision",
    "ss_seed": "seed",
    "ss_training_comment": "comment",
}
# identifiers of the hub that a user may have meant
HUB_LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "unlicense", "openrail", "cc0-1.0"} | {
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "creativeml-openrail-m")
}
OF_DATASETS = ("resolution", "target_frames", "frame_extraction", "num_repeats")


@dataclass(frozen=True)
class CardFacts:
    """Content of a card. metadata: of the trained file."""

    name: str  # --output_name
    is_lora: bool
    release: ModelRelease
    metadata: Mapping[str, str]
    prompts: Sequence[str] = ()  # of samples while training


def write_card(facts: CardFacts) -> str:
    """Return the text of README.md. No text of a user can end the front matter, a block or the comment."""
    spec = {key.removeprefix("modelspec."): text for key, text in facts.metadata.items()}
    base = facts.release.repositories[0]
    kind = "LoRA" if facts.is_lora else "model"
    lines = [
        f"# {_escape(spec.get('title', facts.name))}",
        "",
        f"A {kind} for [{base}](https://huggingface.co/{base}), trained with Reelsmith.",
    ]
    if spec.get("description"):
        lines += ["", _escape(spec["description"])]
    words = list(_triggers(facts.metadata))
    if words:
        lines += ["", f"Words that it was taught: {_escape(', '.join(words))}"]
    if facts.is_lora:
        lines += [
            "",
            "## Use",
            "",
            _as_block(f"--lora_weight {facts.name}.safetensors --lora_multiplier 1.0"),
        ]
    settings = list(_settings(facts.metadata))
    if settings:
        lines += ["", "## Training", "", *map(_as_block, settings)]
    licence = spec.get("license", facts.release.licence)
    lines += [
        "",
        "## Licence",
        "",
        f"{_escape(licence)}. Licence of the base model: {facts.release.licence_url}",
    ]
    text = f"---\n{_front_matter(facts, spec, words)}---\n\n" + "\n".join(lines) + "\n\n"
    return f"{text}<!-- reelsmith card {_key(facts.name)} {_digest(text)} -->\n"


def may_replace(existing: str, card: str) -> bool:
    """Return whether `existing` is an unchanged card of the same file, so that `card` can take its place."""
    old, new = (_END.fullmatch(text.replace("\r\n", "\n")) for text in (existing, card))
    return old is not None and new is not None and old[2] == new[2] and _digest(old[1]) == old[3]


def _front_matter(facts: CardFacts, spec: Mapping[str, str], words: Sequence[str]) -> str:
    tags = [tag.strip() for tag in spec.get("tags", "").split(",")]
    given = spec.get("license", facts.release.licence)
    key = given.strip().lower()
    own_key = facts.release.licence_key if given == facts.release.licence else "other"
    values: dict[str, Any] = {
        "base_model": list(facts.release.repositories),
        "base_model_relation": "adapter" if facts.is_lora else "finetune",
        "tags": list(dict.fromkeys(filter(None, ["reelsmith", *(["lora"] if facts.is_lora else []), *tags]))),
        "license": key if key in HUB_LICENCES else own_key,
    }
    if values["license"] == "other":
        values["license_name"] = re.sub(r"[^a-z0-9.]+", "-", given.lower()).strip("-")[:64] or "other"
        if given == facts.release.licence:
            values["license_link"] = facts.release.licence_url
    if words:
        values["instance_prompt"] = ", ".join(words)
    if facts.prompts:
        values["widget"] = [{"text": prompt} for prompt in facts.prompts[:MOST_PROMPTS]]
    # ASCII: no character that ends a line for one reader of YAML and not for another
    return str(yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=False, width=10_000))


def _plain(value: Any) -> Any:
    """Return data whose texts are one line each, with control codes written out."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return _one_line(value) if isinstance(value, str) else value


def _triggers(metadata: Mapping[str, str]) -> Iterator[str]:
    """Yield the trigger words of the datasets, each once."""
    words = (table.get("trigger_word") for table in _tables(metadata))
    yield from dict.fromkeys(word for word in words if isinstance(word, str) and word.strip())


def _settings(metadata: Mapping[str, str]) -> Iterator[str]:
    for key, words in SETTINGS.items():
        text = metadata.get(key, "None")
        if text not in ("None", "", "{}"):
            yield f"{words}: {text}"
    for table in _tables(metadata):
        facts = (f"{name} {table[name]}" for name in OF_DATASETS if table.get(name) is not None)
        yield f"data: {', '.join(facts)}"


def _tables(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = json.loads(metadata.get("ss_datasets", "[]"))
    return tables


def _as_block(line: str) -> str:
    """Return one line of an indented block, in which Markdown has no meaning."""
    return "    " + _one_line(line)


def _escape(text: str) -> str:
    """Return text as one line in which neither Markdown nor HTML has a meaning."""
    line = html.escape(_one_line(text), quote=False)
    # what starts a heading, a list or a quotation means that only at the start
    return re.sub(r"([\\`*_{}\[\]()!|~$]|^[#+=:-])", r"\\\1", line)


def _one_line(text: str) -> str:
    return " ".join(escape_control_codes(text).split())


def _key(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
