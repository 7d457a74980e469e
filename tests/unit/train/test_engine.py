"""Which engines are taken, and what of them is refused before anything is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from llm_unlearn.errors import UserError
from llm_unlearn.train.config import LoopConfig
from llm_unlearn.train.engine import ANNOUNCED, check_engine, engine_name, process_group, stage


def under(engine: DistributedType, zero: dict | None = None, **config) -> SimpleNamespace:
    """An accelerator of one process under an engine."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero or {"stage": 2}, **config})
    return SimpleNamespace(
        distributed_type=engine, num_processes=1, state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision="no"
    )


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *ANNOUNCED.values()):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "engine", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED]
)
def test_engines_that_are_taken(engine):
    check_engine(under(engine), LoopConfig())


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_stages_by_name(zero):
    accelerator = under(DistributedType.DEEPSPEED, {"stage": zero})
    assert (stage(accelerator), engine_name(accelerator)) == (zero, f"ZeRO-{zero}")
    assert (stage(under(DistributedType.MULTI_GPU)), engine_name(under(DistributedType.NO))) == (0, "NO")


@pytest.mark.parametrize(
    ("asked", "got", "said"),
    [
        ("DEEPSPEED", DistributedType.MULTI_CPU, "MULTI_CPU and not DEEPSPEED; start it without ACCELERATE_USE_CPU"),
        ("FSDP", DistributedType.MULTI_CPU, "ACCELERATE_USE_FSDP, but Accelerate chose MULTI_CPU and not FSDP"),
        ("FSDP", DistributedType.NO, "chose NO and not FSDP; it needs GPUs"),
    ],
)
def test_another_engine_than_the_one_announced_is_refused(monkeypatch, asked, got, said):
    monkeypatch.setenv(ANNOUNCED[asked], "true")
    with pytest.raises(UserError, match=said) as caught:
        check_engine(under(got), LoopConfig())
    assert "\n" not in str(caught.value)


def test_the_engine_announced_is_taken(monkeypatch):
    monkeypatch.setenv(ANNOUNCED["DEEPSPEED"], "true")
    check_engine(under(DistributedType.DEEPSPEED), LoopConfig())


@pytest.mark.parametrize(
    ("zero", "config", "loop", "said"),
    [
        ({"stage": 0}, {}, {}, "stage=0 divides nothing; choose 1, 2 or 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, {}, "offload_optimizer has not been tested"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, {}, "offload_param has not been tested"),
        ({"stage": 2}, {"fp16": {"enabled": True}}, {}, "fp16 has not been tested under DeepSpeed; choose bf16 or no"),
        ({"stage": 2}, {}, {"precision": "fp16"}, "fp16 has not been tested under DeepSpeed"),
        ({"stage": 2}, {"optimizer": {"type": "Adam"}}, {}, "has its own optimizer.*remove it there"),
        ({"stage": 2}, {"scheduler": {"type": "WarmupLR"}}, {}, "has its own scheduler"),
    ],
)
def test_configs_of_deepspeed_that_are_refused(zero, config, loop, said):
    with pytest.raises(UserError, match=said) as caught:
        check_engine(under(DistributedType.DEEPSPEED, zero, **config), LoopConfig(**loop))
    assert "\n" not in str(caught.value)


def test_no_offload_is_no_offload():
    zero = {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": None}
    check_engine(under(DistributedType.DEEPSPEED, zero), LoopConfig())


@pytest.mark.parametrize(("launched", "cuda", "told"), [(True, False, 1), (False, False, 0), (True, True, 0)])
def test_deepspeed_on_cpus_is_told_of_gloo(monkeypatch, launched, cuda, told):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    loop = LoopConfig(timeout_s=77)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    assert "backend" not in process_group(loop).to_kwargs()
    monkeypatch.setenv(ANNOUNCED["DEEPSPEED"], "true")
    given = process_group(loop).to_kwargs()
    assert given.get("backend") == ("gloo" if told else None)
    assert given["timeout"].total_seconds() == 77
