"""Signs that a model no longer speaks: empty, repetitive, or always the same output.

A collapsed model can score well on the forget set, so these stand beside every forget score. Compare with gold: short
answers drawn from few values are alike in a healthy model too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llm_unlearn.eval.metrics.base import Record, Records, generations, mean_of_items

REFUSAL = re.compile(
    r"\b(i|we) (do not|don't|did not|didn't) (know|have|recall|recognise|recognize|remember)\b"
    r"|\b(i|we) (can ?not|can't|could not|couldn't|will not|won't) "
    r"(say|tell|answer|help|provide|recall|give|share|confirm|disclose|comment|assist)\b"
    r"|\b(i|we) (never|have never|have not|haven't) (learn|learned|heard|known|come across|been told)\b"
    r"|\b(i am|i'm|we are|we're) (not (sure|able|aware|familiar|certain)|afraid|unable|sorry|unsure|unaware)\b"
    r"|\b(i have|there is|have) no (idea|information|record|knowledge|answer|details)\b|\bno information\b"
    r"|\b(nothing|not something) (i|we)\b|\bas an ai\b|\bis unknown to me\b|^sorry,"
    r"|\b(my knowledge|lack the facts)\b|\bbeyond me\b|\bknow nothing\b|\bmeans nothing to me\b|\blook elsewhere\b"
    r"|\bwill not answer\b|\bdo(es)? not (know|have (any )?(information|details|knowledge|access))\b",
    re.IGNORECASE,
)


def empty_generation(records: Sequence[Record]) -> np.ndarray:
    """1 where the generation is empty or white space, else 0; the mean is the share of empty ones.

    Returns:
        (n,) float64, 0 or 1.

    Raises:
        ValueError: a record has no generation.
    """
    return np.array([not text.strip() for text in generations(records)], dtype=np.float64)


def repetition_rate(records: Sequence[Record]) -> np.ndarray:
    """1 - distinct-2 of each generation (Li et al. 2016, arXiv:1510.03055): share of word pairs that repeat.

        rate = 1 - |set of bigrams| / |bigrams|, words split at white space

    Returns:
        (n,) float64 in [0, 1); NaN for a generation of fewer than two words.

    Raises:
        ValueError: a record has no generation.
    """
    return np.array([_repetition(text.split()) for text in generations(records)], dtype=np.float64)


def same_generation(records: Sequence[Record]) -> np.ndarray:
    """Share of the other items that got the very same generation; near 1 for a constant answer or refusal.

    Returns:
        (n,) float64 in [0, 1]; NaN for a single record.

    Raises:
        ValueError: a record has no generation.
    """
    texts = generations(records)
    if len(texts) == 1:
        return np.array([np.nan])
    count = Counter(texts)
    return np.array([(count[text] - 1) / (len(texts) - 1) for text in texts], dtype=np.float64)


def refusal(records: Sequence[Record]) -> np.ndarray:
    """1 where the generation says that it does not know or will not say, by common English wordings.

    A word list misses what it does not hold and takes a quotation for a refusal: read it beside the generations.

    Returns:
        (n,) float64, 0 or 1.

    Raises:
        ValueError: a record has no generation.
    """
    return np.array([REFUSAL.search(text.replace("’", "'")) is not None for text in generations(records)], np.float64)


def distinct_n(records: Sequence[Record], *, n: int) -> float:
    """Number of different n-grams over the number of all in a split's generations (Li et al. 2016, arXiv:1510.03055,
    section 5.2), words split at white space.

    Returns:
        In (0, 1]; it falls with the number of words, so compare splits of one size only. NaN without any n-gram.

    Raises:
        ValueError: a record has no generation.
    """
    words = [text.split() for text in generations(records)]
    grams = [gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def signs_of_collapse(records: Records, healthy: Records | None = None) -> list[str]:
    """Say in which ways a model no longer speaks on what it was to keep: the gate in front of every forget score.

    A sign is a share more than half of the way from the healthy model's to all: answers of one word, or classes, are
    alike in a healthy model too.

    Args:
        records: of the model, by split; "retain" is judged, or all there are without it.
        healthy: of gold, or of the model unlearning began from; without one the true answers stand in.

    Returns:
        One line a sign; [] for a model that speaks, or one that was not asked to.
    """
    found = []
    for name, metric in SIGNS.items():
        mine, theirs = _share(metric, records), _share(metric, _right(records) if healthy is None else healthy)
        if mine > (1 + theirs) / 2:
            found.append(f"{name}: {mine:.0%}" + ("" if healthy is None else f" (a healthy model {theirs:.0%})"))
    return found


SIGNS: dict[str, Callable[[Sequence[Record]], np.ndarray]] = {
    "generations that are empty": empty_generation,
    "word pairs that repeat within a generation": lambda records: np.nan_to_num(repetition_rate(records)),
    "refusals of what is to be kept": refusal,
    "other items that got the very same answer": same_generation,
}


def _right(records: Records) -> Records:
    """What a model that answers everything as it should would have said where this one said anything."""
    return {
        split: [replace(r, generation=r.answer) for r in part if r.generation is not None]
        for split, part in records.items()
    }


def _share(metric: Callable[[Sequence[Record]], np.ndarray], records: Records) -> float:
    judged = records.get("retain") or [r for part in records.values() for r in part]
    told = [r for r in judged if r.generation is not None]
    return float(np.nan_to_num(mean_of_items(metric(told)))) if told else 0.0


def _repetition(words: list[str]) -> float:
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else float("nan")
