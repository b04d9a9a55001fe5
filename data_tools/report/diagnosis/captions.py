"""Findings about captions: what nearly all of them say, and where text encoders cut them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from data_tools.report.diagnosis.contract import EMPTY_WORDS, GROUND, DatasetCaption, MeasuredDataset
from data_tools.report.diagnosis.finding import Finding
from modules.text_files import read_if_object

MIN_CAPTIONS = 8  # fewer captions say nothing about what all of them share
PHRASE_FRACTION = 0.9  # of the captions that contain a phrase
MAX_PHRASE_WORDS = 8
MIN_CONTENT_WORDS = 2  # of a phrase; a single one is often the class word, which belongs in every caption
CUT_FRACTION = 0.1  # of the captions that an encoder cuts
# a background with the words before it, such as `before a blue wall` or `simple background`
_BACKGROUND = re.compile(
    rf"(?:\b(?:in|on|at|before|behind|against|over|under|with|of|by)\b(?:\s+[\w-]+){{0,3}}?\s+"
    rf"|(?:[\w-]+\s+){{0,2}}){GROUND.pattern}",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+(?:['-]\w+)*")


def find_caption_findings(dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about phrases that nearly all captions share, and about captions that are cut."""
    for word in dataset.trigger_words or [""]:
        own = [caption for caption in dataset.learned_captions if caption.trigger_word == word]
        yield from _find_shared_phrases(own, word)
    yield from _find_cut_captions(dataset)


def _find_shared_phrases(captions: Sequence[DatasetCaption], trigger_word: str) -> Iterator[Finding]:
    """Yield a finding for each longest phrase in most of the captions that share a trigger word."""
    texts = [caption for caption in captions if read_if_object(caption.text) is None]
    if len(texts) < MIN_CAPTIONS:
        return
    captions_by_phrase: defaultdict[tuple[str, ...], set[int]] = defaultdict(set)
    for index, caption in enumerate(texts):
        for clause in _split_clauses(caption.text, trigger_word):
            for start in range(len(clause)):
                for end in range(start + 1, min(start + MAX_PHRASE_WORDS, len(clause)) + 1):
                    captions_by_phrase[clause[start:end]].add(index)
    frequent = {
        phrase: indices
        for phrase, indices in captions_by_phrase.items()
        if len(indices) >= PHRASE_FRACTION * len(texts) and _count_content(phrase) >= MIN_CONTENT_WORDS
    }
    reported: list[str] = []
    for phrase in sorted(frequent, key=lambda phrase: (-len(phrase), phrase)):
        text = " ".join(phrase)
        # parts of a reported phrase follow from it
        if any(text in longer for longer in reported):
            continue
        reported.append(text)
        indices = frequent[phrase]
        share = len(indices) / len(texts)
        lacking = [caption for index, caption in enumerate(texts) if index not in indices]
        others = f", not in {lacking[0].path.name}" if len(lacking) == 1 else ""
        learned = f"the word {trigger_word}" if trigger_word else "the LoRA alone"
        yield Finding(
            "caption-phrase",
            text,
            figure=share,
            limit=PHRASE_FRACTION,
            text=f'"{text}" stands in {share:.0%} of {len(texts)} captions{others}.',
            meaning=f"What the phrase describes is learned for the phrase, not for {learned}: without the "
            "phrase in the prompt it is weak.",
            remedy="Remove the phrase from the captions if it should always appear; keep it, and write it "
            "in prompts, if it should not.",
            files=[str(texts[index].path) for index in sorted(indices)],
        )


def _split_clauses(text: str, trigger_word: str) -> Iterator[tuple[str, ...]]:
    """Yield the lower-case words between punctuation marks, trigger words and backgrounds of a caption."""
    lower_text = _BACKGROUND.sub(",", text.lower())
    if trigger_word:
        lower_text = lower_text.replace(trigger_word.lower(), ",")
    for clause in re.split(r"[,.;:!?()\[\]\n]+", lower_text):
        words = tuple(_WORD.findall(clause))
        if words:
            yield words


def _count_content(phrase: Sequence[str]) -> int:
    return sum(word not in EMPTY_WORDS for word in phrase)


def _find_cut_captions(dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield a finding for each text encoder that cuts many captions, with the words where it cuts."""
    for encoder, count_tokens in dataset.counters.items():
        counts = [(caption, count_tokens(caption.text)) for caption in dataset.learned_captions]
        cut = [(caption, count) for caption, count in counts if count.is_cut]
        if not cut or len(cut) < CUT_FRACTION * len(counts):
            continue
        caption, count = cut[0]
        first_words = " ".join(count.cut_text.split()[:4])
        frequent = Counter(count.cut_text.split()[0] for _, count in cut if count.cut_text.split())
        most_frequent = (
            f" Most often it is cut before {frequent.most_common(1)[0][0]}." if len(cut) > 1 else ""
        )
        yield Finding(
            "captions-cut",
            encoder,
            figure=len(cut) / len(counts),
            limit=CUT_FRACTION,
            text=f"{encoder} cuts {len(cut)} of {len(counts)} captions after {count.limit} tokens, "
            f'{caption.path.name} before "{first_words}".{most_frequent}',
            meaning="The rest of these captions is never read.",
            remedy="Put what matters first, or shorten the captions.",
            files=[str(caption.path) for caption, _ in cut],
        )
