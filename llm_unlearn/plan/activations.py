"""What one forward pass leaves in memory for the backward pass, tensor by tensor, and how much is held at the worst
moment of the two.

Derived from transformers' Llama block, our answer-only logits and the rules of autograd:

- a product keeps its input where its weight, or an adapter beside it, is trained; under autocast the kept input is a
  16-bit copy made for that product alone, and so is the weight;
- RMSNorm keeps its input in fp32 and, where its own weight is trained, the normalised input;
- the fused attention kernel keeps queries, keys, values, output and one number per token and head; the eager one the
  attention matrix in fp32 (and a 16-bit copy where products are 16-bit) in place of that number, and repeats shared
  keys and values;
- the gated MLP keeps gate, silu(gate), up and their product;
- log_softmax keeps its fp32 output.

Rotary tables, token ids and biases are left out: they do not grow with both batch and width. Dropout is taken to be
off. The tests compare these counts with what autograd really saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_unlearn.plan.shape import KEY_SIDE, Shape

# What a loss reads: "logp" of the answers, "hidden" states of a layer, or whole distributions, by the name of the term
# (methods.losses, distill, tokenwise). fp32 matrices of answers x vocabulary: (kept for the backward pass, held at the
# worst moment of the forward pass, and beside what is kept in the backward pass). The objective makes logits and a
# log_softmax for every term.
LOGITS: dict[str, tuple[int, int, float]] = {
    "logp": (1, 2, 2),
    "hidden": (0, 0, 0),
    # also the reference's logits and log_softmax, a second log_softmax, and three inside kl_div, which keeps one
    "kl": (2, 8, 2),
    "scrub": (2, 8, 2),
    "bad_teacher": (2, 8, 2),
    "distil": (3, 8, 2),
    "undial": (2, 7, 2),
    "me": (1, 3, 2),
    "ceu": (2, 5, 2),
    "pdu": (1, 2, 3.25),  # a mask of the largest, a byte each
    "whp": (1, 3, 2),
}

HEAP_LIMIT = 32 << 20  # bytes; glibc's largest dynamic M_MMAP_THRESHOLD on 64-bit systems


@dataclass(frozen=True)
class BatchShape:
    """A padded micro-batch: rows x width tokens, of which `answers` predict an answer token, at most `longest` in a
    row.
    """

    rows: int
    width: int
    answers: int
    longest: int

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.rows * self.width


@dataclass(frozen=True)
class Pass:
    """One forward pass whose graph lives until the backward pass.

    Attributes:
        batch: over which batch.
        reads: what the loss reads, a key of LOGITS.
        depth: how many decoder layers that is; None for all.
        reference: whether a frozen model makes the same pass, without a graph.
        term: whose pass it is, where gradients are taken term by term.
    """

    batch: BatchShape
    reads: str = "logp"
    depth: int | None = None
    reference: bool = False
    term: str = "forget"


def layer_saved(shape: Shape, batch: BatchShape, *, first: bool = False, last: bool = False) -> int:
    """Return the bytes a decoder layer keeps when it is not checkpointed.

    `first`: nothing below is trained unless the embeddings are. `last`: queries and MLP at answer positions only, where
    the model is run that way.
    """
    n = batch.tokens
    m = batch.answers if last and shape.last_at_answers else n
    p = shape.product_bytes
    core = p * (2 * m * shape.q_width + 2 * n * (shape.q_width if shape.eager else shape.kv_width))
    if shape.eager:
        core += batch.rows * shape.heads * batch.width**2 * (4 + (p if p < 4 else 0))
    else:
        core += 4 * m * shape.heads
    if m < n:  # the last layer at answers: a mask, and the attention's output laid end to end for o_proj
        core += p * (batch.rows * batch.longest * batch.width + (m * shape.q_width if shape.base_trains else 0))
    mlp = 3 * p * m * shape.ff + _input(shape, ("down_proj",), m, shape.ff)
    adapters = sum(
        (4 if shape.weight_bytes < 4 else p) * shape.rank * (n if name in KEY_SIDE else m) for name in shape.adapted
    )
    # o_proj reads the attention's output, which is kept anyway; its adapter makes a copy of anything not in fp32
    own_copy = (
        _input(shape, ("o_proj",), m, shape.q_width) if "o_proj" in shape.adapted and p + shape.weight_bytes < 8 else 0
    )
    return core + mlp + adapters + own_copy + _norms(shape, n, m, first)


def _norms(shape: Shape, n: int, m: int, first: bool) -> int:
    """Both norms of a layer with what their outputs leave at the products that read them."""
    before = 0 if first and not shape.base_trains else n
    norm_in = (4 * shape.hidden + 4) * (before + m) + _scaled(shape) * (before + m)
    if m == n:
        return norm_in + _input(shape, ("q_proj", *KEY_SIDE), n, shape.hidden) + _mlp_input(shape, m)
    return (
        norm_in
        + _input(shape, KEY_SIDE, n, shape.hidden)
        + _input(shape, ("q_proj",), m, shape.hidden)
        + _mlp_input(shape, m)
    )


def _mlp_input(shape: Shape, m: int) -> int:
    return _input(shape, ("gate_proj", "up_proj"), m, shape.hidden)


def _scaled(shape: Shape) -> int:
    return shape.weight_bytes * shape.hidden if shape.base_trains else 0


def _input(shape: Shape, readers: Sequence[str], tokens: int, width: int) -> int:
    """Bytes that the products reading one tensor keep of it."""
    keeping = [name for name in readers if shape.base_trains or name in shape.adapted]
    if not keeping:
        return 0
    if shape.autocast_bytes:  # every product makes its own 16-bit copy; what already is 16-bit is shared
        copies = 1 if readers == ("down_proj",) else len(keeping)
        return copies * shape.autocast_bytes * tokens * width
    if shape.adapted and shape.weight_bytes < 4:  # adapters are fp32 and make their own copy
        return 4 * len(keeping) * tokens * width
    return shape.weight_bytes * tokens * width


def head_saved(shape: Shape, batch: BatchShape, reads: str) -> int:
    """Return the bytes that the final norm, the output projection and the loss keep."""
    if reads == "hidden":
        return 0
    m = batch.answers if shape.last_at_answers else batch.tokens
    at = batch.answers if shape.head_at_answers else batch.tokens
    norm = (4 * shape.hidden + 4 + _scaled(shape)) * m
    states = shape.product_bytes * at * shape.hidden if shape.base_trains else 0
    return norm + states + 4 * LOGITS[reads][0] * batch.answers * shape.vocab


def pass_saved(shape: Shape, work: Pass) -> list[int]:
    """Return the bytes kept by every decoder layer that the loss reaches, bottom up, and by the head last."""
    depth = shape.layers if work.depth is None else work.depth
    out = []
    for i in range(depth):
        last = i == shape.layers - 1
        if shape.checkpointing and not (last and shape.last_at_answers):
            out.append(shape.weight_bytes * work.batch.tokens * shape.hidden)
        else:
            out.append(layer_saved(shape, work.batch, first=i == 0, last=last and work.reads != "hidden"))
    return [*out, head_saved(shape, work.batch, work.reads)]


def cast_weights(shape: Shape) -> int:
    """Return the bytes of the 16-bit weights that autocast makes and keeps until the backward pass is over."""
    products = shape.layers * sum(shape.layer_products.values()) + shape.head_parameters
    adapters = 0 if shape.base_trains else shape.trainable
    return (shape.autocast_bytes or 0) * (products + adapters)


def step_peak(shape: Shape, passes: Sequence[Pass], *, gradients_kept: bool) -> tuple[int, int]:
    """Return (activations, gradients) in bytes at the moment of a step when their sum is largest.

    The passes run forward one after the other; the backward pass then goes through them in reverse, from the top of
    each to the bottom. Layers give their activations back as it leaves them, and leave their gradients behind.
    `gradients_kept`: gradients of an earlier micro-batch are there from the beginning.
    """
    saved = [pass_saved(shape, work) for work in passes]
    w = shape.weight_bytes
    everything = w * shape.trainable
    cast = cast_weights(shape)
    moments: list[tuple[int, int]] = []
    held = cast
    for work, parts in zip(passes, saved, strict=True):
        moments.append((held + _forward_peak(shape, work, parts), everything if gradients_kept else 0))
        held += sum(parts)
    gradients = everything if gradients_kept else 0
    for number, (work, parts) in enumerate(zip(reversed(passes), reversed(saved), strict=True)):
        *layers, head = parts
        again = gradients_kept or number > 0  # a gradient that is there already is added to, through one more
        nv = 4 * work.batch.answers * shape.vocab
        # log_softmax's backward reads its output and the gradient of it, and writes the gradient of the logits
        moments.append((held + round(LOGITS[work.reads][2] * nv), gradients))
        held -= head
        top = w * shape.head_parameters if shape.base_trains and work.reads != "hidden" else 0
        gradients = gradients if again else gradients + (0 if shape.tied else top)
        moments.append((held + (nv if top else 0) + (top if again or shape.tied else 0), gradients))
        for i, part in reversed(list(enumerate(layers))):
            work_space = _backward_space(shape, work, part, last=i == shape.layers - 1)
            if not again:
                gradients += w * shape.layer_trainable
            moments.append((held + work_space, gradients))
            held -= part
        if not again:
            gradients = everything
        moments.append((held, gradients))
    return max(moments, key=sum)


def _forward_peak(shape: Shape, work: Pass, parts: Sequence[int]) -> int:
    """Bytes at the worst moment of a forward pass: at its end, with the logits; or, where the loss reads a layer below,
    with the graph of the layers above, which nothing will use.
    """
    if work.reads == "hidden":
        whole = Pass(work.batch, "hidden")
        return sum(pass_saved(shape, whole)) + shape.layers * work.batch.tokens * shape.hidden * shape.weight_bytes
    kept, worst, _ = LOGITS[work.reads]
    return sum(parts) + 4 * (worst - kept) * work.batch.answers * shape.vocab


def _backward_space(shape: Shape, work: Pass, part: int, *, last: bool) -> int:
    """Bytes a layer's backward pass holds beside what is kept: the gradients of the gate and up projections less the
    product given back, the gradients of the residual stream, and, checkpointed, the layer computed again.
    """
    at_answers = last and shape.last_at_answers and work.reads != "hidden"
    m = work.batch.answers if at_answers else work.batch.tokens
    space = shape.product_bytes * 2 * m * shape.ff + 2 * shape.weight_bytes * work.batch.tokens * shape.hidden
    if shape.checkpointing and not at_answers:
        return space + layer_saved(shape, work.batch) - part  # its input is the one that was kept
    return space


def heap_holes(shape: Shape, passes: Sequence[Pass]) -> int:
    """Return the bytes a CPU process loses to glibc's heap on top of what is held: an upper estimate.

    glibc's memalign, which torch's CPU tensors come from, asks for more than the size, so a freed block between two
    that are kept never serves a tensor of the same size again. Of every forward pass this leaves the temporaries of its
    layers as holes. Blocks of 32 MiB and more are not on the heap.
    """
    total = 0
    for work in passes:
        last_short = shape.last_at_answers and work.reads != "hidden"
        depth = shape.layers if work.depth is None else work.depth  # what lies above is freed whole
        layers = 1 if shape.checkpointing else depth  # a checkpointed layer frees its neighbours too
        total += sum(
            size
            for i in range(layers)
            for made in (_temporaries, _adapter_outputs)
            for size in made(shape, work.batch, last=last_short and i == shape.layers - 1)
            if size < HEAP_LIMIT
        )
    return total


def _temporaries(shape: Shape, batch: BatchShape, *, last: bool) -> list[int]:
    """Sizes of what a layer's forward pass makes and frees again: squares under the norms, queries and keys before
    rotation with the steps of rotating them, outputs added to the residual stream; what is not trained, or
    before a cast, as far as it is not kept. Scratch of 16-bit matrix products is left out.
    """
    n = batch.tokens
    m = batch.answers if last else n
    h, p = shape.hidden, shape.product_bytes
    own, mixed = shape.weight_bytes, shape.autocast_bytes is not None
    sizes = [4 * n * h, 4 * m * h, p * m * h, p * m * h]
    for tokens, width in ((m, shape.q_width), (n, shape.kv_width)):
        size = tokens * width
        sizes += [p * size, own * size, p * size // 2, p * size, own * size]  # x, x cos, half of -x, swapped, its sin
        sizes += [own * size] * 3 if mixed else []  # both factors cast up, the sum before it is cast down
        sizes += [own * size] * 2 if shape.eager else []  # bmm takes contiguous copies; its output is copied too
    if mixed:
        sizes += [own * m * h] * 2  # what is added to the residual stream, cast up
    if mixed or own < 4:
        sizes += [4 * n * h, 4 * m * h]
    if not shape.base_trains:
        sizes += [own * n * h, own * m * h]
    if shape.eager:
        sizes += [p * batch.rows * shape.heads * batch.width**2] * 3  # scores, scaled, masked
    return sizes


def _adapter_outputs(shape: Shape, batch: BatchShape, *, last: bool) -> list[int]:
    """Sizes of the outputs of a layer's adapters. The projection's own, the adapter's and the scaled one are made side
    by side and freed together, so that what comes next fits into two of the three. That a third is lost was seen, in
    one case, and not derived.
    """
    n = batch.tokens
    m = batch.answers if last else n
    wide = {
        "gate_proj": shape.ff,
        "up_proj": shape.ff,
        "q_proj": shape.q_width,
        **dict.fromkeys(KEY_SIDE, shape.kv_width),
    }
    return [
        shape.product_bytes * (n if name in KEY_SIDE else m) * wide.get(name, shape.hidden) for name in shape.adapted
    ]
