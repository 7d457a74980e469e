"""Image classifiers: their sizes by hand, one image at a time or all at once, saved and loaded, and what is refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from llm_unlearn.data.images import Classes, Picture
from llm_unlearn.errors import UserError
from llm_unlearn.eval.divergence import kl_divergence
from llm_unlearn.eval.meter import metered
from llm_unlearn.eval.scoring import score_answers
from llm_unlearn.models.checkpointing import checkpoint_activations
from llm_unlearn.models.image_model import (
    ImageModel,
    build_classifier,
    check_classes,
)
from llm_unlearn.models.image_nets import NetConfig, patch_side
from llm_unlearn.models.lora import LoraConfig, add_lora, load_trained_state, trained_state
from llm_unlearn.models.pretrained import check_vocabulary, load_model
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.cost import counted_parameters, flops
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.snapshot import save_model
from llm_unlearn.train.tasks import FitTask, Place
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.objective import make_objective, resolve_objective

DIGITS = (1, 8, 8)
CLASSES = Classes(list("0123456789"), (1, 8, 8))
NETS = [
    *(
        NetConfig(arch=arch, norm=norm)
        for arch in ("cnn", "resnet8", "resnet14")
        for norm in ("none", "group", "batch")
    ),
    NetConfig(arch="resnet18", width=4, norm="batch"),
    NetConfig(arch="vit"),
]


def name_of(net: NetConfig) -> str:
    return f"{net.arch}-{net.norm}"


def built(net: NetConfig | None = None, shape=DIGITS, n_classes: int = 10, seed: int = 0):
    return build_classifier(net or NetConfig(), shape, n_classes, seed)


def images(n: int, shape=DIGITS, seed: int = 0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def pictures(n: int, shape=DIGITS):
    return [Picture(x.numpy(), i % 10) for i, x in enumerate(images(n, shape))]


def moved(lm, shape=DIGITS):
    """The model with running statistics that are not those it was born with."""
    lm.train()
    with torch.no_grad():
        for seed in range(3):
            lm(3 * images(8, shape, seed) + 1)
    return lm.eval()


def count(lm) -> int:
    return sum(p.numel() for p in lm.parameters())


def refused(match: str, call, *args):
    with pytest.raises(UserError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_the_default_cnn_has_the_weights_of_the_reference():
    lm = built()
    assert count(lm) == 6058  # padding 1: 8 -> 4 -> 2 places a side, so 16 * 2 * 2 = 64 inputs of the linear layer
    assert [tuple(p.shape) for p in lm.parameters() if p.dim() > 1] == [
        (8, 1, 3, 3),
        (16, 8, 3, 3),
        (64, 64),
        (10, 64),
    ]
    assert lm.head.weight.shape == (10, 64)


def residual_weights(width: int, blocks: tuple[int, ...], channels: int, n_classes: int, *, norm: bool) -> int:
    conv = lambda a, b, k=3: a * b * k * k + b + 2 * b * norm  # noqa: E731
    total, before = conv(channels, width), width
    for stage, n in enumerate(blocks):
        after = width * 2**stage
        for i in range(n):
            total += conv(before, after) + conv(after, after) + (conv(before, after, 1) if i == 0 and stage else 0)
            before = after
    return total + before * n_classes + n_classes


@pytest.mark.parametrize(
    ("net", "shape", "n_classes", "expected"),
    [
        (NetConfig(arch="resnet8"), DIGITS, 10, residual_weights(8, (1, 1, 1), 1, 10, norm=False)),
        (NetConfig(arch="resnet14", norm="group"), DIGITS, 10, residual_weights(8, (2, 2, 2), 1, 10, norm=True)),
        (NetConfig(arch="resnet14", width=5), (3, 9, 7), 4, residual_weights(5, (2, 2, 2), 3, 4, norm=False)),
        (NetConfig(arch="vit"), DIGITS, 10, 4 * 64 + 64 + 16 * 64 + 2 * (8 * 64 * 64 + 11 * 64) + 2 * 64 + 650),
    ],
)
def test_weights_by_hand(net, shape, n_classes, expected):
    assert count(built(net, shape, n_classes)) == expected


def test_resnet18_is_the_usual_one_for_cifar():
    with torch.device("meta"):
        lm = built(NetConfig(arch="resnet18", norm="batch"), (3, 32, 32))
    # 11,173,962 as widely reported, without biases before batch norms; here convolutions have them
    biases = sum(m.out_channels for m in lm.modules() if isinstance(m, nn.Conv2d))
    assert count(lm) == 11_173_962 + biases


@pytest.mark.parametrize("net", NETS, ids=name_of)
@pytest.mark.parametrize("shape", [DIGITS, (3, 14, 14), (2, 9, 7)])
def test_one_by_one_as_all_at_once(net, shape):
    lm = moved(built(net, shape), shape)
    items = pictures(12, shape)
    model = ImageModel(lm)
    together = np.array([s.logp[0] for s in score_answers(model, items)])
    alone = np.array([score_answers(model, [item])[0].logp[0] for item in items])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    assert np.isfinite(together).all()
    assert together.std() > 1e-3


@pytest.mark.parametrize("net", NETS, ids=name_of)
def test_layers_and_their_widths(net):
    lm = built(net).eval()
    model, x = ImageModel(lm), images(5)
    at = torch.tensor([3, 0])
    assert lm.n_layers == lm.config.num_hidden_layers == len(lm.config.hidden_sizes)
    assert torch.equal(model(x, at), lm(x)[at])
    for layer in range(lm.n_layers):
        out = model(x, at, layer)
        assert out.shape == (2, model.hidden_size(layer))
        assert torch.equal(out, lm.features(x, layer)[at])
    (part, logits), *rest = model.logits_in_parts(x, at)
    assert not rest
    assert torch.equal(logits[part], lm(x)[at])
    for layer in (-1, lm.n_layers):
        refused(
            f"layer={layer}: the model has {lm.n_layers} layers; choose 0 to {lm.n_layers - 1}", model, x, at, layer
        )


@pytest.mark.parametrize("arch", ["resnet8", "vit", "cnn"])
def test_the_last_features_are_what_the_head_reads(arch):
    lm, x = built(NetConfig(arch=arch)).eval(), images(4)
    seen = []
    hook = lm.head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    lm(x)
    hook.remove()
    last = lm.features(x, lm.n_layers - 1)
    if arch == "vit":  # a norm stands between, and the mean over tokens comes after it
        assert last.shape == seen[0].shape
    else:
        torch.testing.assert_close(last, seen[0])


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (NetConfig(), ["blocks.0.1", "blocks.1.1", "blocks.2.2"]),
        (
            NetConfig(arch="resnet8"),
            ["stem.1", *(f"blocks.{i}.{name}" for i in range(3) for name in ("relu", "relu_out"))],
        ),
        (NetConfig(arch="vit", layers=3), [f"blocks.{i}.gelu" for i in range(3)]),
    ],
)
def test_preactivations_are_what_the_units_are_given(net, names):
    lm, x = built(net), images(3)
    found = lm.preactivations(x)
    assert [name for name, _ in found] == names
    assert all(tensor.shape[0] == 3 for _, tensor in found)
    assert min(float(tensor.detach().min()) for _, tensor in found) < 0
    sum(tensor.square().mean() for _, tensor in found).backward()
    assert next(lm.parameters()).grad is not None
    assert not any(module._forward_pre_hooks for module in lm.modules())


def test_the_first_preactivation_is_the_convolution():
    lm, x = built(), images(2)
    torch.testing.assert_close(lm.preactivations(x)[0][1], lm.blocks[0][0](x))


@pytest.mark.parametrize("net", NETS, ids=name_of)
def test_alpha_scales_every_parameter(net):
    plain, scaled = built(net), built(net.model_copy(update={"alpha": 16.0}))
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(16 * a, b), name
    for (name, a), b in zip(plain.named_buffers(), scaled.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_weights_start_as_pytorch_starts_them():
    lm = built()
    torch.manual_seed(0)
    first = nn.Conv2d(1, 8, 3)
    assert torch.equal(lm.blocks[0][0].weight, first.weight)
    assert torch.equal(lm.blocks[0][0].bias, first.bias)
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound < float(lm.head.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_the_seed_decides(arch):
    net = NetConfig(arch=arch)
    a, b, other = built(net), built(net), built(net, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, other.head.weight)


@pytest.mark.parametrize("net", NETS, ids=name_of)
def test_saved_and_loaded_bit_for_bit(net, tmp_path):
    lm = moved(built(net, (3, 8, 8), 7), (3, 8, 8))
    folder = save_model(tmp_path / "run" / "grok", lm, Classes([str(i) for i in range(7)], (3, 8, 8)), {"kind": "grok"})
    again = load_model(f"{tmp_path}/run@grok")
    assert list(again.state_dict()) == list(lm.state_dict())
    for (name, a), b in zip(lm.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x = images(4, (3, 8, 8))
    assert not again.training
    assert torch.equal(lm(x), again(x))
    assert again.config.hidden_sizes == lm.config.hidden_sizes
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".json", ".safetensors"]


def test_batch_norm_counts_in_the_state_a_run_resumes_from():
    lm, fresh = moved(built(NetConfig(arch="resnet8", norm="batch"))), built(NetConfig(arch="resnet8", norm="batch"))
    assert any(name.endswith("running_mean") for name in trained_state(lm))
    load_trained_state(fresh, trained_state(lm))
    assert torch.equal(fresh.eval()(images(4)), lm(images(4)))


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


class KillAt:
    """A callback that kills at a step, once the state before it is saved."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def __call__(self, run) -> None:
        if run.step == self.step:
            raise Killed

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def fitted(net, out, *callbacks):
    loop = LoopConfig(max_steps=6, batch_size=8, save_every=2, threads=1)
    task = FitTask(pictures(20), 8, 0, Place(n_micro=2))
    accelerator = make_accelerator(loop, 2)
    return train(
        ImageModel(built(net)), task, OptimConfig(), loop, accelerator=accelerator, out=out, callbacks=callbacks
    )


