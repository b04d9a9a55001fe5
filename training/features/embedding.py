"""Learn the vectors of a new word together with a LoRA (pivotal tuning), or alone: --train_embedding.

The text encoders get embedding rows for the word, which `embedding_rows.py` creates and trains. The rows are
saved in the LoRA's file under the names of `protocols/bundled_embeddings.py`. With --embedding_only, they
are all that the run trains and saves.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from modules.console import format_count
from modules.errors import OptionError
from modules.options import CHANGEABLE, FREE, HABIT, IDENTITY, Options, is_set, option, option_name
from protocols.new_tokens import MAX_VECTORS, WordOptionNames, WordToLearn, find_error
from training.features.contract import AT_NETWORK, LIVE_TEXTS, Feature, FeatureOptions, given_values
from training.features.hooks import RunFeatures
from training.learning_options import LARGEST_RATE

if TYPE_CHECKING:
    from protocols.family import Described, Family
    from protocols.family_networks import CustomNetwork

logger = logging.getLogger(__name__)

# LoRA options that are allowed with --embedding_only: no LoRA is added to text encoders anyway
OPTIONS_ALLOWED_ALONE = {"network_train_unet_only"}
TEXTUAL_INVERSION = "textual inversion"  # network module in the metadata of files without a LoRA
FLAGS = WordOptionNames(
    word="--train_embedding",
    count="--embedding_vectors",
    init_word="--embedding_init_word",
    weights="--embedding_weights",
    rate="--embedding_lr",
)


class LearnsEmbeddings(Protocol):
    """A family whose text encoders can learn embeddings of a new word while a network is trained."""

    def with_word_in_texts(self, word: WordToLearn) -> "Family":
        """Return the family whose text encoders get embedding rows for the new word."""
        ...

    def word_network(self, word: WordToLearn) -> "CustomNetwork":
        """Return the network whose parameters are the embedding vectors of the word."""
        ...


class EmbeddingOptions(
    FeatureOptions,
    title="a new word next to the network",
    at=AT_NETWORK,
    why_not_full="its vectors are saved in a LoRA's file. Train a LoRA, or the word by itself",
):
    """Options of a new word whose embedding vectors are trained together with a LoRA."""

    train_embedding: str | None = option(
        "also train the vectors of this new word and save them in the LoRA",
        metavar="WORD",
        hint="such as mycat",
        known_as=("train_text_encoder_ti", "token_abstraction"),
        facts=IDENTITY,
    )
    embedding_vectors: int = option(
        "number of vectors of the word; each takes up one token of a caption",
        default=1,
        minimum=1,
        maximum=MAX_VECTORS,
        needs="train_embedding",
        hint="1 to 4 are usual",
        known_as=("num_new_tokens_per_abstraction", "num_vectors_per_token"),
        facts=IDENTITY,
    )
    embedding_init_word: str | None = option(
        "existing words to initialize the vectors from; default: random vectors",
        needs="train_embedding",
        known_as=("initializer_concept", "init_word"),
        facts=FREE,
        acts_if={
            "--embedding_weights has the first vectors": lambda options: options.embedding_weights is None
        },
    )
    embedding_weights: Path | None = option(
        "embedding file, or LoRA with the word, to continue from",
        place="there",
        needs="train_embedding",
        facts=FREE,
    )
    embedding_lr: float | None = option(
        "learning rate of the vectors; default: --learning_rate",
        needs="train_embedding",
        above=0,
        below=LARGEST_RATE,
        hint="1e-3 is usual",
        facts=CHANGEABLE,
    )
    embedding_until: float = option(
        "fraction of the steps in which the vectors are trained",
        default=1.0,
        above=0,
        maximum=1,
        needs="train_embedding",
        hint="0.5 is usual",
        known_as=("train_text_encoder_ti_frac",),
        facts=HABIT,
    )
    embedding_file: bool = option(
        "also save the vectors as a separate file: OUTPUT_NAME_WORD.safetensors",
        needs="train_embedding",
        facts=FREE,
    )
    embedding_only: bool = option(
        "train the word alone, without a LoRA: OUTPUT_NAME.safetensors contains its vectors",
        needs="train_embedding",
        excludes=("embedding_lr", "embedding_until", "embedding_file"),
        hint="the vectors are all that is trained and saved, with --learning_rate",
        facts=IDENTITY,
    )

    def word(self, lora: Path | None = None) -> WordToLearn:
        """Return the word to learn; `train_embedding` must be set.

        Args:
            lora: LoRA file that training continues from.
        """
        assert self.train_embedding is not None
        return WordToLearn(
            self.train_embedding,
            self.embedding_vectors,
            FLAGS,
            init_word=self.embedding_init_word,
            weights=self.embedding_weights,
            lora=lora,
            rate=self.embedding_lr,
            train_fraction=self.embedding_until,
        )


def _with_word(word: WordToLearn, family: "Family") -> "Family":
    """Return the family with embedding rows for the word; raise OptionError if the script trains no LoRA."""
    from protocols.family_networks import get_custom_network  # torch: only with a word

    made = get_custom_network(family)
    if made is not None:
        raise OptionError(
            f"--train_embedding learns a word next to a LoRA, and this script trains {made.label}. Omit it"
        )
    return cast(LearnsEmbeddings, family).with_word_in_texts(word)


def _check(word: WordToLearn, family: "Family", counts: Sequence[int]) -> None:
    """Raise UserError if a file with initial vectors for the word does not match the text encoders."""
    cast(LearnsEmbeddings, family).word_network(word).check()


def _start(word: WordToLearn, has_file: bool, run: RunFeatures) -> None:
    """Add the embedding vectors of the word to the trained parameters of the run."""
    from training.features.embedding_rows import make_word_vectors  # torch: only with a word

    network = cast(LearnsEmbeddings, run.family).word_network(word)
    if has_file:
        run.embedding_words.append(word.text)
    run.caption_checks.append(network.check_captions)
    run.info.for_loading |= network.values
    run.on.auxiliary_learners.append(partial(make_word_vectors, word, network, has_file))


def _describe(options: EmbeddingOptions) -> str:
    share = options.embedding_until
    length = "" if share == 1 else f", in the first {share:.0%} of the steps"
    return f"{options.train_embedding}, {format_count(options.embedding_vectors, 'vector')}{length}"


def _word_as_network(word: WordToLearn, family: "Described") -> "CustomNetwork":
    """Return the word's embedding as the trained network, for a run that trains it instead of a LoRA."""
    network = cast(LearnsEmbeddings, family).word_network(word)
    return replace(
        network,
        generate=_generation_command,
        start_option="embedding_weights",
        values={**network.values, "ss_network_module": TEXTUAL_INVERSION},
    )


