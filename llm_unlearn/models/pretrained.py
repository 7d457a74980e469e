"""Models by name, by path or by run: `HuggingFaceTB/SmolLM2-135M`, `some/folder`, `runs/world40@grok`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from llm_unlearn.config import Config, digest
from llm_unlearn.data.images import CLASSES_FILE, Classes
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.files import read_bytes, sha256_file
from llm_unlearn.log import get_logger
from llm_unlearn.models.adapter import base_of, is_adapter, merge_adapter
from llm_unlearn.models.image_model import MODEL_TYPE, ImageClassifier, build_classifier, check_classes
from llm_unlearn.models.image_nets import NetConfig
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.models.tiny import SIZES, TinyConfig, build_tiny

log = get_logger(__name__)

DType = Literal["float32", "bfloat16", "float16"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
MAX_JSON = 100_000_000  # bytes of a config, an index or a manifest


class ModelConfig(Config):
    """The model a run starts from: a size trained from scratch, or a pretrained one."""

    size: str = Field(default="world", description="From-scratch Llama-style size (llm-unlearn ls sizes).")
    shape: TinyConfig | None = Field(default=None, description="From-scratch shape in place of a named size.")
    net: NetConfig | None = Field(default=None, description="Image classifier, for data of images; null: a small CNN.")
    name: str | None = Field(
        default=None, description="Hugging Face name, folder or run@kind to start from; wins over size."
    )
    alpha: float = Field(
        default=1.0,
        gt=0,
        description="Texts, from scratch: all initial weights times this, gains of norms included; images: net.alpha.",
    )
    dtype: DType = Field(default="float32", description="Type the weights are held in.")
    lora: LoraConfig | None = Field(default=None, description="Train LoRA adapters and leave the weights as they are.")


def build_model(config: ModelConfig, tokenizer: Any, seed: int) -> Any:
    """Return the model a run trains: seeded random weights of a size times `config.alpha` (Liu et al. 2022,
    arXiv:2210.01117), a classifier where the tokenizer is of classes, or `config.name` loaded, with adapters if asked
    for.
    """
    if config.net is not None and not isinstance(tokenizer, Classes):
        raise UserError("model.net: is for images; set data.kind (digits, ...), or leave it out")
    if config.name is not None:
        _refuse_alpha(config)
        lm = load_model(config.name, config.dtype, to_train=True)
        check_vocabulary(lm, tokenizer, config.name)
    elif isinstance(tokenizer, Classes):
        if config.alpha != 1.0:
            raise UserError("model.alpha has no effect on images; set model.net.alpha")
        lm = build_classifier(config.net or NetConfig(), tokenizer.shape, len(tokenizer), seed)
    else:
        if config.shape is None and config.size not in SIZES:
            raise UserError(f"unknown model size '{config.size}' in model.size{suggest(config.size, SIZES)}")
        torch.manual_seed(seed)
        lm = build_tiny(
            config.shape or SIZES[config.size], len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
        )
        with torch.no_grad():
            for weight in lm.parameters():
                weight.mul_(config.alpha)
        lm = lm.to(getattr(torch, config.dtype))
    return add_lora(lm, config.lora) if config.lora else lm


def skeleton(config: ModelConfig, tokenizer: Any) -> Any:
    """Return the model `build_model` would, without weights: every tensor is on torch's meta device.

    Raises UserError as `build_model` does, as far as that can be told without reading weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        if config.name is None:
            return build_model(config, tokenizer, 0)
        _refuse_alpha(config)
        name = locate(config.name)
        while is_adapter(Path(name)):
            name = locate(base_of(Path(name)))
        _refuse_unsafe(name)
        try:
            known = AutoConfig.from_pretrained(name, trust_remote_code=False)
            lm = AutoModelForCausalLM.from_config(known, dtype=getattr(torch, config.dtype), trust_remote_code=False)
        except Exception as error:
            raise UserError(_load_problem(name, error)) from error
        check_vocabulary(lm, tokenizer, config.name)
        return add_lora(lm, config.lora) if config.lora else lm