@pytest.mark.parametrize("net", [NetConfig(arch="resnet8", norm="batch"), NetConfig(arch="vit")], ids=name_of)
def test_a_killed_run_ends_bit_identical(net, tmp_path):
    start = built(net).state_dict()
    whole = fitted(net, tmp_path / "whole", KillAt()).lm.state_dict()
    with pytest.raises(Killed):
        fitted(net, tmp_path / "killed", KillAt(5))
    again = fitted(net, tmp_path / "killed", KillAt())
    assert again.resumed_from == 4
    for name, value in again.lm.state_dict().items():
        assert torch.equal(value, whole[name]), name
        assert not torch.equal(value, start[name]), name


def test_batch_norm_mixes_images_in_training_only():
    x = images(6)
    for norm, mixes in (("batch", True), ("group", False), ("none", False)):
        lm = built(NetConfig(arch="resnet8", norm=norm)).train()
        with torch.no_grad():
            assert torch.allclose(lm(x)[:3], lm(x[:3]), atol=1e-5) is not mixes
            lm.eval()
            torch.testing.assert_close(lm(x)[:3], lm(x[:3]), atol=1e-5, rtol=0)


def test_multiply_adds_of_the_cnn_by_hand():
    lm = built()
    by_hand = 16 * 9 * 1 * 8 + 4 * 9 * 8 * 16 + 64 * 64 + 64 * 10
    assert lm.macs_per_image() == by_hand == 10_496
    assert lm.training
    assert counted_parameters(lm) == (by_hand, by_hand)
    assert flops(*counted_parameters(lm), 100, 100) == 6 * by_hand * 100