def _generation_command(file: Path, sample: Mapping[str, Any], base: Sequence[str]) -> Sequence[str]:
    """Return a command that generates a sample's prompt with a saved embedding file."""
    return [*base, "--textual_inversion_embeddings", str(file)]


def _list_explicit_options(record: Options | None) -> list[str]:
    """Return the names of the options set in a record, excluding nested records."""
    if record is None:
        return []
    own = [field for field in fields(record) if not isinstance(getattr(record, field.name), Options)]
    return [option_name(field) for field in own if is_set(record, field)]


def _join(run: RunFeatures, options: EmbeddingOptions) -> None:
    """Register --train_embedding: a run learns the vectors of a new word, with a LoRA or alone."""
    assert options.train_embedding is not None  # the feature is on
    error = find_error(options.train_embedding)
    if error:
        raise OptionError(f"--train_embedding {options.train_embedding!r} {error}")
    caches_texts = run.options.caching is not None and run.options.caching.caches_texts
    if caches_texts:
        raise OptionError(
            "--cache_text_encoder_outputs: with --train_embedding the outputs of the text encoders change as "
            "the vectors of the word are trained, so they cannot be cached. Omit one of the two"
        )
    run.info.at_start["new word"] = _describe(options)
    run.needs.add(LIVE_TEXTS)
    run.info.in_files |= given_values(options)
    # a LoRA that is continued may contain the word's vectors, from which it then starts
    word = options.word(None if run.options.network is None else run.options.network.network_weights)
    run.on.family.append(partial(_with_word, word))
    if options.embedding_only:
        # Register --embedding_only: the vectors of a word are trained in place of a LoRA
        # Options of a LoRA are rejected, except those in OPTIONS_ALLOWED_ALONE, which also apply to the word.
        name = run.options.saving.output_name
        explicit_options = [
            *_list_explicit_options(run.options.network),
            *_list_explicit_options(run.options.lora_parts),
        ]
        lora_options = [option for option in explicit_options if option not in OPTIONS_ALLOWED_ALONE]
        if run.options.by_expert.lora_per_expert:
            lora_options.append("lora_per_expert")
        if lora_options:
            raise OptionError(
                "--embedding_only trains no LoRA, but these are LoRA options: "
                f"--{', --'.join(lora_options)}. Omit one or the other"
            )
        if name not in (None, options.train_embedding):
            logger.warning(
                "--output_name %s is not the word %s: programs take the name of a file as its word. Rename "
                "the file to %s.safetensors before it is used.",
                name,
                options.train_embedding,
                options.train_embedding,
            )
        run.lora_replacement = partial(_word_as_network, options.word())
        return
    run.on.check.append(partial(_check, word))
    run.on.start.append(partial(_start, word, options.embedding_file))


EMBEDDING = Feature(
    name="embedding",
    options=EmbeddingOptions,
    is_on=lambda options: options.train_embedding is not None,
    join=_join,
)
