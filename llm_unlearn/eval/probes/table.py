"""Every probe by name: what it computes, from where, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_unlearn.data.batches import Item
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.eval.probes.bridge import bridge_ranks, learn_names, two_hops
from llm_unlearn.eval.probes.cka import MIN_ROWS, cka, cka_paper, matched_rows, shuffle_null
from llm_unlearn.eval.probes.complexity import DIRECTIONS, RADIUS, RELATIVE_RADIUS, local_complexity
from llm_unlearn.eval.probes.curvature import MAX_ITEMS, curvature
from llm_unlearn.eval.probes.draws import draw_groups
from llm_unlearn.eval.probes.gradients import gradient_alignment, item_gradients, pair_cosines
from llm_unlearn.eval.probes.modules import FIELDS, module_overlap
from llm_unlearn.eval.probes.passes import features, n_layers
from llm_unlearn.eval.probes.weights import effective_ranks, feature_rank, logit_scale, weight_norms
from llm_unlearn.seeding import derive, rng

PAIR_ITEMS = 64
MATCHED = 0.9  # least share of rows compared within their own strata that makes the null one
GROKKING = "arXiv:2512.03437, with a null of ours"


@dataclass(frozen=True)
class Settings:
    """How much is looked at.

    Attributes:
        items: most items of a set that a probe reads.
        seed: of every draw.
        draws: resamples of the gradient probes' null.
        layer: the one layer whose features are compared; None takes all.
        loss: mean loss that temperatures bring curvature to; None takes the model's own.
        radius: of local complexity, absolute: the paper's.
        relative_radius: of local complexity, in mean lengths of the inputs.
        directions: of local complexity.
        float64: run local complexity in double precision.
    """

    items: int = 256
    seed: int = 0
    draws: int = 20
    layer: int | None = None
    loss: float | None = None
    radius: float = RADIUS
    relative_radius: float = RELATIVE_RADIUS
    directions: int = DIRECTIONS
    float64: bool = False


@dataclass
class Subject:
    """A model with what it is looked at on.

    Attributes:
        model: AnswerModel or its counterpart for images.
        rows: set name -> rows: "forget" and "retain" (trained), and "held_out" where there is one.
        items: set name -> the rows' items.
        other: a second model, asked the same.
    """

    model: Any
    rows: Mapping[str, Sequence[QARow]]
    items: Mapping[str, Sequence[Item]]
    other: Any = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def few(self, name: str, n: int, seed: int) -> list[int]:
        """Return the numbers of at most n rows of a set, drawn once for a seed; of two n the smaller draw is within."""
        return sorted(int(i) for i in rng(seed, "probe", name).permutation(len(self.rows[name]))[:n])

    def some(self, name: str, settings: Settings) -> list[Item]:
        """Return the items of a set that a probe reads."""
        return [self.items[name][i] for i in self.few(name, settings.items, settings.seed)]

    def per_item(self, settings: Settings) -> tuple[Any, Any, list[QARow], int]:
        """Return `item_gradients` of at most 64 items, half of them to forget, their rows and how many are to forget.

        Computed once for two probes.
        """
        n = min(PAIR_ITEMS, settings.items)
        if (n, settings.seed) not in self._kept:
            numbers = {name: self.few(name, n // 2, settings.seed) for name in ("forget", "retain")}
            rows = [self.rows[name][i] for name, some in numbers.items() for i in some]
            items = [self.items[name][i] for name, some in numbers.items() for i in some]
            found = item_gradients(self.model, items, derive(settings.seed, "sketch"))
            self._kept[n, settings.seed] = (*found, rows, len(numbers["forget"]))
        return self._kept[n, settings.seed]


@dataclass(frozen=True)
class Line:
    """One number of a probe, None where it would mean nothing (the detail says why); `null` is the range (2.5 to
    97.5 %) it has where there is nothing to be found.
    """

    name: str
    value: float | None
    null: tuple[float, float] | None = None


@dataclass(frozen=True)
class Finding:
    """What a probe found: the numbers to be shown, and all of them."""

    lines: list[Line]
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe.

    Attributes:
        name: key in `PROBES` and in `probes.json`.
        fn: fn(subject, settings) -> Finding.
        formula: in ASCII.
        source: paper.
        cost: what the model does for it, in words.
        help: how to read it, in one line.
    """

    name: str
    fn: Callable[[Subject, Settings], Finding]
    formula: str
    source: str
    cost: str
    help: str


