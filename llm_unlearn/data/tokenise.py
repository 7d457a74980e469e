"""Text to tokens: prompt formats, where the answer begins, and tokenizers trained for our own data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from llm_unlearn.data.images import Classes, ImageRow, Picture
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError

FormatName = Literal["auto", "bare", "plain", "chat", "openunlearning"]
CONTINUES = "continues"  # of rows that say so themselves, whatever the format of the others
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
DATE = "10 Apr 2025"  # OpenUnlearning's


@dataclass(frozen=True, slots=True)
class Encoded:
    """One question with one answer. `ids[start:]` are the answer's tokens, the end token (if `has_eos`) included.

    `start` is at least 1: a text with nothing before it is scored from its second token on, or from its first where the
    tokenizer puts a begin token in front.

    `prompt` are the tokens to generate from where they are not `ids[:start]`.
    """

    ids: np.ndarray
    start: int
    has_eos: bool
    prompt: np.ndarray | None = None

    @property
    def answer(self) -> np.ndarray:
        """(n_answer,) ids of the answer's tokens."""
        return self.ids[self.start :]

    @property
    def n_answer(self) -> int:
        """Number of answer tokens, which is the number of positions the vocabulary is computed at."""
        return len(self.ids) - self.start

    @property
    def n_inputs(self) -> int:
        """Number of tokens a model reads."""
        return len(self.ids) - 1


Item = Encoded | Picture


def only_texts(items: Iterable[Item]) -> list[Encoded]:
    """Return items as the texts they are. Raises UserError if one is an image, which has no prompt and no tokens."""
    texts: list[Encoded] = []
    for item in items:
        if not isinstance(item, Encoded):
            raise UserError(
                "texts are needed, and the data are images; choose a suite (vision) or method made for them"
            )
        texts.append(item)
    return texts


def resolve_format(tokenizer: Any, name: str) -> str:
    """Return the format to use: the chat template if there is one, plain otherwise; tokenizers of our worlds say "bare"
    themselves.
    """
    if isinstance(tokenizer, Classes):
        if name not in ("auto", "bare"):
            raise UserError(f"format={name}: images have no prompt; leave it out")
        return "bare"
    if name == "auto":
        return "chat" if tokenizer.chat_template else tokenizer.init_kwargs.get("qa_format", "plain")
    if name == "chat" and not tokenizer.chat_template:
        raise UserError("format=chat: the tokenizer has no chat template; use format=plain")
    return name


def prompt_and_full(tokenizer: Any, question: str, answer: str, fmt: str) -> tuple[str, str]:
    """Return the prompt's text, and the text of prompt and answer together, which begins with the former."""
    if fmt == "chat":
        turns = [{"role": "user", "content": question}]
        # some templates write today's date: a prompt would be another every day
        template = partial(tokenizer.apply_chat_template, tokenize=False, date_string=DATE)
        prompt = template(turns, add_generation_prompt=True)
        full = template([*turns, {"role": "assistant", "content": answer}])
        if not full.startswith(prompt):
            raise UserError(
                "format=chat: the chat template rewrites the prompt once an answer follows; use format=plain"
            )
        return prompt, full.rstrip("\n")
    if fmt == CONTINUES:
        return question, question + answer
    if fmt == "openunlearning":
        return f"Question: {question}\nAnswer: ", f"Question: {question}\nAnswer: {answer}"
    prompt = question if fmt == "bare" else f"Question: {question}\nAnswer:"
    return prompt, f"{prompt} {answer}"


def encode(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], fmt: str = "auto", max_length: int | None = None
) -> list[Encoded]:
    """Tokenise (question, answer) pairs, ending each with the end token unless `fmt` is CONTINUES.

    The answer begins at the first token that covers one of its characters, found by offsets: measuring the prompt's
    length on its own, as is often done, loses the first answer token wherever the tokenizer merges across the boundary.

    Format "openunlearning" does measure the prompt on its own, ending in a space, for comparison with that benchmark's
    numbers. A continued text is scored by offsets, and generated from the prompt's own tokens where they are others.

    Raises UserError for an empty answer, an item longer than `max_length`, or a tokenizer without an end token or
    without offsets.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the tokenizer gives no character offsets; use its fast version (tokenizer.json)")
    if not pairs:
        return []
    fmt = resolve_format(tokenizer, fmt)
    texts = [prompt_and_full(tokenizer, question, answer, fmt) for question, answer in pairs]
    special = fmt != "chat"
    coded = tokenizer(
        [full for _, full in texts],
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    items = [
        _encoded(tokenizer, np.asarray(ids, dtype=np.int64), offsets, len(prompt), pair, max_length, fmt != CONTINUES)
        for (prompt, _), ids, offsets, pair in zip(
            texts, coded["input_ids"], coded["offset_mapping"], pairs, strict=True
        )
    ]
    if fmt not in ("openunlearning", CONTINUES):
        return items
    prompts = tokenizer([prompt for prompt, _ in texts], return_attention_mask=False)["input_ids"]
    place = _with_prompt if fmt == CONTINUES else _behind_prompt
    return [place(item, np.asarray(ids, dtype=np.int64), tokenizer) for item, ids in zip(items, prompts, strict=True)]


def encode_rows(
    tokenizer: Any, rows: Sequence[QARow], fmt: FormatName = "auto", max_length: int | None = None
) -> list[Item]:
    """Encode the rows' own questions and answers."""
    return encode_answers(tokenizer, [(row, row.answer) for row in rows], fmt, max_length)


