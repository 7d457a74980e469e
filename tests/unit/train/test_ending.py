"""Work that a signal ends between its parts, or after the last where processes need each other for every part."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llm_unlearn import interrupt
from llm_unlearn.errors import Interrupted
from llm_unlearn.train.ending import Ending


@pytest.mark.parametrize(("in_step", "parts"), [(False, 1), (True, 3)])
def test_work_is_broken_off_unless_processes_make_its_parts_together(monkeypatch, in_step, parts):
    ending = Ending(SimpleNamespace(num_processes=1), in_step=in_step)
    done = []

    def work() -> None:
        with ending.interruptible():
            for part in range(3):
                interrupt.end_if_asked()
                done.append(part)
                monkeypatch.setattr(interrupt, "_seen", 15)

    with pytest.raises(Interrupted) as caught:
        work()
    assert caught.value.code == 143
    assert len(done) == parts
    monkeypatch.setattr(interrupt, "_seen", 0)
    with ending.interruptible():
        interrupt.end_if_asked()
