"""The background thread and Weights & Biases by themselves; `report_test.py` drives them through a whole run."""

import importlib.util

import pytest

from aether.errors import InputError
from aether.train.boards import Background, check_wandb


@pytest.mark.parametrize(("name", "attempts"), [("TensorBoard", 1), ("W&B", 1), ("upload", 3)])
def test_jobs_run_in_order_and_only_boards_are_given_up(name, attempts):
    warnings, done = [], []
    background = Background(warnings.append)

    def fail(i):
        done.append(i)
        raise OSError("gone")

    for i in range(3):
        background.put(name, lambda i=i: fail(i))
        background.put("curves.png", lambda i=i: done.append(10 + i))
    background.stop()
    assert not background.is_alive()
    assert done == [i for step in range(3) for i in ([step] if step < attempts else []) + [10 + step]]
    assert warnings == [f"warning: {name} failed, training goes on without it: OSError: gone"] * attempts


def test_wandb_is_asked_for_only_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb("")
    with pytest.raises(InputError, match=r'train\.wandb is \'p\' .*pip install "aether\[wandb\]"'):
        check_wandb("p")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_wandb("p")
