"""Every hyper-parameter of every class is checked in the constructor, with a message that names group, key, value and rule."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from ngpt.optim import AdamW, AdaRankGrad, GaLore, NaturalGaLore
from ngpt.optim.hyper_parameters import PROJECTION_KEYS, RULES

CLASSES = (AdamW, GaLore, NaturalGaLore, AdaRankGrad)
VALID = {
    "update_proj_gap": 1,
    "scale": 1.0,
    "proj_type": "std",
    "subspace": "svd",
    "on_refresh": "keep",
    "stagger": True,
    "fisher": "none",
    "history": 1,
    "damping": 1.0,
    "moments": "adam",
    "complement": "none",
    "min_rank": 1,
    "energy": 1.0,
    "converged_below": 0.0,
}


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.zeros(6, 8))


@pytest.mark.parametrize(
    ("method", "key", "values", "rule"),
    [
        (AdamW, "state_dtype", ("fp16", None, 8), "one of fp32, bf16, 8bit"),
        (AdamW, "lr", (None, True, float("inf"), torch.tensor(float("inf")), torch.ones(2), 1j), "a finite number >= 0"),
        (AdamW, "betas", ((0.9,), (0.9, 0.9, 0.9), (-0.1, 0.9), ("a", 0.9), (0.9, None), (0.9, float("nan"))), r"two numbers in \[0, 1\)"),
        (AdamW, "eps", ("small", None, float("inf")), "a finite number >= 0"),
        (AdamW, "weight_decay", (None, float("nan")), "a finite number >= 0"),
        (AdamW, "rounding", (None, "up"), "one of stochastic, nearest, master"),
        (AdamW, "seed", (1.0, True, None), "an integer >= 0"),
        (GaLore, "moments", ("sgd", 1), "one of adam, adafactor, momentum, or None"),
        (GaLore, "complement", ("all", True), "one of none, fira, raw, or None"),
        (GaLore, "proj_type", ("left", "right", None), '"std" .* or "full"'),
        (GaLore, "scale", (-1.0, float("inf"), None), "a finite number > 0"),
        (GaLore, "update_proj_gap", (True, "200", None), "an integer >= 1"),
        (GaLore, "stagger", (1, None), "True or False"),
        (GaLore, "subspace", ("power", None), "one of svd, randomized, random"),
        (NaturalGaLore, "fisher", ("exact", None, 1), "one of history, two_sided, factored, diagonal, none"),
        (NaturalGaLore, "history", (0, 2.0, True), "an integer >= 1"),
        (NaturalGaLore, "damping", (-1.0, 0, float("nan"), "auto"), "a finite number > 0"),
        (AdaRankGrad, "min_rank", (0, -1, 1.5, True), "an integer >= 1 .* or None"),
        (AdaRankGrad, "energy", (0, 0.0, -0.5, 1.01, "most", None), r"a number in \(0, 1\]"),
        (AdaRankGrad, "converged_below", (-0.1, 1.0, None), r"a number in \[0, 1\)"),
    ],
)
def test_every_value_is_checked_as_argument_and_as_group_key(method: type[AdamW], key: str, values: tuple[object, ...], rule: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{method.__name__}: {key} = .*must be {rule}"):
            method([matrix()], **{key: value})
        group = {"params": [matrix()], key: value} | ({} if method is AdamW else {"rank": 2})
        with pytest.raises(ValueError, match=rf"^group 1: {key} = .*must be {rule}"):
            method([{"params": [matrix()]}, group])


@pytest.mark.parametrize("method", CLASSES)
def test_what_groups_may_set_are_the_arguments_of_the_class_and_each_has_a_rule(method: type[AdamW]) -> None:
    arguments = set(inspect.signature(method).parameters) - {"params", "sharding"}
    assert arguments == method([matrix()]).accepted_keys() - {"rank"}
    assert arguments <= set(RULES)


def test_every_rule_is_of_an_argument_of_some_class() -> None:
    arguments = {key for method in CLASSES for key in inspect.signature(method).parameters}
    assert set(RULES) == arguments - {"params", "sharding"} | {"rank"}


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (NaturalGaLore, {"proj_type": "full", "fisher": "factored"}, 'proj_type = \'full\' needs fisher "history", "two_sided" or'),
        (NaturalGaLore, {"proj_type": "full", "fisher": "diagonal"}, 'proj_type = \'full\' needs fisher "history", "two_sided" or'),
        (GaLore, {"proj_type": "full", "rank": "full"}, "proj_type = 'full' needs a rank below both sides"),
        (NaturalGaLore, {"fisher": "two_sided", "rank": "full"}, "proj_type = 'full' needs a rank below both sides"),
        (GaLore, {"proj_type": "full", "complement": "fira"}, "proj_type = 'full' needs complement=\"none\""),
        (NaturalGaLore, {"fisher": "two_sided", "complement": "fira"}, "proj_type = 'full' needs complement=\"none\""),
        (NaturalGaLore, {"fisher": "diagonal", "moments": "adam"}, "fisher = 'diagonal' needs moments=\"momentum\""),
        (NaturalGaLore, {"fisher": "diagonal", "moments": "adafactor"}, "fisher = 'diagonal' needs moments=\"momentum\""),
        (NaturalGaLore, {"fisher": "diagonal", "complement": "fira"}, 'fisher = \'diagonal\' needs complement "raw" or "none"'),
        (NaturalGaLore, {"fisher": "factored", "complement": "raw"}, "complement = 'raw' needs fisher=\"diagonal\""),
        (GaLore, {"complement": "raw"}, "complement = 'raw' needs fisher=\"diagonal\""),
        (GaLore, {"complement": "fira", "rank": "full"}, "complement = 'fira' needs a rank below both sides"),
        (NaturalGaLore, {"fisher": "diagonal", "complement": "raw", "rank": "full"}, "complement = 'raw' needs a rank below both sides"),
        (NaturalGaLore, {"fisher": "diagonal", "history": 20}, "history = 20 needs fisher"),
        (NaturalGaLore, {"fisher": "none", "history": 1}, "history = 1 needs fisher"),
        (AdaRankGrad, {"rank": "full"}, "min_rank = 1 needs a number as rank"),
        (AdaRankGrad, {"on_refresh": "keep"}, 'on_refresh = \'keep\' needs "rotate" or "reset"'),
        (AdaRankGrad, {"min_rank": None}, "converged_below = 0.5 needs a min_rank"),
        (AdaRankGrad, {"min_rank": 3}, "min_rank = 3 needs rank >= min_rank, but rank = 2"),
    ],
)
def test_parts_that_do_not_go_together(method: type[AdamW], settings: dict[str, object], message: str) -> None:
    rank = {"rank": settings.get("rank", 2)}
    others = {key: value for key, value in settings.items() if key != "rank"}
    with pytest.raises(ValueError, match=f"^group 1: {message}"):
        method([{"params": [matrix()]}, {"params": [matrix()], **rank, **others}])
    with pytest.raises(ValueError, match=f"^group 1: {message}"):  # the same if the group takes it from the constructor
        method([{"params": [matrix()]}, {"params": [matrix()], **rank}], **others)


def test_parts_left_open_become_those_that_fit_the_fisher() -> None:
    def parts(**settings: object) -> tuple[str, str, str]:
        group = NaturalGaLore([{"params": [matrix()], "rank": 2} | settings]).param_groups[0]
        return group["proj_type"], group["moments"], group["complement"]

    for fisher in ("none", "history", "factored"):
        assert parts(fisher=fisher) == ("std", "adam", "none")
    assert parts(fisher="two_sided") == ("full", "adam", "none")
    assert parts(fisher="diagonal") == ("std", "momentum", "raw")
    assert parts(fisher="diagonal", complement="none") == ("std", "momentum", "none")
    assert parts(fisher="diagonal", rank="full") == ("std", "momentum", "none")


@pytest.mark.parametrize("key", sorted(PROJECTION_KEYS))
def test_each_key_of_projected_groups_is_refused_in_a_plain_one(key: str) -> None:
    method = AdaRankGrad if key in ("min_rank", "energy", "converged_below") else NaturalGaLore
    with pytest.raises(ValueError, match=f"^group 0: {key} given without rank"):
        method([{"params": [matrix()], key: VALID[key]}])


def test_bad_groups_of_every_method(make) -> None:
    shared, vector = matrix(), nn.Parameter(torch.zeros(6))
    for groups, message in (
        ([{"params": [("a", shared)]}, {"params": [("b", shared)], "rank": 2}], r"^group 1, parameter b: it is in this or another group"),
        ([{"params": [shared]}, {"params": [], "rank": 2}], "^group 1: it has no parameters"),
        ([{"params": []}], "^group 0: it has no parameters"),
        ([{"params": {shared}}], "^group 0: its parameters are a set, which has no fixed order"),
    ):
        with pytest.raises(ValueError, match=message):
            make(groups)
    if isinstance(make([{"params": [shared]}]), GaLore | NaturalGaLore | AdaRankGrad):
        with pytest.raises(ValueError, match=r"^group 0, parameter 0 has shape \(6,\), but a group with `rank` takes matrices only"):
            make([{"params": [vector], "rank": 2}])