def test_multiply_adds_of_the_vit_by_hand():
    t, h = 16, 64
    attention = 4 * t * h * h + 2 * t * t * h
    by_hand = t * 4 * h + 2 * (attention + 2 * t * h * 2 * h) + h * 10
    assert built(NetConfig(arch="vit")).macs_per_image() == by_hand


def test_what_an_evaluation_reads_is_counted_in_images():
    lm = built(NetConfig(arch="resnet8"))
    with metered(lm) as cost:
        score_answers(ImageModel(lm), pictures(7))
    assert cost()["forward_tokens"] == 7
    assert cost()["generated_tokens"] == 0


def test_divergence_between_classifiers():
    a, b = ImageModel(built()).eval(), ImageModel(built(seed=1)).eval()
    items = pictures(5)
    assert np.allclose(kl_divergence(a, a, items), 0, atol=1e-6)
    with torch.no_grad():
        p, q = (m.lm(images(5)).double().log_softmax(-1) for m in (b, a))
    np.testing.assert_allclose(kl_divergence(a, b, items), (p.exp() * (p - q)).sum(-1).numpy(), atol=1e-6)


def test_methods_on_hidden_states_take_a_classifier():
    items = SimpleNamespace(forget=pictures(4), retain=pictures(4), alt=None, idk=None, rl=None)
    model = ImageModel(built(NetConfig(arch="resnet8")))
    objective = make_objective(MethodConfig(name="rmu", layer=1), model, items, 0)
    assert objective.control_H is not None
    assert objective.control_H.shape == (16,)
    with pytest.raises(UserError, match=r"layer=2: the model has 3 layers.*choose 0 to 1"):
        resolve_objective(MethodConfig(name="rmu", layer=2), model.lm.config, items, 4)


