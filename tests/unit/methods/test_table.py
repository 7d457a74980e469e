"""The table of methods: names, vocabulary, what each method needs, defaults and their domains."""

from __future__ import annotations

import math

import pytest

from llm_unlearn.methods.gradients import GRADIENTS
from llm_unlearn.methods.needs import (
    check_mask_params,
    check_params,
    knobs,
    lacks_in_images,
    needs,
    needs_text,
    weights_at,
)
from llm_unlearn.methods.spec import EDIT_VOCABULARY, VOCABULARY, input_names, knob_defaults
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import MASKS, RETAIN_TERMS

NAMES = list(METHODS)
FUNCTIONS = {m.forget.__name__: m.forget for m in METHODS.values() if m.forget}
EDITS = {m.edit.__name__: m.edit for m in METHODS.values() if m.edit}
FUNCTIONS |= {r.fn.__name__: r.fn for r in RETAIN_TERMS.values() if r.fn}


def test_the_names_are_the_keys():
    assert all(key == method.name for key, method in METHODS.items())
    assert list(RETAIN_TERMS) == ["none", "nll", "kl", "distil", "embed"]


@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_parameter_is_in_the_vocabulary(fn):
    assert input_names(fn)
    assert set(input_names(fn)) <= set(VOCABULARY)


@pytest.mark.parametrize("fn", EDITS.values(), ids=EDITS)
def test_every_parameter_of_an_edit_is_in_its_vocabulary(fn):
    assert "weights" in input_names(fn)
    assert set(input_names(fn)) <= set(EDIT_VOCABULARY)


def test_a_method_is_a_loss_or_an_edit():
    for method in METHODS.values():
        assert (method.kind == "edit") == (method.edit is not None)
        assert method.edit is None or (method.forget is None and method.retain == method.mask == "none")
        assert method.mask in MASKS


def test_masks_are_told_and_their_defaults_are_those_of_the_function():
    for name, mask in MASKS.items():
        assert mask.name == name
        defaults = {name: knob.default for name, knob in mask.params.items()}
        assert defaults == (knob_defaults(mask.fn) if mask.fn else {})
        assert check_mask_params(mask, {}) == defaults
        assert mask.formula
        assert mask.fn is None or (mask.failure and "arXiv:" in mask.source)
        for knob in mask.params.values():
            assert knob.default in knob.search
            assert all(knob.allows(value) for value in knob.search)


@pytest.mark.parametrize(("share", "fine"), [(1.0, True), (0.5, True), (0.0, False), (1.1, False), (-0.5, False)])
def test_the_share_of_a_mask_is_checked(share, fine):
    if fine:
        assert check_mask_params(MASKS["saliency"], {"share": share}) == {"share": share}
    else:
        with pytest.raises(ValueError, match=r"mask saliency: share must be in \[1e-06, 1\], got .*; default 0\.5"):
            check_mask_params(MASKS["saliency"], {"share": share})


def test_names_say_what_they_need():
    for name, wanted in VOCABULARY.items():
        assert any(need.startswith("ref_") for need in wanted) == name.startswith("ref_"), name
        assert ("idk" in wanted) == ("idk" in name), name
        assert ("alt" in wanted) == ("alt" in name), name
        assert ("rl" in wanted) == name.startswith("rl_"), name
        assert ("bad_logits" in wanted) == name.startswith("bad_"), name
        assert ("batch" in wanted) == (not wanted & {"idk", "alt", "rl", "weights"}), name
        assert ("hidden" in wanted) == (name.endswith("_NH") or name == "control_H"), name


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_function_and_pass_the_check(name):
    method = METHODS[name]
    defaults = {name: knob.default for name, knob in method.params.items()}
    function = method.forget or method.edit
    assert defaults == (knob_defaults(function) if function else {})
    every = {name: knob.default for name, knob in knobs(method).items()}
    assert check_params(method, defaults) == check_params(method, {}) == every
    assert method.retain in RETAIN_TERMS
    assert method.gradient is None or method.gradient in GRADIENTS
    assert method.gamma >= 0
    assert method.alpha >= 0
    assert method.formula
    assert method.failure
    assert "arXiv:" in method.source


def test_a_name_stands_for_one_hyper_parameter():
    for method in METHODS.values():
        for term in RETAIN_TERMS.values():
            weights = method.weights.params if method.weights else {}
            groups = (method.params, term.params, method.step_params, weights)
            assert len(set().union(*groups)) == sum(map(len, groups)), method.name


