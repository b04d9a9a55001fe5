"""A tiny SentencePiece model as Gemma's: byte-pair merges, bytes for what is unknown, no added blank."""

import io

import sentencepiece


def train_pieces(tokens: int) -> bytes:
    """The bytes of a tokenizer.model with so many tokens and 256 bytes."""
    made = io.BytesIO()
    texts = ["a red cat sits on a chair", "two dogs run in the snow at night", "a green dot falls down"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 8),
        model_writer=made,
        model_type="bpe",
        vocab_size=260 + tokens,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        minloglevel=2,
    )
    return made.getvalue()
