"""What a model answers: batched greedy generation with a key/value cache, stopped row by row; the class of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_unlearn.data.batches import collate
from llm_unlearn.data.images import Picture
from llm_unlearn.data.tokenise import Encoded
from llm_unlearn.eval.metrics.base import Scored
from llm_unlearn.log import get_logger
from llm_unlearn.models.causal import position_limit

log = get_logger(__name__)
MAX_IMAGES = 256  # of a batch that is classified
MAX_CACHE_BYTES = 1 << 30  # keys and values of a batch, of prompts and what is generated
SHRINK_AT = 0.6  # share of rows still running at which a batch drops the others


@torch.no_grad()
def classify(model: Any, items: Sequence[Picture], names: Sequence[str], scored: Sequence[Scored]) -> list[str]:
    """Return the class a classifier gives each image, in the order given: what `generate` is to texts.

    The scores know it where the true class is the most likely one, so only the others are looked at again.

    Args:
        model: an ImageModel.
        items: images with their true classes.
        names: of the classes.
        scored: teacher-forced scores of the same items.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    said = [item.label for item in items]
    missed = [i for i, its in enumerate(scored) if not its.hit.all()]
    for at in range(0, len(missed), MAX_IMAGES):
        part = missed[at : at + MAX_IMAGES]
        batch = collate([items[i] for i in part]).to(device)
        logits_NV = model(batch.inputs, batch.index_N)
        # it is known not to be this one; another batch may round a near tie the other way
        logits_NV.scatter_(1, batch.labels_N[:, None], -torch.inf)
        for i, label in zip(part, logits_NV.argmax(-1).tolist(), strict=True):
            said[i] = label
    model.train(was_training)
    return [names[label] for label in said]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Encoded],
    max_new_tokens: int,
    scored: Sequence[Scored] | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """Answer each item's prompt greedily; return texts in the order given.

    Prompts are padded on the left with explicit positions, so a row's text does not depend on its batch. Rows leave
    their batch as they produce the end token.

    Args:
        model: an AnswerModel, or the language model itself.
        tokenizer: its tokenizer.
        items: what to answer; the answer's tokens are not looked at without `scored`.
        max_new_tokens: longest text.
        scored: teacher-forced scores of the same items. Greedy decoding repeats the answer as long as its tokens are
            hits, so it is started at the first miss, and not at all where there is none.
        stop: texts that end an answer; it is cut before the first of them. They do not end decoding.
    """
    lm = getattr(model, "lm", model)
    was_training = lm.training
    lm.eval()
    limit, ends = position_limit(lm.config)
    room = limit if limit is not None and ends else None
    given = [_given(item, None if scored is None else scored[i], max_new_tokens, room) for i, item in enumerate(items)]
    produced = [list(map(int, head)) for _, head, _ in given]
    ends = _end_tokens(lm, tokenizer, items)
    decode = _greedy if not given or _remembers(lm, max((g[0] for g in given), key=len)) else _greedy_without_cache
    order = sorted((i for i, (_, _, left) in enumerate(given) if left), key=lambda i: (-sum(map(len, given[i][:2])), i))
    while order:
        width = sum(map(len, given[order[0]][:2])) + max(given[i][2] for i in order)
        n = max(1, MAX_CACHE_BYTES // (width * _bytes_per_token(lm)))
        group, order = order[:n], order[n:]
        starts = [np.concatenate(given[i][:2]) for i in group]
        limits = [given[i][2] for i in group]
        for i, ids in zip(group, decode(lm, starts, limits, ends), strict=True):
            produced[i] += ids
    lm.train(was_training)
    whole = [ids[: next((k for k, token in enumerate(ids) if token in ends), len(ids))] for ids in produced]
    return [_cut(tokenizer.decode(ids, skip_special_tokens=True), stop).strip() for ids in whole]


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _given(item: Encoded, scored: Scored | None, limit: int, room: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (prompt, what is known to follow it, how many tokens may still follow); `room` is where positions end."""
    if room is not None:
        limit = max(0, min(limit, room - (item.start if item.prompt is None else len(item.prompt))))
    if item.prompt is not None:
        return item.prompt, item.ids[:0], limit
    answer = item.ids[item.start :]
    misses = np.flatnonzero(~scored.hit) if scored is not None else np.zeros(1, dtype=np.int64)
    known = min(int(misses[0]) if misses.size else len(answer), limit)
    done = not misses.size and item.has_eos
    return item.ids[: item.start], answer[:known], 0 if done else limit - known


def _end_tokens(lm: Any, tokenizer: Any, items: Sequence[Encoded]) -> frozenset[int]:
    """Tokens after which nothing more is said: the tokenizer's, the model's own, and a chat template's end of turn."""
    own = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return frozenset({tokenizer.eos_token_id, *own, *(int(item.ids[-1]) for item in items if item.has_eos)})


def _remembers(lm: Any, prompt: np.ndarray) -> bool:
    """Whether padding on the left and a cache of keys and values leave the next token's logits as they are.

    A model with another state (Mamba, RWKV ...) reads the padding, and forgets what a cache of this kind does not hold.
    """
    if len(prompt) < 2:
        prompt = np.repeat(prompt, 2)
    device = next(lm.parameters()).device
    ids_1T = torch.as_tensor(prompt, device=device)[None]
    wanted = lm(input_ids=ids_1T, use_cache=False).logits[0, -1].float()
    padded_1T = torch.cat([ids_1T[:, :1], ids_1T], 1)
    mask_1T = torch.ones_like(padded_1T)
    mask_1T[0, 0] = 0
    position_1T = (mask_1T.cumsum(-1) - 1).clamp(min=0)
    cache = _growing_cache(lm.config)
    try:
        for part in (slice(0, -1), slice(len(prompt), None)):
            out = lm(
                input_ids=padded_1T[:, part], attention_mask=mask_1T[:, : part.stop or mask_1T.shape[1]],
                position_ids=position_1T[:, part], past_key_values=cache, use_cache=True,
            )  # fmt: skip
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError):
        return False
    close = 1e-3 if wanted.dtype == next(lm.parameters()).dtype else 0.25
    return bool(torch.allclose(out.logits[0, -1].float(), wanted, atol=close, rtol=1e-3))


def _greedy_without_cache(
    lm: Any, prompts: Sequence[np.ndarray], limits: Sequence[int], ends: frozenset[int]
) -> list[list[int]]:
    """One row at a time, everything computed anew for each token: right for any model, and slow."""
    log.info("this model keeps no plain cache of keys and values: answers are generated without one, which takes long")
    device, out = next(lm.parameters()).device, []
    for prompt, limit in zip(prompts, limits, strict=True):
        ids = [int(token) for token in prompt]
        while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] not in ends):
            ids.append(int(lm(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1].argmax()))
        out.append(ids[len(prompt) :])
    return out