@pytest.mark.parametrize("name", RETAIN_TERMS)
def test_defaults_of_retain_terms_are_those_of_the_function(name):
    term = RETAIN_TERMS[name]
    assert {key: knob.default for key, knob in term.params.items()} == (knob_defaults(term.fn) if term.fn else {})


def test_params_of_another_retain_term_are_not_taken():
    assert check_params(METHODS["npo"], {"kl_weight": 1.0}, "distil")["kl_weight"] == 1.0
    with pytest.raises(ValueError, match="method scrub: unknown parameter 'kl_weight'; known: msteps"):
        check_params(METHODS["scrub"], {"kl_weight": 1.0}, "nll")


@pytest.mark.parametrize("name", NAMES)
def test_what_tuning_tries_is_allowed_and_holds_the_default(name):
    method = METHODS[name]
    for knob in knobs(method).values():
        assert knob.help
        assert knob.default in knob.search
        assert all(knob.allows(value) for value in knob.search)
    assert not method.alpha_search or method.alpha in method.alpha_search
    # the weight that balances a forget and a retain term is tuned for every method, or for none of them; scrub's is
    # among its retain term's own, and a rule for both weights has knobs
    assert method.weights is None or not method.alpha_search
    if method.forget is not None and method.retain not in ("none", "distil") and method.weights is None:
        assert method.alpha_search


@pytest.mark.parametrize(
    ("name", "retain", "expected"),
    [
        ("finetune", None, {"retain"}),
        ("ga", None, {"forget"}),
        ("graddiff", None, {"forget", "retain"}),
        ("kl", None, {"forget", "retain", "ref_logits"}),
        ("idk", None, {"idk", "retain"}),
        ("idk_dpo", None, {"forget", "idk", "retain", "ref_logp"}),
        ("npo", None, {"forget", "retain", "ref_logp"}),
        ("simnpo", None, {"forget", "retain"}),
        ("rmu", None, {"forget", "retain", "hidden", "ref_hidden"}),
        ("altpo", None, {"forget", "alt", "retain", "ref_logp"}),
        ("undial", None, {"forget", "ref_logits"}),
        ("wga", None, {"forget", "retain"}),
        ("satimp", None, {"forget", "retain"}),
        ("me", None, {"forget", "retain"}),
        ("ceu", None, {"forget"}),
        ("flat", None, {"forget", "idk"}),
        ("flat_kl", None, {"forget", "idk"}),
        ("rmu_adaptive", None, {"forget", "retain", "hidden", "ref_hidden"}),
        ("scrub", None, {"forget", "retain", "ref_logits"}),
        ("pdu", None, {"forget", "retain"}),
        ("whp", None, {"forget", "generic"}),
        ("npo_sam", None, {"forget", "retain", "ref_logp"}),
        ("salun", None, {"rl", "retain"}),
        ("neggrad_plus", None, {"forget", "retain"}),
        ("nabla_tau", None, {"forget", "retain"}),
        ("l1_sparse", None, {"weights", "retain"}),
        ("bad_teacher", None, {"forget", "bad_logits", "retain", "ref_logits"}),
        ("bad_teacher", "nll", {"forget", "bad_logits", "retain"}),
        ("random_label", None, {"rl", "retain"}),
        ("task_vector", None, {"forget", "reinforced"}),
        ("fisher", None, {"retain", "importance"}),
        ("ssd", None, {"forget", "retain", "importance"}),
        ("npo", "none", {"forget", "ref_logp"}),
        ("npo", "kl", {"forget", "retain", "ref_logp", "ref_logits"}),
        ("rmu", "nll", {"forget", "retain", "hidden"}),
        ("finetune", "kl", {"retain", "ref_logits"}),
    ],
)
def test_needs(name, retain, expected):
    assert needs(METHODS[name], retain) == expected


def test_what_the_scalar_averages_over():
    assert {n for n, r in RETAIN_TERMS.items() if r.mean_over == "sequence"} == {"embed"}
    for method in METHODS.values():  # a loss on per-sequence values cannot be a token mean
        if method.forget and any(n.endswith("_B") or n == "n_rows" for n in input_names(method.forget)):
            assert method.mean_over == "sequence"


def test_losses_without_a_floor_say_so():
    unbounded = [n for n in NAMES if "Unbounded below" in METHODS[n].failure]
    assert unbounded == ["ga", "graddiff", "kl", "scrub", "neggrad_plus"]


def test_rules_for_weights_are_told_and_their_defaults_are_those_of_the_function():
    rules = {name: method for name, method in METHODS.items() if method.weights}
    assert rules.keys() == {"neggrad_plus", "nabla_tau", "l1_sparse"}
    for method in rules.values():
        assert {name: knob.default for name, knob in method.weights.params.items()} == knob_defaults(method.weights.fn)
        assert method.weights.formula
        assert method.needs_retain
    assert weights_at(METHODS["npo"], 0.5, {}) == (1.0, 1.0)


