"""Statistics of watched updates: what plain formulas give, however gradients are kept, on one process and on several."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ngpt.config.schema import ModelConfig
from ngpt.dist.collectives import Collectives
from ngpt.engine.deepspeed_config import deepspeed_config
from ngpt.engine.local import LocalEngine
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import AdamW, AdaRankGrad, GaLore, NaturalGaLore, low_rank_groups
from ngpt.optim.projection import short_side_first
from ngpt.optim.sharding import WHOLE, Sharding
from ngpt.optim.watch import Watch

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_seq_len": 16}
STEPS, GAP = 4, 2
Statistics = dict[str, dict[str, float]]


def optimizer_of(kind: str, model: nn.Module, sharding: Sharding = WHOLE) -> AdamW:
    if kind == "adamw":
        return AdamW(model.named_parameters(), lr=0.01, sharding=sharding)
    groups = low_rank_groups(model, rank=4, update_proj_gap=GAP, shape_of=sharding.shape)
    settings = {"lr": 0.01, "weight_decay": 0.1, "stagger": False, "sharding": sharding}
    if kind == "adaptive":
        return AdaRankGrad(groups, energy=0.6, **settings)
    if kind == "natural":
        return NaturalGaLore(groups, fisher="diagonal", **settings)
    return GaLore(groups, **settings, **({"subspace": "random", "on_refresh": "reset"} if kind == "galore, random" else {}))


def model_of() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(ModelConfig(**SHAPE, tie_word_embeddings=True))


def local(kind: str, apply: str, *, clip: float = 0.0, dtype: torch.dtype = torch.float32) -> LocalEngine:
    return LocalEngine(model_of, functools.partial(optimizer_of, kind), device=CPU, dtype=dtype, apply=apply, grad_clip=clip)


def rows(step: int) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (8, 9), generator=torch.Generator().manual_seed(step))


def update(engine: Any, step: int, *, parts: int = 1, rank: int = 0, ranks: int = 1, watched: bool = True) -> Statistics | None:
    engine.begin_update(lr_multiplier=1.0 / (step + 1), loss_divisor=64.0, num_micro_batches=parts, watched=watched)
    loss = torch.zeros(())
    for own in rows(step).chunk(ranks)[rank].chunk(parts):
        loss += engine.accumulate({"input_ids": own[:, :-1], "labels": own[:, 1:]})
    return engine.finish_update(loss / 64.0).statistics


def of_all_steps(engine: Any, **options: Any) -> list[Statistics]:
    found = [update(engine, step, **options) for step in range(STEPS)]
    engine.close()
    return found


def clip_of(apply: str) -> float:
    return 0.0 if apply == "immediate" else 0.05


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def gradients(engine: LocalEngine, step: int, part: slice = slice(None)) -> dict[str, Tensor]:
    """Of the mean loss on some rows of a batch, with the weights that the engine has now, by a model of its own."""
    model = model_of()
    model.load_state_dict(dict(engine.model.state_dict()))
    own = rows(step)[part]
    (model(input_ids=own[:, :-1], labels=own[:, 1:]) / 64.0).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def bases(engine: LocalEngine) -> dict[str, Tensor]:
    optimizer, found = engine.optimizer, {}
    for name, p in engine.model.named_parameters():
        state = optimizer.state[p]
        if "basis" in state and int(state["refreshes"]):
            found[name] = state["basis"][:, : int(state["rank"]) if "rank" in state else None].double().clone()
    return found


def assert_close(found: list[Statistics], wanted: list[Statistics]) -> None:
    for step, (own, other) in enumerate(zip(found, wanted, strict=True)):
        assert own.keys() == other.keys()
        for name in own:
            assert own[name] == pytest.approx(other[name], rel=1e-3), f"step {step}, {name}"


# --------------------------------------------------------------------------------------------------- against plain formulas
@pytest.mark.parametrize("kind", ["adamw", "galore", "natural", "adaptive"])
@pytest.mark.parametrize("apply", ["whole", "deferred", "immediate"])
def test_figures_of_one_backward_pass_are_those_of_plain_formulas(kind, apply):
    engine = local(kind, apply, clip=clip_of(apply))  # what is clipped is reported as it was before
    overlaps: dict[str, float] = {}
    for step in range(STEPS):
        grads = gradients(engine, step)
        weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        old = bases(engine)
        statistics = update(engine, step)
        assert statistics is not None
        assert statistics.keys() == grads.keys()
        new = bases(engine)
        for name, p in engine.model.named_parameters():
            wanted = {"gradient_rms": rms(grads[name]), "update_rms": rms(p - weights[name]), "weight_rms": rms(p)}
            if name in new:
                grad, basis = short_side_first(grads[name]).double(), new[name]
                low = basis.T @ grad
                wanted |= {"rank": basis.shape[1], "captured_energy": float(low.square().sum() / grad.square().sum())}
                wanted["projected_gradient_rms"] = float(low.square().sum() / p.numel()) ** 0.5
                if name in old and not torch.equal(old[name], basis):
                    overlaps[name] = float((basis.T @ old[name]).square().sum() / basis.shape[1])
                if name in overlaps:
                    wanted["overlap"] = overlaps[name]
            assert statistics[name] == pytest.approx(wanted, rel=2e-4, abs=1e-12), f"step {step}, {name}"
    assert (len(overlaps) > 0) == (kind != "adamw")


@pytest.mark.parametrize("kind", ["galore", "natural"])
def test_figures_of_several_backward_passes_are_what_can_be_known_of_them(kind):
    engine = local(kind, "deferred")
    for step in range(STEPS):
        terms = [gradients(engine, step, part) for part in (slice(0, 4), slice(4, 8))]
        statistics = update(engine, step, parts=2)
        assert statistics is not None
        for name, basis in bases(engine).items():
            own = [short_side_first(term[name]).double() for term in terms]
            total, low = sum(own), [basis.T @ grad for grad in own]
            known = statistics[name]
            assert known["projected_gradient_rms"] == pytest.approx(
                rms(basis.T @ total) * (basis.shape[1] / total.shape[0]) ** 0.5, rel=1e-4
            )
            if kind == "natural":
                assert known["gradient_rms"] == pytest.approx(rms(total), rel=1e-4)
                energies = (basis.T @ total).square().sum() / total.square().sum()
            else:  # their full sum has never been there
                assert "gradient_rms" not in known
                energies = sum(each.square().sum() for each in low) / sum(each.square().sum() for each in own)
            assert known["captured_energy"] == pytest.approx(float(energies), rel=1e-4)
        embedding = "model.embed_tokens.weight"
        assert statistics[embedding]["gradient_rms"] == pytest.approx(rms(terms[0][embedding] + terms[1][embedding]), rel=1e-4)


def test_the_change_of_a_rounded_weight_is_the_one_that_was_stored():
    engine = local("natural", "deferred", dtype=torch.bfloat16)
    for step in range(2):
        weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        statistics = update(engine, step)
        assert statistics is not None
        for name, p in engine.model.named_parameters():
            assert statistics[name]["update_rms"] == pytest.approx(rms(p.float() - weights[name].float()), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- side effects
@pytest.mark.parametrize(
    ("kind", "apply", "dtype"),
    [
        ("adamw", "whole", torch.float32),
        ("adamw", "whole", torch.bfloat16),
        ("galore", "deferred", torch.bfloat16),
        ("natural", "deferred", torch.float32),
        ("natural", "immediate", torch.bfloat16),
    ],
)
def test_watching_changes_no_bit_of_the_training(kind, apply, dtype):
    watched, alone = local(kind, apply, dtype=dtype), local(kind, apply, dtype=dtype)
    for step in range(3):
        update(watched, step, watched=step != 1)
        update(alone, step, watched=False)
    for own, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_an_update_that_nobody_watches_reports_nothing_but_refreshes(monkeypatch):
    told: list[str] = []
    for name in ("projected", "updated", "turned"):
        monkeypatch.setattr(Watch, name, lambda self, *_, name=name, **__: told.append(name))
    for apply in ("whole", "deferred", "immediate"):
        engine = local("galore", apply)
        engine.watch_refreshes()
        assert [update(engine, step, watched=False) for step in range(STEPS)] == [None] * STEPS
    assert set(told) == {"turned"}


def test_an_update_that_was_dropped_has_no_statistics_and_leaves_none_to_the_next():
    engine = local("galore", "deferred")
    update(engine, 0)
    engine.begin_update(lr_multiplier=1.0, loss_divisor=64.0, num_micro_batches=1, watched=True)
    engine.accumulate({"input_ids": rows(1)[:, :-1], "labels": rows(1)[:, 1:]})
    outcome = engine.finish_update(torch.tensor(float("nan")))
    assert not outcome.applied
    assert not outcome.statistics
    twin = local("galore", "deferred")
    update(twin, 0)
    assert update(engine, 2) == update(twin, 2)


def test_a_matrix_that_was_left_out_has_not_changed_and_no_finite_gradient():
    engine = local("adamw", "immediate")
    broken = dict(engine.model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    broken.register_hook(lambda grad: grad * float("nan"))
    statistics = update(engine, 0)
    assert statistics is not None
    figures = statistics["model.layers.0.mlp.up_proj.weight"]
    assert figures["update_rms"] == 0
    assert figures["gradient_rms"] != figures["gradient_rms"]
    assert statistics["model.layers.0.mlp.gate_proj.weight"]["update_rms"] > 0


# ------------------------------------------------------------------------------------------------------------ several ranks
def on_this_rank(stage: int, kind: str, apply: str) -> list[Statistics]:
    from ngpt.engine.deepspeed_engine import ZeroEngine

    ranks = Collectives()
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    config = deepspeed_config(options, zero_stage=stage, micro_batch_size=4, accumulation_steps=1, world_size=ranks.size)
    build = functools.partial(optimizer_of, kind)
    keywords = {"device": CPU, "dtype": torch.float32, "apply": apply, "grad_clip": clip_of(apply)}
    engine = ZeroEngine(model_of, build, config, zero_stage=stage, **keywords)
    return of_all_steps(engine, rank=ranks.rank, ranks=ranks.size)


def in_stages(cases: list[tuple[Any, ...]]) -> list[list[Statistics]]:
    return [on_this_rank(*case) for case in cases]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (
            2,
            [(0, "galore, random", "deferred"), (0, "natural", "deferred"), (1, "galore, random", "deferred"), (1, "natural", "immediate")],
        ),
        (2, [(2, "natural", "deferred"), (3, "galore, random", "deferred"), (3, "natural", "deferred")]),
        (3, [(3, "natural", "deferred")]),
    ],
    ids=["2 ranks, stages 0 and 1", "2 ranks, stages 2 and 3", "3 ranks"],
)
def test_ranks_together_report_what_one_process_reports(on_ranks, ranks, cases):
    """On one process each rank's share of the batch is a micro-batch, so that the same gradients are projected; in bases that do not
    depend on them, as those of one process would come from its first micro-batch alone."""
    by_rank = on_ranks(ranks, in_stages, cases)
    for number, (_, kind, apply) in enumerate(cases):
        alone = of_all_steps(local(kind, apply, clip=clip_of(apply)), parts=1 if apply == "immediate" else ranks)
        for found in by_rank:
            assert_close(found[number], alone)
