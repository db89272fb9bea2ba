"""Damaged checkpoints, configs and saved states."""

from __future__ import annotations

import json
import random

import pytest
import torch
from checkpoint_cases import X_T, sampler_of
from fuzzing import ROUNDS, bounded, damaged_json, fuzz
from tiny_run import write_run

from ddpm_fast.states import read_state, write_state
from ddpm_fast.training.checkpoints import (
    FILES,
    STATE,
    Snapshot,
    load_model,
    newest_whole,
    read_checkpoint,
)
from ddpm_fast.training.config import ConfigError, RunConfig

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-00000200"


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_checkpoint(checkpoint, tmp_path):
    """A flipped bit of a tensor is seen: what is read at all is what was written."""
    whole = read_checkpoint(checkpoint)

    def check(found, name):
        assert isinstance(found, Snapshot)
        assert isinstance(found.config, RunConfig)
        assert type(found.step) is int
        assert type(found.samples) is int
        assert same(found.model, whole.model)
        assert found.averages.keys() == set(found.config.ema_rates)

    fuzz(checkpoint, tmp_path, read_checkpoint, 250, check=check)


def test_model_of_a_checkpoint(checkpoint, tmp_path):
    whole = load_model(checkpoint).model.state_dict()

    def check(found, name):
        assert type(found.step) is int
        assert found.class_names is None or all(type(n) is str for n in found.class_names)
        if name != STATE:
            assert same(found.model.state_dict(), whole)

    fuzz(checkpoint, tmp_path, load_model, 150, check=check)


def test_newest_checkpoint(checkpoint, tmp_path):
    """Of a run whose only one is damaged: none, and why; or one that can be read."""
    names = [f"step-00000200/{name}" for name in (*FILES, STATE)]

    def read(checkpoints):
        path, broken = newest_whole(checkpoints)
        if path is None:
            assert all(str(checkpoints) in why for why in broken.values())
        else:
            read_checkpoint(path)
        return None

    fuzz(checkpoint.parent, tmp_path, read, 150, files=names)


def test_config():
    config = RunConfig.from_json('{"data": {"path": "digits"}, "optimizer": {"clip_norm": null}}')
    for i in range(400 * ROUNDS):
        text = damaged_json(config.to_dict(), random.Random(i)).decode("utf-8", "replace")
        try:
            with bounded():
                found = RunConfig.from_json(text)
        except ConfigError:
            continue
        except Exception as error:
            raise AssertionError(f"round {i}: {type(error).__name__}: {text[:2000]}") from error
        assert RunConfig.from_json(found.to_json()) == found


def test_state(tmp_path):
    tensors = {"x": torch.arange(9.0).reshape(3, 3), "ids": torch.arange(4)}
    description = {"row": 3, "call": {"seed": "1", "deep": [[1, 2], {"a": None}]}}
    write_state(tmp_path / "whole", "test", description, tensors)

    def check(found, name):
        assert found[0] == description
        assert same(found[1], tensors)

    fuzz(tmp_path / "whole", tmp_path, lambda f: read_state(f, "test"), 250, check=check)


def test_session(tmp_path):
    def session():
        return sampler_of().session(X_T.shape[1:], max_batch=2)

    with session() as running:
        handles = [running.submit(seed=i) for i in range(3)]
        running.save(tmp_path / "whole")
        expected = [handle.result() for handle in handles]

    def read(folder):
        with session() as running:
            return [handle.result() for handle in running.restore(folder)]

    def check(found, name):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    fuzz(tmp_path / "whole", tmp_path, read, 60, check=check)


def test_resigned_state(tmp_path):
    """One whose digest fits what a person wrote into it: an error that names it all the same."""
    from ddpm_fast.states import _digest

    with sampler_of().session(X_T.shape[1:], max_batch=2) as running:
        running.submit(seed=1)
        running.save(tmp_path / "whole")
    (tmp_path / "whole" / "state.lock").unlink(missing_ok=True)

    def read(folder):
        path = folder / "state.json"
        try:
            values = json.loads(path.read_text())
            values["sha256"] = _digest({k: v for k, v in values.items() if k != "sha256"})
            path.write_text(json.dumps(values))
        except (OSError, ValueError, TypeError, RecursionError, AttributeError):
            return None
        with sampler_of().session(X_T.shape[1:], max_batch=2) as running:
            return [handle.result() for handle in running.restore(folder)]

    fuzz(tmp_path / "whole", tmp_path, read, 80, files=["state.json"])
