"""The form of the page Blocks: a LoRA, what to generate with it, and the strengths of its blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from browser.pages.blocks.strengths import LoraBlock, apply_text, format_strengths, read_strength
from browser.runs.recipes import IMAGES, ModelRecipe
from modules.pages.language import say
from modules.paths import complete_home

# fields of a generation, in their order
LABELS = {
    "prompt": say("Prompt"),
    "width": say("Width"),
    "height": say("Height"),
    "frames": say("Frames"),
    "steps": say("Steps"),
    "seed": say("Seed"),
    "start": say("Start from"),
    "end": say("End with"),
    "control": say("Follow"),
    "references": say("Edit"),
    "redraw": say("Redraw"),
}
NUMBERS = ("width", "height", "frames", "steps", "seed")
DEFAULT_SEED = "0"  # both results of a preview have it
FULL_STRENGTH = "1"
BLOCK, WEAKEN, PRESET, TYPED = "block", "weaken", "preset", "text"  # what may change the strengths
# what the user may type, apart from the fields of `LABELS`
TEXTS = ("text", "multiplier", "more", "donor", "donor_blocks", "name", "with_lora", "preset", "block")


@dataclass(frozen=True)
class BlocksForm:
    """Fields of the page Blocks."""

    file: str = ""  # path of the LoRA
    run: str = ""  # id of a run whose LoRA is shown if there is no file
    source: str = ""  # `run ID` or `model FAMILY TASK`
    texts: Mapping[str, str] = field(default_factory=dict)  # other typed texts, by name
    is_live: bool = False  # a preview is generated after each change
    reads_model: bool = False  # the diagnosis also reads the transformer
    changed: str = ""  # what sets the strengths: BLOCK, WEAKEN, PRESET, TYPED, or "" if nothing new does
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)  # as sent

    @classmethod
    def from_fields(cls, fields: Mapping[str, Sequence[str]]) -> "BlocksForm":
        """Read the form from the fields of a request."""
        texts = {name: "".join(fields[name][:1]) for name in (*LABELS, *TEXTS) if name in fields}
        for name in (*IMAGES, "preset"):
            if name in texts:
                texts[name] = "\n".join(map(complete_home, texts[name].split("\n")))
        return cls(
            file="".join(fields.get("file", ())[:1]),
            run="".join(fields.get("run", ())[:1]),
            source="".join(fields.get("source", ())[:1]),
            texts=texts,
            is_live="live" in fields,
            reads_model="dit" in fields,
            changed="".join(fields.get("changed", ())[:1]),
            fields=fields,
        )

    def text(self, name: str) -> str:
        """Return a typed text without surrounding spaces; "" without one."""
        return self.texts.get(name, "").strip()

    @property
    def strengths(self) -> str:
        """The strengths of the blocks as typed."""
        return self.text("text")

    @property
    def multiplier(self) -> str:
        """The strength of the whole LoRA."""
        return self.text("multiplier") or FULL_STRENGTH

    def with_text(self, text: str) -> "BlocksForm":
        """Return the form with other strengths."""
        return replace(self, texts={**self.texts, "text": text})

    def complete(self, recipe: ModelRecipe | None) -> "BlocksForm":
        """Return the form with the values of the recipe's command in fields that were never shown."""
        if recipe is None:
            return self
        values = {name: recipe.initial_texts.get(name, "") for name in LABELS}
        values["seed"] = values["seed"] or DEFAULT_SEED
        return replace(self, texts={**values, **self.texts})

    def set_block(self, blocks: Sequence[LoraBlock]) -> "BlocksForm":
        """Return the form with the strength in the field of the block that was changed.

        Raises:
            OptionError: If the field has no number, or if the typed strengths are not valid.
        """
        strengths = apply_text(self.strengths, blocks)
        for block in blocks:
            if block.name == self.text("block"):
                typed = "".join(self.fields.get(f"strength {block.name}", ()))
                strengths[block] = read_strength(typed, block.name)
        return self.with_text(format_strengths(strengths))

    def weaken(self, blocks: Sequence[LoraBlock]) -> "BlocksForm":
        """Return the form with half the strength of the block in the field `block`.

        Raises:
            OptionError: If the typed strengths are not valid.
        """
        strengths = apply_text(self.strengths, blocks)
        for block in blocks:
            if block.name == self.text("block"):
                strengths[block] /= 2
        return self.with_text(format_strengths(strengths))
