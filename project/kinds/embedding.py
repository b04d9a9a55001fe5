"""`new --train embedding`: train a word, its vectors in the text encoders (textual inversion)."""

from functools import partial

from project.kinds.contract import RunKind, drop_lora_options, find_reason, read_words

EMBEDDING = RunKind(
    name="embedding",
    title="an embedding",
    find_words=partial(read_words, "embedding"),
    why_not=partial(find_reason, "embedding", "an embedding"),
    change=drop_lora_options,
    ending="textual-inversion",
    record="InversionTraining",
    learns_word=True,
)
