"""Saved to files and read back, every method continues bit for bit at every ZeRO stage, and to rounding on other ranks and stages."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ngpt.checkpoint.store import CheckpointStore
from ngpt.dist.collectives import Collectives
from ngpt.engine.zero_sharding import ShardedUpdates, ZeroSharding
from ngpt.optim.per_layer_hook import attach
from ngpt.optim.sharding import WHOLE


def _load_methods() -> ModuleType:
    """The methods and the network of tests/engine/test_zero_sharding.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("zero_sharding_tests", Path(__file__).with_name("test_zero_sharding.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["zero_sharding_tests"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


methods: Any = sys.modules.get("zero_sharding_tests") or _load_methods()
METHODS, SEVERAL, ROWS, STEPS = methods.METHODS, methods.SEVERAL, methods.ROWS, methods.STEPS
BEFORE_A_REFRESH, AFTER_ONE = 3, 4  # updates done; subspaces are found anew in every third one, from the first on


class Training:
    """Model and optimizer on this rank, at a ZeRO stage; on one rank the stage None shares out nothing."""

    def __init__(self, method: str, stage: int | None, *, dtype: str = "float32", apply: str = "deferred", seed: int = 0, **options: Any):
        self.ranks = Collectives()
        self.stage = stage
        self.model = methods.Network(getattr(torch, dtype))
        if seed:  # what a new process starts from is not what was saved
            with torch.no_grad():
                for p in self.model.parameters():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
        self.slices = methods.Slices(self.model, self.ranks) if stage == 3 else None
        sharding = WHOLE if stage is None else ZeroSharding(self.ranks, stage=stage, weights=self.slices)
        self.optimizer = methods.optimizer_of(self.model, method, sharding, **options)
        self.updates: Any = (
            attach(self.optimizer, apply)
            if stage is None
            else ShardedUpdates(self.optimizer, self.model.parameters(), self.ranks, apply=apply)
        )

    def train(self, steps: range, *, micro_batches: int = 1, clip: float = 0.0) -> list[float]:
        """Losses and gradient norms of the updates, in turn."""
        seen: list[float] = []
        for step in steps:
            self.updates.begin_update(micro_batches)
            total = torch.zeros(())
            for rows in methods.batch(step).chunk(micro_batches):
                self.updates.begin_micro_batch()
                loss = self.model(rows.chunk(self.ranks.size)[self.ranks.rank], skip=step == 4) / (ROWS * 5)
                loss.backward()
                if self.stage is not None:
                    self.updates.end_micro_batch()
                total += loss.detach()
            if self.stage is None:
                loss, norm = float(total), float(self.updates.norm())
            else:
                loss, _, norm, _ = self.updates.scalars(total).tolist()
            if 0 < clip < norm:
                self.updates.scale_(clip / norm)
            self.updates.step()
            if self.slices is not None:
                self.slices.gather()
            seen += [loss, norm]
        return seen

    def save(self, folder: Path, step: int) -> None:
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        CheckpointStore(folder, keep=99, collectives=self.ranks).save(
            step,
            weights=iter(weights.items()),
            layout={name: (p.dtype, p.shape) for name, p in weights.items()},
            optimizer=self.optimizer.state_parts(),
            random={"torch": torch.zeros(1)},
            state={},
        )

    def load(self, folder: Path, step: int) -> None:
        store = CheckpointStore(folder, keep=99, collectives=self.ranks)
        checkpoint = store.open(folder / f"step-{step:07d}")

        def read(file: Any) -> None:
            for name, p in self.model.named_parameters():
                p.data.copy_(file.read(name))
                if self.slices is not None:
                    own = self.slices.flat(p)
                    share = -(-p.numel() // self.ranks.size)
                    own.copy_(p.detach().reshape(-1)[self.ranks.rank * share : self.ranks.rank * share + own.numel()])

        store.read_weights(checkpoint, read)
        store.read_optimizer(checkpoint, self.optimizer.state_parts())

    def everything(self) -> dict[str, torch.Tensor]:
        """Every bit of weights and of this rank's state."""
        state = {name: part.values for name, part in self.optimizer.state_parts().items()}
        return {**{name: p.detach() for name, p in self.model.named_parameters()}, **state}


def save_and_resume(
    method: str, saves_at_stage: dict[int, list[int]], folder: Path, steps: dict[str, Any], built: dict[str, Any]
) -> list[str]:
    """What differs between a run and those that continue from its files; nothing, if all is well."""
    wrong = []
    for stage, saves in saves_at_stage.items():
        straight = Training(method, stage, **built)
        seen = []
        for step in range(STEPS):
            if step in saves:
                straight.save(folder / str(stage), step)
            seen.append(straight.train(range(step, step + 1), **steps))
        for step in saves:
            resumed = Training(method, stage, seed=1, **built)
            resumed.load(folder / str(stage), step)
            if resumed.train(range(step, STEPS), **steps) != list(itertools.chain(*seen[step:])):
                wrong.append(f"stage {stage}, resumed after {step}: losses or norms")
            ours, theirs = resumed.everything(), straight.everything()
            wrong += [f"stage {stage}, resumed after {step}: {name}" for name in theirs if not torch.equal(ours[name], theirs[name])]
    return wrong


def train_and_save(method: str, stage: int | None, step: int, folder: Path) -> None:
    training = Training(method, stage)
    training.train(range(step))
    training.save(folder, step)


def load_and_train(method: str, stages: list[int | None], step: int, folder: Path) -> list[list[float]]:
    seen = []
    for stage in stages:
        training = Training(method, stage, seed=1)
        training.load(folder, step)
        seen.append(training.train(range(step, STEPS)))
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bit_for_bit_at_every_stage(on_ranks: Callable[..., Any], tmp_path: Path, method: str) -> None:
    steps = {"micro_batches": 2, "clip": 0.5}
    saves = {0: [BEFORE_A_REFRESH], 1: [AFTER_ONE], 2: [AFTER_ONE], 3: [BEFORE_A_REFRESH]}
    for wrong in on_ranks(2, save_and_resume, method, saves, tmp_path, steps, {}):
        assert wrong == []


@pytest.mark.parametrize("method", SEVERAL)
def test_immediate_updates_resume_bit_for_bit(on_ranks: Callable[..., Any], tmp_path: Path, method: str) -> None:
    for wrong in on_ranks(2, save_and_resume, method, {1: [AFTER_ONE], 3: [BEFORE_A_REFRESH]}, tmp_path, {}, {"apply": "immediate"}):
        assert wrong == []


@pytest.mark.parametrize(("stage", "rounding"), [(0, "nearest"), (1, "stochastic"), (2, "master"), (3, "stochastic"), (3, "master")])
@pytest.mark.parametrize("method", ["adamw", "galore", "natural, diagonal", "natural, history"])
def test_bf16_weights_resume_bit_for_bit(on_ranks: Callable[..., Any], tmp_path: Path, method: str, stage: int, rounding: str) -> None:
    built = {"dtype": "bfloat16", "rounding": rounding}
    for wrong in on_ranks(2, save_and_resume, method, {stage: [BEFORE_A_REFRESH]}, tmp_path, {}, built):
        assert wrong == []


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
@pytest.mark.parametrize("method", ["adamw", "galore", "natural, diagonal"])
def test_moments_in_fewer_bits_resume_bit_for_bit(on_ranks: Callable[..., Any], tmp_path: Path, method: str, state_dtype: str) -> None:
    for wrong in on_ranks(2, save_and_resume, method, {1: [AFTER_ONE], 3: [AFTER_ONE]}, tmp_path, {}, {"state_dtype": state_dtype}):
        assert wrong == []


@pytest.mark.parametrize("method", SEVERAL)
def test_another_number_of_ranks_and_another_stage_continue_to_rounding(on_ranks: Callable[..., Any], tmp_path: Path, method: str) -> None:
    (alone,) = on_ranks(1, load_nothing_and_train, method)
    expected = torch.tensor(alone[2 * BEFORE_A_REFRESH :])
    on_ranks(2, train_and_save, method, 3, BEFORE_A_REFRESH, tmp_path / "two")
    on_ranks(1, train_and_save, method, None, BEFORE_A_REFRESH, tmp_path / "one")
    for ranks, stages, folder in ((1, [None], "two"), (3, [1, 3], "two"), (2, [0, 2], "one")):
        for by_stage in on_ranks(ranks, load_and_train, method, stages, BEFORE_A_REFRESH, tmp_path / folder):
            for stage, seen in zip(stages, by_stage, strict=True):
                where = f"saved in {folder}, resumed at stage {stage} on {ranks} ranks"
                torch.testing.assert_close(torch.tensor(seen), expected, rtol=2e-4, atol=0, msg=where)
                torch.testing.assert_close(torch.tensor(seen[::2]), expected[::2], rtol=2e-6, atol=0, msg=f"losses, {where}")


def load_nothing_and_train(method: str) -> list[float]:
    return Training(method, None).train(range(STEPS))
