"""AnswerModel: the same logits as the whole model's, at fewer positions."""

from __future__ import annotations

import pytest
import torch

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora, merge_lora

V = 64


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    )


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=32, sliding_window=16,
        )
    )  # fmt: skip


def granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, logits_scaling=8.0,
        )
    )  # fmt: skip


@pytest.fixture
def batch(tiny_items):
    by_length = {len(item.ids): item for item in tiny_items}
    return collate([by_length[n] for n in sorted(by_length)] + list(tiny_items[:3]))


def full_logits(lm, batch):
    return lm(input_ids=batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.index_N]


def small(batch, vocab: int):
    return type(batch)(batch.inputs % vocab, batch.index_N, batch.labels_N % vocab, batch.row_N)


@pytest.mark.parametrize("tie", [False, True])
def test_llama(make_lm, batch, tie):
    lm = make_lm(tie=tie).eval()
    model = AnswerModel(lm)
    assert model.plain_head
    torch.testing.assert_close(model(batch.inputs, batch.index_N), full_logits(lm, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("make", "plain"), [(gpt2, True), (gemma2, False), (granite, False)])
def test_other_families(make, plain, batch):
    """Heads that do more than a projection are recognised even where an untrained model does not show it."""
    torch.manual_seed(0)
    lm, batch = make().eval(), small(batch, V)
    model = AnswerModel(lm)
    assert model.plain_head == plain
    torch.testing.assert_close(model(batch.inputs, batch.index_N), full_logits(lm, batch), rtol=0, atol=1e-6)


def test_a_soft_cap_counts_once_logits_have_grown(batch):
    torch.manual_seed(0)
    lm, batch = gemma2().eval(), small(batch, V)
    model = AnswerModel(lm)
    with torch.no_grad():
        lm.model.norm.weight.fill_(200.0)
        logits = model(batch.inputs, batch.index_N)
        assert 20 < logits.abs().max() <= 30
        torch.testing.assert_close(logits, full_logits(lm, batch), rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_whole_model(make_lm, batch):
    grads = []
    for call in (lambda lm: AnswerModel(lm)(batch.inputs, batch.index_N), lambda lm: full_logits(lm, batch)):
        lm = make_lm()
        torch.nn.functional.cross_entropy(call(lm), batch.labels_N).backward()
        grads.append([p.grad for p in lm.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [None, gpt2])
def test_layer_outputs_are_the_residual_stream(make, make_lm, batch):
    lm = (make() if make else make_lm()).eval()
    batch = small(batch, V)
    states = lm(input_ids=batch.inputs, output_hidden_states=True).hidden_states
    got = AnswerModel(lm)(batch.inputs, batch.index_N, 0)
    assert got.shape == (batch.n_tokens, 32)
    torch.testing.assert_close(got, states[1].flatten(0, 1)[batch.index_N], rtol=0, atol=0)


def test_adapters_take_part(make_lm, batch):
    lm = add_lora(make_lm(), LoraConfig(rank=2)).eval()
    model = AnswerModel(lm)
    before = model(batch.inputs, batch.index_N)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    after = model(batch.inputs, batch.index_N)
    assert model.plain_head
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, full_logits(lm, batch), rtol=0, atol=1e-5)
    with lm.disable_adapter():
        torch.testing.assert_close(model(batch.inputs, batch.index_N), before, rtol=0, atol=0)
    merged = AnswerModel(merge_lora(lm))
    torch.testing.assert_close(merged(batch.inputs, batch.index_N), after, rtol=1e-4, atol=1e-5)


def test_only_adapters_train(make_lm):
    lm = add_lora(make_lm(), LoraConfig(rank=2))
    trained = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    plain = make_lm()
    assert merge_lora(plain) is plain


def test_the_probe_leaves_no_trace(make_lm):
    lm = make_lm().train()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    AnswerModel(lm)
    assert lm.training
    assert not lm.lm_head._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())


def test_encoders_are_refused():
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    bert = BertForMaskedLM(
        BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    for lm in (bert, t5):
        with pytest.raises(UserError, match=f"{type(lm).__name__} is no causal language model"):
            AnswerModel(lm)


def test_what_is_causal_is_taken_whatever_its_config_says():
    from transformers import BertConfig, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=40, **shape))
    assert not neox.config.is_decoder
    assert AnswerModel(neox).plain_head
    with pytest.raises(UserError, match="BertLMHeadModel is no causal language model"):
        AnswerModel(BertLMHeadModel(BertConfig(vocab_size=40, **shape)))


@pytest.mark.parametrize("make", [gpt2, gemma2, granite])
def test_a_layers_output_is_read_before_the_final_norm(make, batch):
    """Transformers gives the last hidden state after the norm, as if it were the last layer's output."""
    torch.manual_seed(0)
    lm, batch = make().eval(), small(batch, V)
    read = [AnswerModel(lm)(batch.inputs, batch.index_N, layer) for layer in (0, 1)]
    body = lm.get_decoder()
    blocks, norm = (body.h, body.ln_f) if make is gpt2 else (body.layers, body.norm)
    for found, block in zip(read, blocks, strict=True):
        kept = []
        hook = block.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        last = body(input_ids=batch.inputs, use_cache=False).last_hidden_state
        hook.remove()
        out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        torch.testing.assert_close(found, out.flatten(0, 1)[batch.index_N], rtol=0, atol=0)
    torch.testing.assert_close(norm(read[1]), last.flatten(0, 1)[batch.index_N])