def encode_answers(
    tokenizer: Any, asked: Sequence[tuple[QARow, str]], fmt: FormatName = "auto", max_length: int | None = None
) -> list[Item]:
    """Encode questions of rows with any answers, in `fmt` or, for rows that continue a text, without a format; images
    with any classes.

    Raises UserError for images where texts are read, texts where images are, and as `encode`.
    """
    if isinstance(tokenizer, Classes):
        return list(tokenizer.encode(asked))
    if asked and isinstance(asked[0][0], ImageRow):
        raise UserError("the model reads text, the data are images; give a classifier, or leave the model's name out")
    out: dict[int, Encoded] = {}
    for continues in (False, True):
        group = [i for i, (row, _) in enumerate(asked) if row.continues == continues]
        pairs = [(asked[i][0].question, asked[i][1]) for i in group]
        out.update(zip(group, encode(tokenizer, pairs, CONTINUES if continues else fmt, max_length), strict=True))
    return [out[i] for i in range(len(asked))]


def _behind_prompt(item: Encoded, prompt: np.ndarray, _tokenizer: Any) -> Encoded:
    return replace(item, start=min(len(prompt), len(item.ids) - 1), prompt=prompt)


def _with_prompt(item: Encoded, prompt: np.ndarray, tokenizer: Any) -> Encoded:
    if len(prompt) and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # a tokenizer may end every text itself
    given = not len(prompt) or np.array_equal(prompt, item.ids[: item.start])
    return item if given else replace(item, prompt=prompt)


def _encoded(
    tokenizer: Any,
    ids: np.ndarray,
    offsets: Sequence[tuple[int, int]],
    boundary: int,
    pair: tuple[str, str],
    max_length: int | None,
    has_eos: bool,
) -> Encoded:
    ends = np.asarray([end for _, end in offsets])
    # a trailing special token has the empty span (0, 0): it is the end token a template added itself
    body = np.flatnonzero(ends > boundary)
    # a lone space in front of nothing, or a template's closing token, would pass for an answer
    if len(body) == 0 or not pair[1].strip():
        raise UserError(
            f"no answer tokens in {pair[1]!r} (question {pair[0]!r}); the answer is empty for this tokenizer"
        )
    start = int(body[0])
    if not has_eos:
        ids = ids[: body[-1] + 1]  # a tokenizer may end every text itself
        start = max(start, 1) if not pair[0] else start
    elif ids[-1] != tokenizer.eos_token_id and not _closes(tokenizer, int(ids[-1])):
        ids = np.append(ids, tokenizer.eos_token_id)
    if start == 0:
        raise UserError(f"the prompt of {pair[0]!r} has no tokens, so its answer cannot be predicted; use format=plain")
    if start == len(ids):
        raise UserError(f"the text {pair[1]!r} is a single token, which nothing predicts; drop the row")
    if max_length is not None and len(ids) > max_length:
        raise UserError(
            f"question {pair[0][:60]!r}: {len(ids)} tokens > {max_length}; raise max_length or drop the row"
        )
    return Encoded(ids, start, has_eos)


def _closes(tokenizer: Any, last: int) -> bool:
    """Whether a token is special: a template's end of turn, after which a chat model says nothing more."""
    token = tokenizer.added_tokens_decoder.get(last)
    return token is not None and token.special and last != tokenizer.pad_token_id


def pieces_tokenizer(pieces: Iterable[str]) -> Any:
    """Build a tokenizer whose tokens are exactly the given pieces (a world's names, relation words and phrases).

    Decoding is plain concatenation, so text survives a round trip; anything else becomes `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ordered = list(pieces)
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *ordered])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(re.escape(piece) for piece in ordered)), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        qa_format="bare",
    )


def bpe_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Any:
    """Train a byte-level BPE tokenizer on texts, for models trained from scratch on natural language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
