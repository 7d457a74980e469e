"""Losses of a fit: against torch's, by token, in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm_unlearn.methods.fitting import FIT_LOSSES, cross_entropy, squared_error


def test_squared_error_is_torchs_on_one_hot_targets():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 11, requires_grad=True), torch.randint(11, (6,))
    expected = F.mse_loss(logits, F.one_hot(labels, 11).float())
    torch.testing.assert_close(squared_error(logits, labels), expected)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (squared_error(logits, labels), expected))
    torch.testing.assert_close(ours, theirs)
    assert squared_error(F.one_hot(labels, 11).float(), labels) == 0


def test_cross_entropy_is_torchs():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 11), torch.randint(11, (6,))
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", FIT_LOSSES)
def test_tokens_count_alike_and_16_bits_are_read_as_32(name):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 11).bfloat16(), torch.randint(11, (6,))
    loss = FIT_LOSSES[name]
    assert loss(logits, labels).dtype == torch.float32
    torch.testing.assert_close(loss(logits, labels), loss(logits.float(), labels))
    parts = loss(logits[:2], labels[:2]) * 2 / 6 + loss(logits[2:], labels[2:]) * 4 / 6
    torch.testing.assert_close(parts, loss(logits, labels))
    with pytest.raises(ValueError, match="no answer token"):
        loss(logits[:0], labels[:0])
