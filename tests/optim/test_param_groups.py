"""Which parameters are projected, and what the constructors refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups


def names(groups: list[dict[str, Any]], projected: bool) -> set[str]:
    return {name for group in groups if ("rank" in group) == projected for name, _ in group["params"]}


# ----------------------------------------------------------------------------------------------------------- low_rank_groups
def test_linear_layers_but_no_embedding_and_no_head_are_projected(make_network) -> None:
    groups = low_rank_groups(make_network(), rank=4, update_proj_gap=50, scale=0.5)
    assert names(groups, projected=True) == {"up.weight", "square.weight", "down.weight"}
    assert [groups[1][key] for key in ("rank", "update_proj_gap", "scale")] == [4, 50, 0.5]


def test_nothing_is_left_out_and_nothing_comes_twice(make_network) -> None:
    network = make_network()
    groups = low_rank_groups(network, rank=4)
    members = [p for group in groups for _, p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == set(network.parameters())


def test_tied_weights_come_once_and_a_head_tied_to_an_embedding_is_plain_whatever_its_name(make_network) -> None:
    network = make_network()
    network.readout = nn.Linear(12, 13, bias=False)
    network.readout.weight = network.embed_tokens.weight
    network.down_again = network.down
    groups = low_rank_groups(network, rank=4)
    assert names(groups, projected=True) == {"up.weight", "square.weight", "down.weight"}
    assert sum(name.startswith(("readout", "down_again")) for name in names(groups, projected=False)) == 0
    NaturalGaLore(groups)


def test_a_tied_embedding_is_known_by_its_layer_where_no_name_tells() -> None:
    network = nn.ModuleDict({"table": nn.Embedding(9, 8), "readout": nn.Linear(8, 9, bias=False), "mix": nn.Linear(8, 8)})
    network["readout"].weight = network["table"].weight
    assert names(low_rank_groups(network, rank=2), projected=True) == {"mix.weight"}


def test_attention_layers_called_multihead_are_no_head() -> None:
    network = nn.ModuleDict({"multihead_attention": nn.Linear(8, 8), "classifier_head": nn.Linear(8, 8)})
    assert names(low_rank_groups(network, rank=2), projected=True) == {"multihead_attention.weight"}


def test_matrices_too_small_for_the_rank_and_frozen_ones(make_network) -> None:
    network = make_network()
    network.square.weight.requires_grad_(False)
    network.narrow = nn.Linear(3, 20)
    groups = low_rank_groups(network, rank=4)
    assert names(groups, projected=True) == {"up.weight", "down.weight"}
    assert "narrow.weight" in names(groups, projected=False)
    assert "square.weight" not in names(groups, projected=False)


def test_embedding_and_head_are_projected_at_scale_one_if_asked_for(make_network) -> None:
    network = make_network()
    plain, inner, outer = low_rank_groups(network, rank=4, scale=0.5, embeddings=True, stagger=False)
    assert {name for name, _ in outer["params"]} == {"embed_tokens.weight", "lm_head.weight"}
    assert (inner["scale"], outer["scale"]) == (0.5, 1.0)
    assert all(p.ndim == 1 for _, p in plain["params"])
    assert all(group["stagger"] is False and group["rank"] == 4 for group in (inner, outer))
    NaturalGaLore([plain, inner, outer], fisher="diagonal")


def test_targets_and_embeddings_exclude_each_other(make_network) -> None:
    with pytest.raises(ValueError, match="either targets or embeddings"):
        low_rank_groups(make_network(), rank=4, targets=["up"], embeddings=True)


def test_targets_choose_by_name(make_network) -> None:
    groups = low_rank_groups(make_network(), rank=4, targets=["up", "lm_head"])
    assert names(groups, projected=True) == {"up.weight", "lm_head.weight"}


def test_a_target_that_matches_nothing_is_an_error_that_lists_the_matrices(make_network) -> None:
    with pytest.raises(ValueError, match=r"\['qkv'\] match no trainable matrix; the matrices are: .*up.weight"):
        low_rank_groups(make_network(), rank=4, targets=["up", "qkv"])


def test_a_rank_that_leaves_nothing_to_project_is_an_error(make_network) -> None:
    with pytest.raises(ValueError, match="rank = 64 must be below"):
        low_rank_groups(make_network(), rank=64)


def test_names_reach_the_optimizer(make_network) -> None:
    network = make_network()
    optimizer = GaLore(low_rank_groups(network, rank=4))
    assert optimizer.slot(network.up.weight).name == "up.weight"
    assert {optimizer.slot(p).index for p in network.parameters()} == set(range(len(list(network.parameters()))))


# --------------------------------------------------------------------------------------------------------------- bad input
def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape or (6, 8)))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("lr", -1.0, "a finite number >= 0"),
        ("lr", float("nan"), "a finite number >= 0"),
        ("lr", "fast", "a finite number >= 0"),
        ("betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("betas", 0.9, r"two numbers in \[0, 1\)"),
        ("eps", -1e-8, "a finite number >= 0"),
        ("weight_decay", -0.1, "a finite number >= 0"),
        ("rounding", "up", "one of stochastic, nearest, master"),
        ("seed", -1, "an integer >= 0"),
        ("update_proj_gap", 0, "an integer >= 1"),
        ("update_proj_gap", 2.5, "an integer >= 1"),
        ("scale", 0, "a finite number > 0"),
        ("subspace", "qr", "one of svd, randomized"),
        ("on_refresh", "forget", "one of rotate, keep, reset"),
        ("stagger", "yes", "True or False"),
        ("fisher", "exact", "one of history, two_sided, factored, diagonal, none"),
        ("history", 0, "an integer >= 1"),
        ("damping", -1e-3, "a finite number > 0"),
        ("damping", 0.0, "a finite number > 0"),
    ],
)
def test_every_value_is_checked_as_argument_and_as_group_key(key: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"NaturalGaLore: {key} = .*must be {rule}"):
        NaturalGaLore([matrix()], **{key: value})
    with pytest.raises(ValueError, match=rf"group 1: {key} = .*must be {rule}"):
        NaturalGaLore([{"params": [matrix()]}, {"params": [matrix()], "rank": 2, key: value}])


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "half"])
def test_impossible_ranks(rank: object) -> None:
    with pytest.raises(ValueError, match=r'group 0: rank = .* must be an integer >= 1, or "full"'):
        GaLore([{"params": [matrix()], "rank": rank}])


@pytest.mark.parametrize("rank", [6, 7, 100])
def test_a_rank_that_is_not_below_the_shorter_side_says_what_to_do(rank: int) -> None:
    with pytest.raises(ValueError, match=rf'parameter blocks.up has shape \(6, 8\): rank = {rank} must be below .* 6; .*rank="full"'):
        GaLore([{"params": [("blocks.up", matrix())], "rank": rank}])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_only_matrices_are_projected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"group 0, parameter norm has shape .* takes matrices only"):
        GaLore([{"params": [("norm", nn.Parameter(torch.zeros(shape)))], "rank": 2}])


@pytest.mark.parametrize(
    ("method", "key"), [(AdamW, "rank"), (AdamW, "damping"), (GaLore, "history"), (GaLore, "fisher"), (NaturalGaLore, "projection")]
)
def test_unknown_keys_list_the_accepted_ones(method: Callable, key: str) -> None:
    with pytest.raises(ValueError, match=f"group 0: unknown key '{key}' .*accepted keys: .*betas, .*eps, .*weight_decay"):
        method([{"params": [matrix()], key: 1}])


def test_other_projection_types_of_galore_are_refused() -> None:
    with pytest.raises(ValueError, match=r'proj_type = .reverse_std., but it must be "std"'):
        GaLore([{"params": [matrix()], "rank": 2, "proj_type": "reverse_std"}])


def test_projection_settings_without_a_rank_are_an_error() -> None:
    with pytest.raises(ValueError, match="group 0: scale, update_proj_gap given without rank"):
        GaLore([{"params": [matrix()], "update_proj_gap": 10, "scale": 0.5}])


def test_a_parameter_belongs_to_one_group() -> None:
    shared = matrix()
    for groups in (
        [{"params": [("a", shared)]}, {"params": [("b", shared)], "rank": 2}],
        [{"params": [("a", matrix()), ("b", shared), ("b", shared)]}],
    ):
        with pytest.raises(ValueError, match="parameter b: it is in this or another group already"):
            GaLore(groups)


def test_an_empty_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="group 1: it has no parameters"):
        AdamW([{"params": [matrix()]}, {"params": []}])


def test_integer_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"group 0, parameter 0: torch.int64 is not a floating-point tensor"):
        AdamW([torch.zeros(3, dtype=torch.int64)])


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    good, bad = matrix(), matrix(5)
    optimizer = GaLore([{"params": [good], "rank": 2}])
    with pytest.raises(ValueError, match="matrices only"):
        optimizer.add_param_group({"params": [bad], "rank": 2})
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == {good}