def _refuse_alpha(config: ModelConfig) -> None:
    if config.alpha != 1.0:
        raise UserError(f"model.alpha has no effect on the pretrained weights of {config.name}; remove it")


def split_reference(reference: str) -> tuple[str, str | None]:
    """Return (run, kind) of `run@kind`; (reference, None) for a folder or a hub name.

    The last @ divides, and only if no folder follows it: `/data/a@b/run` is a folder.
    """
    run, at, kind = reference.rpartition("@")
    return (run, kind) if at and "/" not in kind else (reference, None)


def absolute_reference(reference: str) -> str:
    """Return a reference to something on this disk as an absolute one, `@kind` kept; hub names stay as they are."""
    run, kind = split_reference(reference)
    if not Path(run).exists():
        return reference
    return os.path.abspath(run) + ("" if kind is None else f"@{kind}")


def fingerprint(reference: str) -> str:
    """Return what changes when a model changes in place: the sha256 of its manifest or, without one, of its weights.

    A hub name stands for itself: its revision is the hub's business.
    """
    folder = Path(locate(reference))
    if not folder.is_dir():
        return str(folder)
    if (folder / "manifest.json").is_file():
        return sha256_file(folder / "manifest.json")
    own = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return digest({**own, "base": fingerprint(base_of(folder))} if is_adapter(folder) else own)


def locate(reference: str) -> str:
    """Return the folder `run@kind` stands for, the folder itself (of a run with one outcome: its `final`), or a hub
    name unchanged.

    Raises UserError naming the kinds a run has when it lacks the one asked for.
    """
    path, kind = split_reference(reference)
    if kind is None:
        if (Path(reference) / "final" / "config.json").exists():
            return str(Path(reference) / "final")
        if Path(reference).exists() and not _is_model(Path(reference)):
            raise UserError(f"{reference}: no model there (no config.json); {_kinds_hint(Path(reference))}")
        return reference
    folder = Path(path) / kind
    if not _is_model(folder):
        if not Path(path).exists():
            raise UserError(f"{path}: no such run; train it first (recipes/train_grok.py out={path})")
        raise UserError(f"{reference}: this run has no checkpoint '{kind}'; {_kinds_hint(Path(path))}")
    return str(folder)


def load_model(reference: str, dtype: DType = "float32", *, to_train: bool = False) -> Any:
    """Load a causal LM, or a classifier of ours; a folder that holds a LoRA adapter is loaded as its base with the
    adapter merged.

    Raises UserError (one line) for what is not there, not complete, or not safe to load, for an adapter that does not
    fit its base or was trained on another one, and for quantised weights `to_train`.
    """
    name = locate(reference)
    if is_adapter(Path(name)):
        return _load_adapter(Path(name), dtype)
    path = Path(name) / "config.json"
    if to_train and path.is_file():  # before it is loaded, for which a library might be missing
        _refuse_quantised(name, _read_json(path))
    if model_type(name) == MODEL_TYPE:
        return load_checked(ImageClassifier, name, dtype)
    from transformers import AutoModelForCausalLM

    lm = load_checked(AutoModelForCausalLM, name, dtype)
    if to_train:
        _refuse_quantised(name, lm.config.to_dict())
    return lm


def _refuse_quantised(name: str, config: Mapping[str, Any]) -> None:
    if given := config.get("quantization_config"):
        how = given.get("quant_method", "unknown method")
        raise UserError(f"{name}: its weights are quantised ({how}), which cannot be trained; give the full ones")