def test_a_layer_is_a_block_in_the_config_too():
    assert built(NetConfig(arch="vit", layers=5, width=8, heads=2)).config.num_hidden_layers == 5
    assert built(NetConfig(arch="resnet14")).config.hidden_sizes == [8, 8, 16, 16, 32, 32]


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(8, 8, 2), (14, 14, 2), (28, 28, 4), (32, 32, 4), (64, 64, 8), (9, 7, 1), (8, 64, 2), (1, 1, 1)],
)
def test_patches(height, width, side):
    assert patch_side(height, width) == side
    lm = built(NetConfig(arch="vit", width=8, heads=1), (1, height, width))
    assert lm.stem.positions.shape[1] == height * width // side**2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pixels_come_in_the_models_own_type(dtype):
    lm = built(NetConfig(arch="vit")).to(dtype)
    assert lm(images(2)).dtype == dtype
    assert lm.macs_per_image() == built(NetConfig(arch="vit")).macs_per_image()


@pytest.mark.parametrize(
    ("net", "match"),
    [
        ({"arch": "cnn", "layers": 3}, "model.net.layers: only a vit has it, and this is a cnn"),
        ({"arch": "resnet8", "heads": 3}, "model.net.heads: only a vit has it"),
        ({"arch": "vit", "norm": "batch"}, "model.net.norm=batch: a vit has layer norms and no other"),
        ({"arch": "vit", "width": 10, "heads": 3}, "model.net.width=10 is no multiple of model.net.heads=3"),
    ],
)
def test_combinations_without_a_meaning(net, match):
    refused(match, built, NetConfig(**net))


@pytest.mark.parametrize("bad", [{"arch": "resnet50"}, {"norm": "layer"}, {"alpha": 0.0}, {"width": 0}])
def test_values_without_a_meaning(bad):
    with pytest.raises(ValidationError):
        NetConfig(**bad)


@pytest.mark.parametrize(("shape", "n_classes"), [((8, 8), 10), ((0, 8, 8), 10), (DIGITS, 1)])
def test_impossible_images(shape, n_classes):
    refused("at least 2 classes", built, NetConfig(), shape, n_classes)


def test_images_of_another_shape():
    refused("the images are 1x14x14, and the model was made for 1x8x8", built(), images(2, (1, 14, 14)))


def test_classes_have_to_fit():
    check_classes(built(), range(10), "m")
    refused("m: the model tells 10 classes apart, the data has 9", check_classes, built(), range(9), "m")


def test_neither_adapters_nor_gradient_checkpointing():
    refused("lora: ImageClassifier trains all its weights", add_lora, built(), LoraConfig())
    refused("gradient_checkpointing: ImageClassifier does not support it", checkpoint_activations, built())


@pytest.fixture
def saved(tmp_path):
    return save_model(tmp_path / "m", built(NetConfig(arch="resnet8", norm="batch")), CLASSES, {})


def rewrite(folder, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("head.weight"), r"1 weights are missing from the checkpoint \(first: head.weight\)"),
        (lambda t: t.pop("blocks.0.first.1.running_mean"), r"1 weights are missing.*running_mean"),
        (lambda t: t["head.bias"].fill_(math.nan), r"1 tensors hold NaN or inf \(first: head.bias\)"),
        (lambda t: t["stem.0.1.running_var"].fill_(math.inf), r"1 tensors hold NaN or inf.*running_var"),
        (lambda t: t.update({"head.bias": torch.zeros(3)}), "the weights do not fit the config"),
    ],
)
def test_damaged_weights(saved, change, match):
    rewrite(saved, change)
    refused(match, load_model, str(saved))


@pytest.mark.parametrize(
    "change",
    [{"arch": "resnet50"}, {"width": "wide"}, {"width": -1}, {"image_shape": [8, 8]}, {"arch": "vit", "layers": 1}],
)
def test_a_damaged_config(saved, change):
    edit_config(saved, **change)
    refused(f"{saved}: ", load_model, str(saved))


def test_models_of_the_other_sort_are_refused(tiny_lm, tiny_tokenizer):
    refused("m: is a language model, the data are images", check_vocabulary, tiny_lm, CLASSES, "m")
    refused("m: is a classifier, the data are text", check_vocabulary, built(), tiny_tokenizer, "m")
    check_vocabulary(built(), CLASSES, "m")


def test_pickles_and_code_are_refused(saved):
    torch.save(built().state_dict(), saved / "pytorch_model.bin")
    weights = saved / "model.safetensors"
    weights.rename(saved / "kept")
    refused("only pickle weights", load_model, str(saved))
    (saved / "kept").rename(weights)
    assert load_model(str(saved)) is not None
    edit_config(saved, auto_map={"AutoModel": "evil.Evil"})
    refused("auto_map", load_model, str(saved))