def choose(names: Sequence[str] | None) -> list[Probe]:
    """Return probes by name, all for None. Raises UserError for an unknown one."""
    for name in names or ():
        if name not in PROBES:
            raise UserError(f"unknown probe '{name}' in --which{suggest(name, PROBES)}")
    return [probe for name, probe in PROBES.items() if names is None or name in names]


def _alignment(subject: Subject, settings: Settings) -> Finding:
    rows, items = subject.rows, subject.items
    draws = draw_groups(rows["forget"], rows["retain"], settings.draws, settings.seed, settings.items)
    squares = subject.per_item(settings)[1]
    found = gradient_alignment(subject.model, items["forget"], items["retain"], draws, squares)
    lines = [Line("ce: cos(all forget, all retain)", found["cos_whole"])]
    if found["matched"] < MATCHED:
        found["no_excess"] = (
            f"{found['matched']:.0%} of the rows compared are of a class or wording that is kept too, "
            f"{MATCHED:.0%} are needed for a null"
        ).replace("%", " %")
    for variant, groups in found["variants"].items():
        whole = groups["all"]
        low, _, high = whole["null_quantiles"]
        lines += [
            Line(f"{variant}: cos(forget, retain)", whole["cos_FR"], (low, high)),
            Line(f"{variant}: excess over cos(retain, retain)", None if "no_excess" in found else whole["excess"]),
        ]
    whole = found["variants"]["ce"]["all"]
    lines += [
        Line("ce: cos pooled over draws", whole["cos_pooled"]),
        Line("ce: |g_F| / |g_R|", whole["norm_ratio"]),
        Line("ce: collateral g_F . g_R", whole["collateral"]),
    ]
    return Finding(lines, found)


def _pairs(subject: Subject, settings: Settings) -> Finding:
    gradients, _, rows, n_forget = subject.per_item(settings)
    found = pair_cosines(gradients, rows, n_forget)
    lines = [Line(f"{which}: mean cos", values["mean"]) for which, values in found.items()]
    lines += [Line("all: mean |cos|", found["all"]["mean_abs"])]
    return Finding(lines, {"items": len(rows), "by": found})