def _greedy(lm: Any, prompts: Sequence[np.ndarray], limits: Sequence[int], ends: frozenset[int]) -> list[list[int]]:
    device = next(lm.parameters()).device
    end_E = torch.tensor(sorted(ends), device=device)
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), min(ends), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, width - len(prompt) :] = torch.as_tensor(prompt)
        mask_BT[b, width - len(prompt) :] = 1
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = _growing_cache(lm.config)
    rows, left_B = torch.arange(len(prompts), device=device), torch.tensor(limits, device=device)
    running_B = torch.ones_like(rows, dtype=torch.bool)
    produced: list[list[int]] = [[] for _ in prompts]
    while True:
        out = lm(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        next_B = out.logits[:, -1].float().argmax(-1)
        for b, token, on in zip(rows.tolist(), next_B.tolist(), running_B.tolist(), strict=True):
            if on:
                produced[b].append(token)
        left_B = left_B - 1
        running_B = running_B & ~torch.isin(next_B, end_E) & (left_B > 0)
        n_running = int(running_B.sum())
        if not n_running:
            return produced
        if n_running <= SHRINK_AT * len(rows):
            kept = running_B.nonzero().flatten()
            rows, left_B, next_B, mask_BT = rows[kept], left_B[kept], next_B[kept], mask_BT[kept]
            running_B = running_B[kept]
            cache.reorder_cache(kept)
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], 1)
        ids_BT, position_BT = next_B[:, None], mask_BT.sum(-1, keepdim=True) - 1


def _bytes_per_token(lm: Any) -> int:
    """Size of a token's keys and values in all layers; of a wide model where the config does not say."""
    config = lm.config
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 32)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 4096) // getattr(
        config, "num_attention_heads", 32
    )
    return 2 * getattr(config, "num_hidden_layers", 32) * heads * width * next(lm.parameters()).element_size()


def _growing_cache(config: Any) -> Any:
    """A transformers cache whose plain layers double their room when it is full: concatenating at every token, as they
    do, copies the whole cache each time.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        def update(
            self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            used = self.get_seq_length()
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.rooms: list[Tensor | None] = [None, None]
            for k, (old, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
                self.rooms[k] = _with_room(self.rooms[k], old, new, used)
            self.keys, self.values = (
                room[..., : used + key_states.shape[-2], :] for room in self.rooms if room is not None
            )
            return self.keys, self.values

    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _with_room(room: Tensor | None, old: Tensor | None, new: Tensor, used: int) -> Tensor:
    """Write `new` behind the `used` first positions (B, heads, T, D), into a room twice as large if it does not fit."""
    end = used + new.shape[-2]
    if room is None or room.shape[-2] < end or room.shape[0] != new.shape[0]:
        room = new.new_empty(*new.shape[:-2], 2 * end, new.shape[-1])
        if used and old is not None:
            room[..., :used, :] = old
    room[..., used:end, :] = new
    return room
