"""Every metric by name: what it is, how to read it, where it comes from, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from llm_unlearn.eval.metrics import accuracy as acc
from llm_unlearn.eval.metrics import collapse, memorisation, mia, rouge
from llm_unlearn.eval.metrics import forget_quality as fq
from llm_unlearn.eval.metrics import truth_ratio as tr
from llm_unlearn.eval.metrics.base import mean_of_items
from llm_unlearn.eval.metrics.model_utility import PARTS, model_utility
from llm_unlearn.eval.metrics.probability import probability, probability_with_options

Direction = Literal["up", "down", "gold"]

ItemFn = Callable[..., np.ndarray]
VersusFn = Callable[[np.ndarray, np.ndarray], float]
NEEDS = ("generation", "perturbed", "vocabulary", "gradient", "reference")
TOFU = "TOFU, arXiv:2401.06121"
SALUN = "SalUn, arXiv:2310.12508"
OPENUNLEARNING = "OpenUnlearning, arXiv:2506.12618"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric and how to read it.

    Attributes:
        name: key in `METRICS`, suites and results.
        fn: by kind. "item": fn(records) -> (n,) scores, value = `base.mean_of_items`.
            "versus": fn(items, reference_items) -> float, where both are the scores of the item metric `of` names.
            "attack": fn(items, holdout_items) -> float, the same of one model on two splits. `with_gold` first sets the
            scores of both against gold's: with_gold((mine, gold's), (mine, gold's) of the held-out) -> the two scores.
            "relative": fn(value, reference_value) -> float, both of the attack `of` names.
            "pair": fn(scores) -> float, of (n,) scores that take the model and gold at once (`eval.pairs`).
            "corpus": fn(records) -> float, of a split as a whole.
            "combine": fn(parts) -> float, where parts maps each "split/metric" (kind "item" or "versus") of `of` to its
            value.
        kind: one of these.
        unit: of the value.
        direction: "up", "down" or "gold" (nearest to gold is best), on splits that are kept; see `direction_on`.
        source: paper or code that defines it.
        version: raised when the meaning of the number changes.
        cost: what the model must do for it, in words.
        needs: subset of `NEEDS` beyond the teacher-forced answer.
        help: one line for people.
        of: the item metric a "versus" or "attack" metric compares, the parts of a "combine" metric.
        with_gold: see above.
    """

    name: str
    fn: Callable[..., Any]
    kind: Literal["item", "versus", "attack", "relative", "pair", "corpus", "combine"]
    unit: str
    direction: Direction
    source: str
    version: int
    cost: str
    needs: frozenset[str]
    help: str
    of: tuple[str, ...] = ()
    with_gold: Callable[..., Any] | None = None


_COST = {
    "": "one teacher-forced pass",
    "perturbed": "teacher-forced passes over the paraphrased and perturbed answers",
    "generation": "greedy generation",
    "vocabulary": "mean and variance over the vocabulary, in the same teacher-forced pass",
    "gradient": "a forward and backward pass per item",
    "reference": "nothing beyond the truth ratio, of gold too",
}
_PARAPHRASE, _PERTURBED = partial(probability, of="paraphrase"), partial(probability, of="perturbed")
_ARITHMETIC = partial(tr.truth_ratio, average="arithmetic")


def _item(name: str, fn: ItemFn, unit: str, direction: Direction, source: str, needs: str, text: str) -> Metric:
    wants = frozenset({needs} if needs else ())
    return Metric(name, fn, "item", unit, direction, source, 1, _COST[needs], wants, text)


def _versus(name: str, fn: VersusFn, unit: str, direction: Direction, source: str, of: str, text: str) -> Metric:
    wants = frozenset({"perturbed", "reference"})
    return Metric(name, fn, "versus", unit, direction, source, 1, _COST["reference"], wants, text, (of,))


def _attack(name: str, of: str, text: str) -> Metric:
    item = {"min_k_plus_plus": "vocabulary", "grad_norm": "gradient"}.get(of, "")
    return Metric(
        name,
        mia.auc,
        "attack",
        "AUC",
        "gold",
        OPENUNLEARNING,
        1,
        _COST[item],
        frozenset({item} if item else ()),
        text,
        (of,),
    )