def test_what_only_texts_have():
    only = {name for name, method in METHODS.items() if needs_text(method)}
    assert only == {"idk", "idk_dpo", "altpo", "flat", "flat_kl"}
    assert lacks_in_images(METHODS["idk_dpo"]) == ["refusals"]
    assert lacks_in_images(METHODS["altpo"]) == ["alternate answers"]


def test_weights_of_the_benchmark():
    first = ("finetune", "ga", "graddiff", "kl", "idk", "idk_dpo", "npo", "simnpo", "rmu")
    weights = {n: (METHODS[n].gamma, METHODS[n].alpha) for n in first}
    assert weights.pop("simnpo") == (0.125, 1.0)
    assert weights.pop("finetune") == (0.0, 1.0)
    assert set(weights.values()) == {(1.0, 1.0)}


def test_weights_where_the_source_has_others():
    assert (METHODS["me"].gamma, METHODS["satimp"].gamma) == (0.1, 0.1)
    assert all(METHODS[n].retain == "none" for n in ("undial", "ceu", "flat", "flat_kl"))


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="method finetune: nothing to train on with retain=none; use retain=nll"):
        needs(METHODS["finetune"], "none")


def test_unknown_retain_term_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"method npo: unknown retain term 'nl'; did you mean 'nll'\?"):
        needs(METHODS["npo"], "nl")


def test_params_are_completed():
    assert check_params(METHODS["simnpo"], {"beta": 2}) == {"beta": 2.0, "delta": 0.0}
    assert check_params(METHODS["simnpo"], {"delta": 0}) == {"beta": 4.5, "delta": 0.0}


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("npo", {"beta": 0}, r"method npo: beta must be in \(0, inf\), got 0; default 0\.1"),
        ("npo", {"beta": -1.0}, r"beta must be in \(0, inf\), got -1"),
        ("simnpo", {"delta": -0.1}, r"delta must be in \[0, inf\), got -0\.1"),
        ("rmu", {"coeff": 0.0}, r"coeff must be in \(0, inf\)"),
        ("undial", {"beta": -1.0}, r"beta must be in \[0, inf\), got -1"),
        ("wga", {"beta": 0.0}, r"beta must be in \(0, inf\), got 0"),
        ("satimp", {"beta2": -0.5}, r"beta2 must be in \[0, inf\), got -0\.5"),
        ("rmu_adaptive", {"scale": 0.0}, r"scale must be in \(0, inf\)"),
        ("ceu", {"skip": 0.5}, r"skip must be a whole number in \[0, inf\), got 0\.5; default 1"),
        ("ceu", {"skip": -1}, r"skip must be a whole number in \[0, inf\), got -1"),
        ("whp", {"reinforce_updates": 2.5}, r"reinforce_updates must be a whole number in \[1, inf\), got 2\.5"),
        ("npo", {"beta": math.nan}, "must be a finite number, got nan"),
        ("npo", {"beta": math.inf}, "must be a finite number, got inf"),
        ("npo", {"beta": "0.1"}, "must be a finite number, got '0.1'"),
        ("npo", {"beta": True}, "must be a finite number, got True"),
        ("task_vector", {"lam": -1}, r"method task_vector: lam must be in \[0, inf\), got -1; default 1"),
        ("fisher", {"floor": 0}, r"floor must be in \(0, inf\)"),
        ("ssd", {"alpha": 0}, r"alpha must be in \(0, inf\)"),
        ("neggrad_plus", {"beta": 1.5}, r"beta must be in \[0, 1\], got 1\.5; default 0\.95"),
        ("nabla_tau", {"target": -1}, r"target must be in \[0, inf\), got -1; default 0"),
        ("nabla_tau", {"start": 2}, r"start must be in \[0, 1\], got 2; default 0\.5"),
        ("l1_sparse", {"strength": -1}, r"strength must be in \[0, inf\), got -1"),
        ("npo", {"bta": 1.0}, r"unknown parameter 'bta'; did you mean 'beta'\?"),
        ("simnpo", {"coeff": 1.0}, "unknown parameter 'coeff'; known: beta, delta"),
        ("ga", {"beta": 1.0}, "method ga: unknown parameter 'beta'; it takes none"),
    ],
)
def test_wrong_params_are_errors(name, params, message):
    with pytest.raises(ValueError, match=message):
        check_params(METHODS[name], params)
