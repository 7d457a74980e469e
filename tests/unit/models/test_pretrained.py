"""Loading models: what goes in comes out, and what must not be loaded is refused in one line."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch

from llm_unlearn.errors import UserError
from llm_unlearn.models import pretrained
from llm_unlearn.models.lora import LoraConfig
from llm_unlearn.models.pretrained import (
    ModelConfig,
    absolute_reference,
    build_model,
    check_vocabulary,
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
    read_origin,
    skeleton,
    split_reference,
)
from llm_unlearn.models.tiny import SIZES, TinyConfig
from llm_unlearn.train.snapshot import copy_model, save_model

ORIGIN = {"kind": "grok", "step": 7}


@pytest.fixture
def saved(tmp_path, tiny_lm, tiny_tokenizer):
    return save_model(tmp_path / "run" / "grok", tiny_lm, tiny_tokenizer, ORIGIN)


def refused(match: str, *args):
    with pytest.raises(UserError, match=match) as caught:
        load_model(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_of(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_come_back_bit_for_bit(saved, tiny_lm, tiny_tokenizer):
    lm = load_model(str(saved))
    for (name, a), (other, b) in zip(tiny_lm.state_dict().items(), lm.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert load_tokenizer(str(saved)).get_vocab() == tiny_tokenizer.get_vocab()
    assert read_origin(str(saved)) == ORIGIN


def test_tied_weights_stay_tied(tmp_path, make_lm, tiny_tokenizer):
    lm = load_model(str(save_model(tmp_path / "m", make_lm(tie=True), tiny_tokenizer, {})))
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight


def test_the_dtype_asked_for(saved):
    assert {p.dtype for p in load_model(str(saved), "bfloat16").parameters()} == {torch.bfloat16}


def test_a_copy_has_an_origin_of_its_own(saved, tmp_path):
    copy = copy_model(saved, tmp_path / "copy", {"kind": "post"})
    assert read_origin(str(copy)) == {"kind": "post"}
    assert all(torch.equal(a, weights_of(copy)[name]) for name, a in weights_of(saved).items())


def test_run_at_kind(saved):
    run = saved.parent
    assert locate(f"{run}@grok") == str(saved)
    assert load_model(f"{run}@grok") is not None
    assert read_origin(f"{run}@grok") == ORIGIN


def test_a_kind_the_run_lacks_lists_the_others(saved):
    run = saved.parent
    copy_model(saved, run / "fit", {})
    message = refused("no checkpoint 'post'", f"{run}@post")
    assert f"{run}@fit, {run}@grok" in message
    refused("no such run; train it first", f"{run}x@grok")
    refused(f"no model there.*{run}@fit", str(run))


def test_a_run_with_one_outcome_needs_no_kind(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "one" / "final")
    assert locate(str(tmp_path / "one")) == str(tmp_path / "one" / "final")


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("runs/a@grok", ("runs/a", "grok")),
        ("/data/a@b/run@grok", ("/data/a@b/run", "grok")),
        ("/data/a@b/run", ("/data/a@b/run", None)),
        ("org/model", ("org/model", None)),
    ],
)
def test_the_last_at_divides_run_and_kind(reference, parts):
    assert split_reference(reference) == parts


def test_folders_may_have_an_at_in_their_name(saved, tmp_path):
    shutil.copytree(saved.parent, tmp_path / "a@b" / "run")
    assert locate(f"{tmp_path}/a@b/run@grok") == f"{tmp_path}/a@b/run/grok"
    assert locate(f"{tmp_path}/a@b/run/grok") == f"{tmp_path}/a@b/run/grok"


def test_absolute_references(saved, monkeypatch):
    run = saved.parent
    monkeypatch.chdir(run.parent)
    assert absolute_reference("run@grok") == absolute_reference("./run@grok") == f"{run}@grok"
    assert absolute_reference("run/grok") == absolute_reference(str(saved)) == str(saved)
    for name in ("org/model", "gone@grok"):
        assert absolute_reference(name) == name


@pytest.mark.parametrize("manifest", [True, False])
def test_a_fingerprint_changes_with_the_model(saved, manifest, tmp_path):
    before = fingerprint(str(saved))
    copy = shutil.copytree(saved, tmp_path / "copy")
    if not manifest:
        for folder in (saved, copy):
            (folder / "manifest.json").unlink()
        before = fingerprint(str(saved))
    assert fingerprint(str(copy)) == before
    tensors = weights_of(copy)
    tensors["lm_head.weight"][0, 0] += 1
    rewrite(copy, tensors)
    if manifest:  # its own programs replace a model and its manifest together
        copy_model(copy, copy, ORIGIN)
    assert fingerprint(str(copy)) != before
    assert fingerprint("org/model") == "org/model"


def test_an_empty_folder(tmp_path):
    refused("no finished checkpoint yet", str(tmp_path))


def test_a_missing_weight(saved):
    tensors = weights_of(saved)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    rewrite(saved, tensors)
    refused(r"1 weights are missing.*model.layers.1.mlp.up_proj.weight", str(saved))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(saved, bad):
    tensors = weights_of(saved)
    tensors["model.norm.weight"][3] = bad
    rewrite(saved, tensors)
    refused(r"1 tensors hold NaN or inf \(first: model.norm.weight\)", str(saved))


def test_pickles_are_not_loaded(saved):
    torch.save(weights_of(saved), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    refused("only pickle weights", str(saved))


def test_pickles_are_not_loaded_beside_unrelated_safetensors(saved):
    torch.save(weights_of(saved), saved / "pytorch_model.bin")
    (saved / "model.safetensors").rename(saved / "other.safetensors")
    refused("cannot be loaded", str(saved))


def test_code_of_the_model_is_never_run(saved, tmp_path):
    marker = tmp_path / "ran"
    (saved / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(saved, auto_map={"AutoModelForCausalLM": "evil.Evil"}, model_type="evil")
    refused("auto_map", str(saved))
    assert not marker.exists()


@pytest.mark.parametrize("shard", ["../run/grok/model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_shards_outside_the_folder(saved, shard):
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights_of(saved), shard)}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("leaves the model's folder", str(saved))


def test_an_index_without_shards(saved):
    (saved / "model.safetensors.index.json").write_text("{}")
    refused("no weight_map", str(saved))


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(f"{saved}: ", str(saved))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_damaged_config(saved, text):
    (saved / "config.json").write_text(text)
    refused("config.json: is no JSON object", str(saved))


def test_another_shape_than_the_config_says(saved):
    edit_config(saved, hidden_size=64)
    refused("do not fit the config", str(saved))


def test_an_unknown_architecture(saved):
    edit_config(saved, model_type="nosuchmodel", architectures=["NoSuch"])
    refused("cannot be loaded", str(saved))


def test_a_vocabulary_too_small(saved, make_lm, tiny_tokenizer):
    lm = make_lm()
    lm.resize_token_embeddings(len(tiny_tokenizer) - 1)
    with pytest.raises(
        UserError, match=f"tokenizer has {len(tiny_tokenizer)} ids, the model {len(tiny_tokenizer) - 1}"
    ):
        check_vocabulary(lm, tiny_tokenizer, "m")
    check_vocabulary(make_lm(), tiny_tokenizer, "m")


def test_a_hub_name_offline_fails_fast():
    import transformers

    assert transformers.AutoConfig  # its import is outside the clock
    started = time.monotonic()
    refused("is no folder here.*HF_HUB_OFFLINE=1", "nobody/no-such-model")
    with pytest.raises(UserError, match="nobody/no-such-model"):
        load_tokenizer("nobody/no-such-model")
    assert time.monotonic() - started < 3


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(saved):
    path = saved / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    tokenizer = load_tokenizer(str(saved))
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_folder_without_a_tokenizer(saved):
    for path in saved.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=str(saved)) as caught:
        load_tokenizer(str(saved))
    assert "\n" not in str(caught.value)


def test_models_that_say_nothing_of_their_making(saved):
    (saved / "manifest.json").unlink()
    assert read_origin(str(saved)) == {}
    (saved / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        read_origin(str(saved))


def test_from_scratch_models_are_functions_of_the_seed(tiny_tokenizer):
    def weights(seed: int) -> torch.Tensor:
        lm = build_model(ModelConfig(size="nano"), tiny_tokenizer, seed)
        return torch.cat([p.flatten() for p in lm.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_from_scratch_models_know_their_tokens(tiny_tokenizer):
    lm = build_model(ModelConfig(shape=TinyConfig(hidden=16, heads=2), dtype="bfloat16"), tiny_tokenizer, 0)
    assert lm.config.vocab_size == len(tiny_tokenizer)
    assert (lm.config.eos_token_id, lm.config.pad_token_id) == (
        tiny_tokenizer.eos_token_id,
        tiny_tokenizer.pad_token_id,
    )
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}


def test_a_model_to_start_from_wins_over_the_size(saved, tiny_lm, tiny_tokenizer):
    lm = build_model(ModelConfig(size="world", name=str(saved), lora=LoraConfig(rank=2)), tiny_tokenizer, 0)
    assert torch.equal(lm.get_input_embeddings().weight, tiny_lm.get_input_embeddings().weight)
    assert any("lora_" in name for name, _ in lm.named_parameters())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (ModelConfig(size="wrld"), "unknown model size 'wrld' in model.size; did you mean 'world'"),
        (ModelConfig(shape=TinyConfig(hidden=30, heads=4)), "model.hidden=30 is no multiple of model.heads=4"),
    ],
)
def test_impossible_shapes(config, match, tiny_tokenizer):
    with pytest.raises(UserError, match=match):
        build_model(config, tiny_tokenizer, 0)


@pytest.mark.parametrize("tie", [False, True])
def test_alpha_scales_every_initial_weight_once(tiny_tokenizer, tie):
    shape = SIZES["nano"].model_copy(update={"tie": tie})
    plain, scaled = (build_model(ModelConfig(shape=shape, alpha=a), tiny_tokenizer, 0) for a in (1.0, 8.0))
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(8 * a, b, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("build", [lambda c, t: build_model(c, t, 0), skeleton])
def test_alpha_on_pretrained_weights_is_refused(build, tiny_tokenizer):
    with pytest.raises(UserError, match="model.alpha has no effect on the pretrained weights of some/model; remove it"):
        build(ModelConfig(name="some/model", alpha=2.0), tiny_tokenizer)


def test_a_weight_the_model_does_not_have_is_named(saved, monkeypatch):
    told = []
    monkeypatch.setattr(pretrained.log, "warning", lambda text, *values: told.append(text % values))
    rewrite(saved, {**weights_of(saved), "model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)})
    load_model(str(saved))
    assert told == [
        f"{saved}: 1 weights are none of this model's and were left out (first: model.layers.7.mlp.up_proj.weight)"
    ]