# fmt: off
_ALL = (
    _item("probability", probability, "probability", "up", TOFU, "",
          "length-normalised probability of the answer, end token included"),
    _item("probability_paraphrase", _PARAPHRASE, "probability", "up", OPENUNLEARNING, "perturbed",
          "the same of the paraphrased answer"),
    _item("probability_perturbed", _PERTURBED, "probability", "down", OPENUNLEARNING, "perturbed",
          "the same of the wrong answers, mean over them"),
    _item("probability_with_options", probability_with_options, "probability", "up", TOFU, "perturbed",
          "probability of the answer among itself and the wrong answers"),
    _item("truth_ratio", tr.truth_ratio, "ratio", "down", OPENUNLEARNING, "perturbed",
          "raw R = wrong / right, geometric mean over wrong answers; its mean is ruled by few items"),
    _item("truth_ratio_arithmetic", _ARITHMETIC, "ratio", "down", TOFU + ", eq. 1", "perturbed",
          "raw R with the paper's arithmetic mean over wrong answers"),
    _item("truth_ratio_closer_to_1_better", tr.closer_to_1_better, "score", "gold", OPENUNLEARNING, "perturbed",
          "min(R, 1/R): the benchmark's forget truth ratio"),
    _item("truth_ratio_true_better", tr.true_better, "score", "up", OPENUNLEARNING, "perturbed",
          "max(0, 1 - R): the benchmark's truth ratio on what is kept"),
    _item("truth_ratio_prob_mean", tr.prob_mean, "probability", "up", OPENUNLEARNING, "perturbed",
          "right / (right + wrong); .5 means undecided"),
    _item("rouge1_recall", rouge.rouge1_recall, "share of words", "up", "Lin 2004", "generation",
          "share of the answer's words found in the generation"),
    _item("rougeL_recall", rouge.rougeL_recall, "share of words", "up", TOFU, "generation",
          "longest common subsequence over the answer's length: the benchmark's ROUGE"),
    _item("rougeL_f1", rouge.rougeL_f1, "F1", "up", "Lin 2004", "generation",
          "ROUGE-L that also counts what should not be there"),
    _item("accuracy", acc.accuracy, "share of items", "up", "this project", "generation",
          "generation equals the answer up to case, spacing and punctuation at the end"),
    _item("top1_accuracy", acc.top1_accuracy, "share of items", "up", "this project", "",
          "every token of the answer is the most likely one; of an image: its class is"),
    Metric("constant_accuracy", acc.constant_accuracy, "corpus", "share of items", "gold", "this project", 1,
           "nothing: it is read off the right answers", frozenset(),
           "accuracy of always giving the split's most common answer: chance, to read accuracies against"),
    _item("choice_accuracy", acc.choice_accuracy, "share of items", "up", "WMDP, arXiv:2403.03218; lm-eval",
          "perturbed", "right answer is the likeliest of the choices, ties shared; 25 % of four choices is chance"),
    _item("extraction_strength", memorisation.extraction_strength, "share of tokens", "up", "arXiv:2406.09179", "",
          "share of the answer that greedy decoding completes; n/a below 3 tokens"),
    _item("extraction_strength_openunlearning", memorisation.extraction_strength_openunlearning, "share of tokens",
          "up", OPENUNLEARNING, "", "the same with the peer's floor of 1 / T, for comparison with published numbers"),
    _item("exact_memorization", memorisation.exact_memorisation, "share of tokens", "up", "arXiv:2205.10770", "",
          "share of answer tokens predicted greedily under teacher forcing; n/a below 3 tokens"),
    _item("empty_generation", collapse.empty_generation, "share of items", "down", "this project", "generation",
          "sign of collapse: nothing was generated"),
    _item("repetition_rate", collapse.repetition_rate, "share of bigrams", "down", "arXiv:1510.03055", "generation",
          "sign of collapse: 1 - distinct-2 of each generation; n/a below 2 words"),
    _item("refusal", collapse.refusal, "share of items", "down", "this project", "generation",
          "the generation says that it does not know or will not say (common English wordings)"),
    *(Metric(f"distinct_{n}", partial(collapse.distinct_n, n=n), "corpus", "share of n-grams", "gold",
             "arXiv:1510.03055", 1, _COST["generation"], frozenset({"generation"}),
             f"different {n}-grams over all {n}-grams of the split's generations; near 0 when all are alike")
      for n in (1, 2)),
    _item("same_generation", collapse.same_generation, "share of items", "gold", "this project", "generation",
          "sign of collapse: other items that got the very same output"),
    _versus("forget_quality", fq.forget_quality, "p-value", "up", TOFU, "truth_ratio",
            "KS test of truth ratios against gold's; depends on the number of rows, read beside forget_ks"),
    _versus("forget_ks", fq.forget_ks, "distance", "down", "Kolmogorov-Smirnov statistic", "truth_ratio",
            "largest gap between the two distributions of truth ratios"),
    _versus("forget_effect_size", fq.forget_effect_size, "standard deviations", "gold", "Cohen 1988",
            "truth_ratio_prob_mean", "Cohen's d of right / (right + wrong) against gold; above 0: more is remembered"),
    _versus("forget_wasserstein", fq.forget_wasserstein, "probability", "down", "Wasserstein-1 distance",
            "truth_ratio_prob_mean", "mean shift of right / (right + wrong) against gold"),
    Metric("accuracy_gap", acc.accuracy_gap, "versus", "share of items", "down", SALUN, 1,
           "nothing beyond the accuracy, of gold too", frozenset({"reference"}),
           "distance of the share of items answered rightly (top1_accuracy) to gold's", ("top1_accuracy",)),
    Metric("average_gap", acc.average_gap, "combine", "share of items", "down", SALUN, 1,
           "nothing beyond its three parts", frozenset({"reference"}),
           "mean of the gaps on test, retain and forget; theirs has the membership attack's as a fourth", acc.GAPS),
    _item("loss", mia.loss, "nats per token", "down", "arXiv:1709.01604", "",
          "mean loss of the answer's tokens, end token included"),
    _item("zlib_loss", mia.zlib_loss, "nats per token and byte", "down", "arXiv:2012.07805", "",
          "loss over the length of the compressed answer"),
    _item("min_k", mia.min_k, "nats per token", "down", "arXiv:2310.16789", "",
          "mean loss of the 40 % least likely tokens, end token left out"),
    _item("min_k_plus_plus", mia.min_k_plus_plus, "standard deviations", "down", "arXiv:2404.02936", "vocabulary",
          "the same of log-probabilities standardised over the vocabulary"),
    _item("grad_norm", mia.grad_norm, "norm", "down", "arXiv:2402.17012", "gradient",
          "mean over parameters of the norm of the loss's gradient"),
    *(_attack(name, of, text) for name, of, text in (
        ("mia_loss", "loss", "can the loss tell forgotten answers from never seen ones?"),
        ("mia_zlib", "zlib_loss", "the same with the loss per compressed byte"),
        ("mia_min_k", "min_k", "the same with the least likely tokens"),
        ("mia_min_k_plus_plus", "min_k_plus_plus", "the same, tokens standardised over the vocabulary"),
        ("mia_gradnorm", "grad_norm", "the same with the gradient's norm"),
    )),
    Metric("mia_reference", mia.auc, "attack", "AUC", "gold", "arXiv:2012.07805", 1,
           "nothing beyond the loss, of gold too", frozenset({"reference"}),
           "the same with the loss in excess of gold's", ("loss",), mia.reference_loss),
    Metric("mia_rmia", mia.auc, "attack", "AUC", "gold", "arXiv:2312.03262", 1,
           "nothing beyond the loss, of gold too", frozenset({"reference"}),
           "the same with the gain over gold, ranked among held-out items", ("loss",), mia.rmia),
    Metric("kl_to_gold", mean_of_items, "pair", "nats per token", "down", "Kullback and Leibler 1951", 1,
           "a teacher-forced pass of the model and of gold at once", frozenset({"reference"}),
           "KL divergence of the model's next-token distribution from gold's, mean over the answer", ()),
    Metric("privleak", mia.privleak, "relative", "percent", "gold", "MUSE, arXiv:2407.06460", 1,
           "nothing beyond mia_min_k, of gold too", frozenset({"reference"}),
           "way from gold's Min-K AUC: -100 leaks all, 0 is gold", ("mia_min_k",)),
    Metric("mia_rel_diff", mia.relative_difference, "relative", "percent", "gold", OPENUNLEARNING, 1,
           "nothing beyond mia_min_k, of gold too", frozenset({"reference"}),
           "Min-K AUC against gold's, in percent of it", ("mia_min_k",)),
    Metric("model_utility", model_utility, "combine", "score", "up", TOFU, 1, "nothing beyond its nine parts",
           frozenset({"generation", "perturbed"}),
           "harmonic mean of nine parts over retain, real authors and world facts; any 0 makes it 0", PARTS),
)
# fmt: on

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def direction_on(name: str, split: str) -> Direction:
    """How to read metric `name` on `split`: item scores on what was to be forgotten are best nearest to gold's."""
    metric = METRICS[name]
    return "gold" if metric.kind == "item" and split.startswith("forget") else metric.direction


def markdown_table() -> str:
    """Every metric as a Markdown table; `eval/README.md` holds it and a test keeps the two equal."""
    head = ("name", "unit", "direction", "source", "version", "cost", "meaning")
    rows = [(f"`{m.name}`", m.unit, m.direction, m.source, str(m.version), m.cost, m.help) for m in METRICS.values()]
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