def _modules(subject: Subject, settings: Settings) -> Finding:
    n = min(PAIR_ITEMS, settings.items)
    numbers = {name: subject.few(name, n // 2, settings.seed) for name in ("forget", "retain")}
    rows = [subject.rows[name][i] for name, some in numbers.items() for i in some]
    items = [subject.items[name][i] for name, some in numbers.items() for i in some]
    found = module_overlap(subject.model, items, rows, len(numbers["forget"]), seed=settings.seed)
    low, _, high = found["null_overlap"]
    lines = [
        Line(f"{which}: {field}", values[field], (low, high) if field == "overlap" else None)
        for which, values in found["by"].items()
        for field in FIELDS
        if values[field] == values[field]
    ]
    return Finding(lines, found)


def _bridge(subject: Subject, settings: Settings) -> Finding:
    rows = [row for some in subject.rows.values() for row in some]
    items = [item for some in subject.items.values() for item in some]
    if not any(row.hop == 2 for row in rows):
        raise UserError("bridge: wants the two-hop questions of a world, and this data has none; leave it out")
    # the last layer's output is what is said next, which is no name
    layers = [layer for layer in _layers(subject, settings) if layer < n_layers(subject.model) - 1]
    if not layers:
        raise UserError("bridge: reads layers before the last, and there is none to read; give an earlier --layer")
    names = learn_names(rows, items)
    lines, detail = [], {}
    for name in subject.rows:
        hops = two_hops(subject.rows[name], subject.items[name], names)
        hops = [hops[i] for i in sorted(rng(settings.seed, "bridge", name).permutation(len(hops))[: settings.items])]
        for layer in layers:
            if hops:
                found = detail[f"{name}/{layer}"] = bridge_ranks(subject.model, hops, names, layer, seed=settings.seed)
                low, _, high = found["null_quantiles"]
                lines.append(Line(f"{name}: layer {layer}: reciprocal rank of the bridge", found["mrr"], (low, high)))
    if not lines:
        raise UserError("bridge: no two-hop question leads through an author who is asked about; leave it out")
    return Finding(lines, detail)


def _complexity(subject: Subject, settings: Settings) -> Finding:
    lines, detail = [], {}
    for name in subject.rows:
        for kind, radius in (("absolute", settings.radius), ("relative", settings.relative_radius)):
            found = local_complexity(
                subject.model,
                subject.some(name, settings),
                radius=radius,
                relative=kind == "relative",
                n_directions=settings.directions,
                seed=derive(settings.seed, "directions"),
                float64=settings.float64,
            )
            detail[f"{name}/{kind}"] = found
            lines.append(Line(f"{name}: {kind} r = {radius:g}", found["lc"]))
    return Finding(lines, detail)


def _cka(subject: Subject, settings: Settings) -> Finding:
    f, r = (subject.few(name, settings.items, settings.seed) for name in ("forget", "retain"))
    rows = subject.rows
    mine, partners = matched_rows([rows["forget"][i] for i in f], rows["retain"], settings.seed)
    sets = {"forget": f, "retain": r}
    lines, detail = [], {"pairs": len(mine), "layers": {}}
    if len(mine) < MIN_ROWS and subject.other is None:
        raise UserError(
            f"cka: {len(mine)} forget rows have a retain row of their class or wording, {MIN_ROWS} are needed; give "
            "--against another model, or leave it out with --which"
        )
    for layer in _layers(subject, settings):
        found: dict[str, Any] = {}
        seen = {name: features(subject.model, _at(subject, name, n), layer) for name, n in sets.items()}
        if len(mine) >= MIN_ROWS:
            pair = seen["forget"][mine], features(subject.model, _at(subject, "retain", partners), layer)
            found["forget~retain"] = cka(*pair), shuffle_null(*pair, seed=settings.seed)
        if subject.other is not None:
            for name, numbers in sets.items():
                pair = seen[name], features(subject.other, _at(subject, name, numbers), layer)
                found[f"{name}, against"] = cka(*pair), shuffle_null(*pair, seed=settings.seed)
        detail["layers"][layer] = {key: {"cka": v, "null_quantiles": null} for key, (v, null) in found.items()}
        lines += [Line(f"layer {layer}: {key}", v, (null[0], null[2])) for key, (v, null) in found.items()]
    return Finding(lines, detail)


def _cka_paper(subject: Subject, settings: Settings) -> Finding:
    lines, detail = [], {}
    for layer in _layers(subject, settings):
        pair = (features(subject.model, subject.some(name, settings), layer) for name in ("forget", "retain"))
        found = detail[layer] = cka_paper(*pair, seed=settings.seed)
        low, _, high = found["null_quantiles"]
        lines.append(Line(f"layer {layer}: forget, retain", found["value"], (low, high)))
    return Finding(lines, {"layers": detail})


def _hessian(subject: Subject, settings: Settings) -> Finding:
    lines, detail = [], {}
    for name in ("forget", "retain"):
        some = subject.some(name, settings)[:MAX_ITEMS]
        found = detail[name] = curvature(subject.model, some, loss=settings.loss, seed=settings.seed)
        lines += [
            Line(f"{name}: top eigenvalue", found["top"]["value"]),
            Line(f"{name}: top eigenvalue x |weights|^2", found["top_scaled"]),
            Line(f"{name}: trace", found["trace"]["value"]),
            Line(f"{name}: trace, standard error", found["trace"]["se"]),
            Line(f"{name}: at loss", found["loss"]),
        ]
    return Finding(lines, detail)


def _norms(subject: Subject, _settings: Settings) -> Finding:
    found = weight_norms(subject.model)
    return Finding([Line(f"{group}: norm", values["norm"]) for group, values in found.items()], {"groups": found})


def _logits(subject: Subject, settings: Settings) -> Finding:
    found = {name: logit_scale(subject.model, subject.some(name, settings)) for name in subject.rows}
    keys = ("std", "margin", "loss")
    return Finding([Line(f"{name}: {key}", values[key]) for name, values in found.items() for key in keys], found)


def _ranks(subject: Subject, settings: Settings) -> Finding:
    weights = effective_ranks(subject.model)
    inside: dict[str, float] = {}
    for layer in _layers(subject, settings):
        for name in ("forget", "retain"):
            seen = features(subject.model, subject.some(name, settings), layer)
            inside[f"layer {layer}: features of {name}"] = feature_rank(seen)
    lines = [Line(name, value) for name, value in {**weights, **inside}.items()]
    return Finding(lines, {"weights": weights, "features": inside})


def _layers(subject: Subject, settings: Settings) -> list[int]:
    if settings.layer is not None:
        return [settings.layer]
    return list(range(min(n_layers(model) for model in (subject.model, subject.other) if model is not None)))


def _at(subject: Subject, name: str, numbers: Sequence[int]) -> list[Item]:
    return [subject.items[name][i] for i in numbers]


# fmt: off
_ALL = (
    Probe("alignment", _alignment,
          "cos(mean_F g, mean_R1 g) - cos(mean_R1 g, mean_R2 g), |R1| = |R2| = |F|, stratified; g of cross-entropy, of "
          "the margin, of logits / std, and / sqrt(v)", GROKKING,
          "both sets whole; 41 groups of |F| items forward, and backward for each of 3 losses; 64 items one by one; "
          "memory of 16 gradients",
          "above the null: forgetting moves what is kept more than keeping other rows does"),
    Probe("pairs", _pairs, "mean and mean |.| of cos(g_i, g_j), by author, relation or class, and FF / FR / RR",
          "stiffness, arXiv:1901.09491, sec. 2", "forward and backward of 64 items one by one",
          "near 0 between rows that are not akin: gradients are modular"),
    Probe("modules", _modules,
          "p = mean |M_i n M_k| / |M_i|, M the top 10 % of neurons by |act x grad|; rho = mean cos(g_i, g_k) in "
          "M_i n M_k; p x rho against mean cos(g_i, g_k)",
          "arXiv:2512.03437, app. D, with p and rho measured", "forward and backward of 64 items one by one",
          "overlap above its null: modules are shared; predicted near measured: modules explain alignment"),
    Probe("bridge", _bridge,
          "mean 1 / rank of the bridge's name in head(norm(h)), h a layer's output at r1 of X's r1's r2",
          "arXiv:2405.15071, sec. 3.3", "a forward pass of every two-hop question and layer but the last",
          "worlds only; above its null: two hops are answered by way of the author in the middle"),
    Probe("local_complexity", _complexity,
          "mean_x sum_layers #{neurons with sign(z) at a vertex x +- r u_p unlike at vertex 0}, p to P = 25",
          "arXiv:2402.15555", "50 forward passes of every set, at r absolute and relative",
          "fewer: hyperplanes have left the data; compare at relative r"),
    Probe("cka", _cka, "HSIC1(K, L) / sqrt(HSIC1(K, K) HSIC1(L, L)), K = X X'", "arXiv:2010.15327, eqs. 2-4",
          "a forward pass a layer", "rows paired: forget with retain of one wording, or one row under two models"),
    Probe("cka_paper", _cka_paper, "|Yc'Xc|_F^2 / (|Xc'Xc|_F |Yc'Yc|_F) of unpaired rows",
          "arXiv:2512.03437; arXiv:1905.00414, sec. 3",
          "a forward pass a layer", "says something only outside its null"),
    Probe("hessian", _hessian, "largest eigenvalue by power iteration; trace = mean_z z'Hz, z Rademacher",
          "Hutchinson 1990; power iteration", "up to 120 double backward passes of forget and of retain, <= 512 items",
          "near 0 at loss 0 whatever the landscape: give --loss"),
    Probe("norms", _norms, "|theta| by block and part", "this project", "none", "the scale everything else is read in"),
    Probe("logits", _logits, "std over the vocabulary; z_y - max_j z_j", "this project", "a forward pass of every set",
          "confidence: gradients of cross-entropy shrink with it"),
    Probe("ranks", _ranks, "exp(H(s / sum s)), s singular values of weights and of centred features",
          "Roy and Vetterli 2007", "singular values of every matrix, a forward pass a layer", "1 to the smaller side"),
)
# fmt: on

PROBES: dict[str, Probe] = {probe.name: probe for probe in _ALL}
