"""Settings and library agree on which parts of an optimizer go together: what validation lets through can be built, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
from itertools import product

import pytest

from ngpt.build import build_model, build_optimizer
from ngpt.config.compose import compose_run
from ngpt.config.optimizers import AdaRankGradConfig, GaLoreConfig, LowRankConfig, NaturalGaLoreConfig
from ngpt.config.schema import RunConfig
from ngpt.config.validate import ConfigError, validate

TINY = [
    *("model=llama_9m", "model.vocab_size=64", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=1"),
    *("model.num_attention_heads=2", "data=synthetic", "trainer.max_steps=8", "trainer.precision=fp32", "optimizer.rank=4"),
]


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return compose_run(TINY)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (GaLoreConfig, ("proj_type", "moments", "complement")),
        (NaturalGaLoreConfig, ("fisher", "moments", "complement")),
        (AdaRankGradConfig, ("moments", "complement", "on_refresh")),
    ],
)
def test_validation_refuses_the_parts_that_the_library_refuses(run: RunConfig, kind: type[LowRankConfig], parts: tuple[str, ...]):
    model, config = build_model(run), copy.deepcopy(run)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    choices = [[*fields[part].metadata["choices"], *([None] if fields[part].default is None else [])] for part in parts]
    accepted = 0
    for values in product(*choices):
        config.optimizer = kind(rank=4, **dict(zip(parts, values, strict=True)))
        try:
            validate(config)
        except ConfigError:
            with pytest.raises(ValueError, match="needs"):
                build_optimizer(model, config=config.optimizer, precision="fp32", seed=0)
        else:
            assert build_optimizer(model, config=config.optimizer, precision="fp32", seed=0).state
            accepted += 1
    assert 0 < accepted < len(list(product(*choices)))