def load_checked(loader: Any, name: str, dtype: DType) -> Any:
    """Return what a transformers class loads from a folder or hub name: safetensors only, no code of the model's own.

    Raises UserError (one line) for weights that are missing, of another shape, or not finite.
    """
    from transformers.utils import logging as transformers_log

    _refuse_unsafe(name)
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        loaded: Any = loader.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(_load_problem(name, error)) from error
    lm, info = loaded
    if getattr(lm, "peft_config", None):  # transformers puts adapters on unasked, and would save nothing but them
        raise UserError(
            f"{name}: comes with an adapter; give a folder that holds the adapter alone, or the model alone"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{name}: {len(missing)} weights are missing from the checkpoint (first: {missing[0]}); it would run with "
            "random ones"
        )
    if extra := sorted(info["unexpected_keys"]):
        log.warning("%s: %d weights are none of this model's and were left out (first: %s)", name, len(extra), extra[0])
    bad = [
        key
        for key, tensor in lm.state_dict().items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise UserError(f"{name}: {len(bad)} tensors hold NaN or inf (first: {bad[0]}); the checkpoint is broken")
    return lm


def _load_adapter(folder: Path, dtype: DType) -> Any:
    base = base_of(folder)
    if read_origin(str(folder)).get("base") not in (None, fingerprint(base)):
        raise UserError(
            f"{folder}: was trained on another model than {base} is now; put that one back, or train it again"
        )
    lm = merge_adapter(load_model(base, dtype), folder)
    lm.name_or_path = str(folder)  # adapters trained on it belong on this, not on its base
    return lm.requires_grad_(True)  # peft froze the base it was put on


def model_type(reference: str) -> str | None:
    """Return the model_type in the config.json of a folder or `run@kind`; None where there is none to read."""
    path = Path(locate(reference)) / "config.json"
    return _read_json(path).get("model_type") if path.is_file() else None


def load_tokenizer(reference: str) -> Any:
    """Load the tokenizer, or the classes, beside a model; one without a pad token pads with its end token (pads are
    never read).
    """
    from transformers import AutoTokenizer

    name = locate(reference)
    if is_adapter(Path(name)) and not _has_tokenizer(Path(name)):
        name = base_of(Path(name))
    if (Path(name) / CLASSES_FILE).is_file():
        return Classes.load(Path(name))
    if Path(name).is_dir() and not _has_tokenizer(Path(name)):
        raise UserError(f"{name}: has no tokenizer; put the model's tokenizer.json and tokenizer_config.json there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(_load_problem(name, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_origin(reference: str) -> dict[str, Any]:
    """Return what a model folder of ours says of its own making (run, kind, step, data, request); {} for any other
    model.
    """
    path = Path(locate(reference)) / "manifest.json"
    if not path.exists():
        return {}
    return _read_json(path).get("meta", {})


def check_vocabulary(lm: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that has ids, or classes, the model does not know."""
    if isinstance(tokenizer, Classes) != isinstance(lm, ImageClassifier):
        what, data = ("a language model", "images") if isinstance(tokenizer, Classes) else ("a classifier", "text")
        raise UserError(f"{name}: is {what}, the data are {data}; give the data it was trained on")
    if isinstance(tokenizer, Classes):
        check_classes(lm, tokenizer, name)
        return
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} ids, the model {rows}; use the model's own tokenizer and data"
        )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in TOKENIZER_FILES)


def _kinds_hint(run: Path) -> str:
    have = sorted(p.parent.name for p in run.glob("*/config.json"))
    return f"it has {', '.join(f'{run}@{kind}' for kind in have)}" if have else "it has no finished checkpoint yet"


def _refuse_unsafe(name: str) -> None:
    folder = Path(name)
    if not folder.is_dir():
        return
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(f"{name}: only pickle weights (*.bin), which can run code; convert them to safetensors")
    if "auto_map" in _read_json(folder / "config.json"):
        raise UserError(
            f"{name}: needs code of its own (auto_map), which is never run; choose a model transformers knows"
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index}: has no weight_map; copy the model again")
        for shard in {str(shard) for shard in shards.values()}:
            if Path(shard).name != shard:
                raise UserError(f"{index}: shard path '{shard}' leaves the model's folder; refused")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path, limit=MAX_JSON))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object; the folder is damaged, copy the model again")
    return content


def _load_problem(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "size mismatch" in text or "mismatched" in text.lower():
        return (
            f"{name}: the weights do not fit the config ({text[:160]}); the checkpoint has another vocabulary or shape"
        )
    if not Path(name).exists():
        offline = " and HF_HUB_OFFLINE=1" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        return (
            f"model '{name}' is no folder here, and not to be had from the hub{offline} (cache looked at too); "
            "give a folder, or run online once"
        )
    return f"{name}: cannot be loaded: {text[:200]}"
