"""Which engines are taken, and what of them is refused before anything is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from llm_unlearn.errors import UserError
from llm_unlearn.train.config import LoopConfig
from llm_unlearn.train.engine import ZERO_ANNOUNCED, check_engine, divided, engine_name, in_step, process_group
from llm_unlearn.train.fsdp import ANNOUNCED
from llm_unlearn.train.zero import stage


def under(engine: DistributedType, zero: dict | None = None, **config) -> SimpleNamespace:
    """An accelerator of one process under an engine."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero or {"stage": 2}, **config})
    return SimpleNamespace(
        distributed_type=engine, num_processes=1, state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision="no"
    )


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", ZERO_ANNOUNCED, ANNOUNCED):
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
    assert divided(accelerator)
    assert in_step(accelerator) == (zero == 3)
    alone = under(DistributedType.NO)
    assert (stage(alone), divided(alone), in_step(alone), engine_name(alone)) == (0, False, False, "NO")


@pytest.mark.parametrize("engine", [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_fsdp2_is_what_the_launcher_announced_whatever_accelerate_joined(monkeypatch, engine):
    monkeypatch.setenv(ANNOUNCED, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    accelerator = under(engine)
    check_engine(accelerator, LoopConfig())
    assert (divided(accelerator), in_step(accelerator), engine_name(accelerator)) == (True, True, "FSDP2")


@pytest.mark.parametrize(
    ("asked", "got", "said"),
    [
        (ZERO_ANNOUNCED, DistributedType.MULTI_CPU, "MULTI_CPU and not DEEPSPEED; start it without ACCELERATE_USE_CPU"),
        (ANNOUNCED, DistributedType.NO, "ACCELERATE_USE_FSDP, but Accelerate chose NO, which joins no processes"),
    ],
)
def test_another_engine_than_the_one_announced_is_refused(monkeypatch, asked, got, said):
    monkeypatch.setenv(asked, "true")
    with pytest.raises(UserError, match=said) as caught:
        check_engine(under(got), LoopConfig())
    assert "\n" not in str(caught.value)


def test_the_engine_announced_is_taken(monkeypatch):
    monkeypatch.setenv(ZERO_ANNOUNCED, "true")
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
    monkeypatch.setenv(ZERO_ANNOUNCED, "true")
    given = process_group(loop).to_kwargs()
    assert given.get("backend") == ("gloo" if told else None)
    assert given["timeout"].total_seconds() == 77
