"""Peak memory of a run on one rank, by moment and by kind, from its configuration alone.

An update is walked through from its first forward to its last weight: at the loss, at each block's backward, at the embedding's and in
the update itself, what is alive is added up by kind. The largest of these sums is the estimate; bytes of tensors, without the
device's context, the libraries' workspaces and what an allocator leaves unused between tensors (`ngpt.planning.devices` has those).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ngpt.config.schema import RunConfig, engine_of_launch
from ngpt.engine.local import weight_dtype
from ngpt.engine.zero_cost import Setup, gradient_bytes, sharded_state_bytes, state_bytes_on_rank
from ngpt.optim.state_cost import KINDS as STATE_KINDS
from ngpt.planning.activations import Activations, activations_of, head_gradient_bytes
from ngpt.planning.parameters import Parameter, layer_name, parameters_of
from ngpt.planning.update_memory import Arithmetic, apply_bytes, kept_gradient_bytes, reduce_bytes, together_bytes
from ngpt.planning.zero_memory import LayerUpdate, Wire, gathered_weight_bytes, keeps_matrices

FP32 = 4
KINDS = ("weights", "optimizer state", "gradients", "activations", "logits", "between ranks", "temporaries")


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of an update, in bytes by kind."""

    name: str
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """All moments of an update that may be its peak; `state` is the optimizer's by kind, those on the device."""

    moments: tuple[Moment, ...]
    state: Mapping[str, int]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def largest(self) -> dict[str, int]:
        """The most bytes of each kind at any moment."""
        return {kind: max(moment.sizes[kind] for moment in self.moments) for kind in KINDS}


def estimate_memory(config: RunConfig, *, ranks: int = 1, on_gpu: bool = True) -> MemoryEstimate:
    """The memory of one rank (the first, which has the largest parts) of a validated configuration."""
    return _Walk(config, ranks, on_gpu).estimate()


def setup_of(config: RunConfig, ranks: int) -> Setup:
    """The configuration as `ngpt.engine.zero_cost` sees it."""
    trainer, engine = config.trainer, config.engine
    wire = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[engine.communication_dtype]
    return Setup(
        stage=engine.zero_stage if engine_of_launch(engine, ranks) == "deepspeed" else 0,
        ranks=ranks,
        dtype=weight_dtype(trainer.precision),
        wire=wire,
        micro_batches=trainer.global_batch_size // (trainer.micro_batch_size * ranks),
        immediate=config.optimizer.apply == "immediate",
    )


class _Walk:
    def __init__(self, config: RunConfig, ranks: int, on_gpu: bool) -> None:
        self._config, self._on_gpu = config, on_gpu
        self._known: dict[tuple[Any, ...], Any] = {}
        self._setup = setup_of(config, ranks)
        self._zero = engine_of_launch(config.engine, ranks) == "deepspeed"
        self._arithmetic = Arithmetic(self._setup.dtype, on_gpu, guarded=self._setup.immediate)
        self._parameters = parameters_of(config)
        self._activations: Activations = activations_of(config, bytes_per_weight=self._arithmetic.w, on_gpu=on_gpu)
        self._several = self._setup.micro_batches > 1
        layers: dict[str, list[Parameter]] = {}
        for parameter in self._parameters:
            layers.setdefault(layer_name(parameter.name), []).append(parameter)
        self._layers = layers
        self._kept = {name: self._gradients_of(members) for name, members in layers.items()}
        self._wire = Wire(self._setup, gloo=not on_gpu)
        self._gathered, self._fetched_ahead = gathered_weight_bytes(config, self._parameters, self._setup)
        self._updates = LayerUpdate(self._setup, self._arithmetic)

    def estimate(self) -> MemoryEstimate:
        state = dict.fromkeys(STATE_KINDS, 0)
        for parameter in self._parameters:
            if parameter.settings is not None:
                sizes = self._once(_state_bytes, parameter, self._setup)
                away = self._config.engine.offload_optimizer and self._on_gpu
                divided = sharded_state_bytes(parameter.shape, parameter.settings, self._setup) if away else 0
                for kind in STATE_KINDS:
                    state[kind] += sizes[kind]
                state["moments"] -= min(divided // self._setup.parts, sizes["moments"])
        static = {"weights": self._weight_bytes(), "optimizer state": sum(state.values())}
        empty = dict.fromkeys(KINDS, 0)
        moments = tuple(Moment(moment.name, {**empty, **static, **moment.sizes}) for moment in self._moments())
        return MemoryEstimate(moments, state)

    # ----------------------------------------------------------------------------------------------------- the moments
    def _moments(self) -> Iterator[Moment]:
        if self._setup.stage == 3:
            yield self._moment("the weights are gathered", gradients=self._carried(), **{"between ranks": self._fetched_ahead})
        yield self._loss()
        yield from self._backward()
        yield from self._update()

    def _loss(self) -> Moment:
        kept, w = self._activations, self._arithmetic.w
        head = self._members("lm_head.weight") or self._members("model.embed_tokens.weight")
        trained = any(parameter.settings is not None for parameter in head)
        return self._moment(
            "the loss",
            gradients=self._carried() + (head_gradient_bytes(self._config, w) if trained else 0),
            activations=kept.shared + sum(kept.blocks) + kept.output,
            logits=kept.logits + kept.hidden_gradient,
            **{"between ranks": self._fetched_ahead if self._several else 0},
        )

    def _backward(self) -> Iterator[Moment]:
        """Head, last norm, blocks from the last to the first, embedding: in the first micro-batch, and in those after it."""
        blocks = [f"model.layers.{layer}" for layer in reversed(range(self._config.model.num_hidden_layers))]
        layers = [layer for layer in ("lm_head.weight", "model.norm.weight", *blocks, "model.embed_tokens.weight") if self._members(layer)]
        for first in (True, False) if self._several else (True,):
            done = 0 if first else self._carried()
            for position, layer in enumerate(layers):
                gradients = self._gradients_at(layers, position, first=first) if self._zero else _Kept(done)
                yield from self._backward_of(layer, self._members(layer), gradients, first=first)
                done += self._kept[layer] if first else 0

    def _gradients_at(self, layers: list[str], position: int, *, first: bool) -> _Kept:
        """Under ZeRO: gradients of layers whose sums have come, and those on their way, when backward comes to a layer."""
        before = [self._trained(name) for name in reversed(layers[:position])]
        unsummed = self._several and self._setup.stage < 2
        if self._setup.immediate:
            return _Kept(0)
        if unsummed and first:
            return _Kept(sum(self._kept[name] for name in layers[:position]))
        flying = [layer for layer in before[:2] if layer is before[0] or not keeps_matrices(layer)]
        arrived = [layer for layer in before if not any(layer is other for other in flying)]
        done = sum(self._wire.own(layer) for layer in arrived)
        if not first:
            waiting = [layer for layer in map(self._trained, layers) if not any(layer == other for other in arrived)]
            done = sum(self._gradients_of(layer) for layer in arrived) if not unsummed else done
            done += sum(self._carried_of(layer) for layer in waiting if not unsummed or layer not in flying)
        return _Kept(done, flying)

    def _trained(self, layer: str) -> list[Parameter]:
        return [parameter for parameter in self._members(layer) if parameter.settings is not None]

    def _backward_of(self, layer: str, members: list[Parameter], gradients: _Kept, *, first: bool) -> Iterator[Moment]:
        """The moments of one layer, when there are `gradients` of others already."""
        kept, w, done = self._activations, self._arithmetic.w, gradients.done
        on_their_way = {"between ranks": sum(self._wire.flying(other) for other in gradients.flying)}
        when = "" if first else ", a later micro-batch"
        below, born_beside = kept.shared, 0
        number = int(layer.split(".")[2]) if layer.startswith("model.layers.") else None
        if self._config.model.tie_word_embeddings:
            done += w * self._numel("model.embed_tokens.weight")  # the head's share waits for the embedding's
        if number is not None:
            below += sum(kept.blocks[: number + 1])
            name = f"the norm after block {number}{when}"
            yield self._moment(name, gradients=done, activations=below + kept.norm_backward, **on_their_way)
            below += kept.recomputed[number]
            down = [parameter for parameter in members if parameter.name.endswith("mlp.down_proj.weight")]
            yield self._moment(
                f"backward of block {number}{when}",
                gradients=done + (self._gradients_of(down) if first and not self._zero else 0),
                activations=below + kept.feed_forward_backward,
                **on_their_way,
            )
        elif layer == "lm_head.weight":
            below += sum(kept.blocks) + kept.output
            in_loss = head_gradient_bytes(self._config, w)
            born_beside = in_loss if in_loss > w * self._numel(layer) else 0
        elif layer == "model.norm.weight":
            below += sum(kept.blocks)
        else:
            name = f"the norm before block 0{when}"
            yield self._moment(name, gradients=done, activations=below + kept.norm_backward, **on_their_way)
        largest = max(members, key=lambda parameter: parameter.numel if parameter.settings is not None else 0)
        if largest.settings is None:
            return
        if self._zero:
            alone = len(members) == 1
            above = kept.shared if number is None else kept.shared + sum(kept.blocks[:number])
            yield from self._summed_over_ranks(
                f"{layer.removesuffix('.weight')}{when}",
                self._trained(layer),
                gradients,
                gradient=largest.numel * w + born_beside,
                last_gradient=largest.numel * w + born_beside if alone else 0,
                activations=(below + kept.hidden_gradient, (below if alone else above) + kept.hidden_gradient),
                first=first,
            )
            return
        reduced = 0 if not self._several or not first else self._gradients_of([largest])
        yield self._moment(
            f"gradients of {layer.removesuffix('.weight')}{when}",
            gradients=done + largest.numel * w + born_beside + reduced,
            activations=below + kept.hidden_gradient,
            temporaries=self._treated(members, first=first),
        )

    def _summed_over_ranks(
        self,
        name: str,
        layer: list[Parameter],
        gradients: _Kept,
        *,
        gradient: int,
        last_gradient: int,
        activations: tuple[int, int],
        first: bool,
    ) -> Iterator[Moment]:
        """Under ZeRO, from the first gradient of a layer to the start of their sum, or to the update; activations before and after."""
        wire, before = self._wire, gradients.flying
        unsummed = self._several and self._setup.stage < 2
        carried = self._gradients_of(layer) if unsummed and not first else 0  # those that waited are there
        if before and keeps_matrices(layer):  # the first gradient waits until those of the layer before have come
            others = sum(wire.flying(other) for other in before[1:])
            coming = {"between ranks": wire.collected(before[0]) + others}
            yield self._moment(f"gradients before {name}", gradients=gradients.done + gradient, activations=activations[0], **coming)
            before = [other for other in before if not keeps_matrices(other)]
            gradients = _Kept(gradients.done + sum(wire.own(other) for other in gradients.flying if keeps_matrices(other)), before)
        others = sum(wire.flying(other) for other in before)
        arriving = others + max(0, wire.arriving(layer, first=first) - carried)
        yield self._moment(
            f"gradients of {name}", gradients=gradients.done + gradient, activations=activations[0], **{"between ranks": arriving}
        )
        common = {"gradients": gradients.done + last_gradient, "activations": activations[1]}
        if first:
            yield self._moment(f"subspaces of {name}", **common, **{"between ranks": arriving}, temporaries=self._updates.search(layer))
        if unsummed and first:
            return
        started = others + max(0, wire.starting(layer) - carried)
        yield self._moment(f"sum of {name}", **common, **{"between ranks": started})
        if self._setup.immediate:
            own = {"between ranks": wire.own(layer)}
            yield self._moment(f"sum of {name} arrives", **common, **{"between ranks": wire.collected(layer)})
            yield self._moment(f"update of {name}", **common, **own, temporaries=self._updates.applied(layer))

    def _treated(self, members: list[Parameter], *, first: bool) -> int:
        """Temporaries of the gradients of a layer on one process."""
        if self._config.optimizer.apply == "whole":
            return 0
        trained = [parameter for parameter in members if parameter.settings is not None]
        each = [self._once(reduce_bytes, parameter, self._arithmetic, first=first) for parameter in trained]
        if self._setup.immediate:
            each += [self._once(apply_bytes, p, self._arithmetic) for p in trained]
        return max(each, default=0)

    def _update(self) -> Iterator[Moment]:
        if self._setup.immediate:
            return
        trained = [parameter for parameter in self._parameters if parameter.settings is not None]
        if self._zero:
            yield from self._update_over_ranks()
            return
        gradients = sum(self._kept.values())
        yield self._moment("the norm of the gradient", gradients=gradients, temporaries=self._norm_bytes(trained))
        if self._config.optimizer.apply == "whole":
            largest = max(max(self._once(reduce_bytes, p, self._arithmetic), self._once(apply_bytes, p, self._arithmetic)) for p in trained)
            together = together_bytes(trained, self._arithmetic)
            yield self._moment("the update", gradients=gradients, temporaries=max(largest, together))
            return
        for parameter in reversed(trained):
            yield self._moment(
                f"update of {parameter.name}", gradients=gradients, temporaries=self._once(apply_bytes, parameter, self._arithmetic)
            )
            gradients -= self._gradients_of([parameter])

    def _update_over_ranks(self) -> Iterator[Moment]:
        layers = [self._trained(name) for name in reversed(self._layers)]
        summed = self._gradients_of if self._setup.reductions > 1 else self._wire.own
        gradients = sum(summed(layer) for layer in layers)
        last = layers[-1]
        coming = {"between ranks": self._wire.collected(last) - self._wire.own(last)}
        yield self._moment("the last gradients arrive", gradients=gradients, **coming)
        for name, layer in zip(reversed(self._layers), layers, strict=True):
            yield self._moment(f"update of {name}", gradients=gradients, temporaries=self._updates.applied(layer))
            gradients -= summed(layer)

    # --------------------------------------------------------------------------------------------------------- its terms
    def _moment(self, name: str, **sizes: int) -> Moment:
        named = {kind: sizes.get(kind, 0) for kind in KINDS}
        if self._setup.immediate or not name.startswith("update of"):
            named["between ranks"] += self._gathered
        return Moment(name, {kind: size for kind, size in named.items() if kind not in ("weights", "optimizer state")})

    def _once(self, compute: Callable[..., Any], parameter: Parameter, *args: Any, **options: Any) -> Any:
        """The result of a function of a parameter's shape and settings, which many have in common."""
        key = (compute, parameter.shape, id(parameter.settings), *options.items())
        if key not in self._known:
            self._known[key] = compute(parameter, *args, **options)
        return self._known[key]

    def _members(self, layer: str) -> list[Parameter]:
        return self._layers.get(layer, [])

    def _numel(self, layer: str) -> int:
        return sum(parameter.numel for parameter in self._members(layer))

    def _weight_bytes(self) -> int:
        share = self._setup.share if self._setup.stage == 3 else lambda numel: numel
        return sum(self._arithmetic.w * share(parameter.numel) for parameter in self._parameters)

    def _gradients_of(self, members: list[Parameter]) -> int:
        """Bytes of a layer's gradients between its backward and its update."""
        if self._zero:
            layer = _shapes(members)
            return 0 if self._setup.immediate or not layer else gradient_bytes(layer, self._setup)
        how = {"apply": self._config.optimizer.apply, "micro_batches": self._setup.micro_batches}
        return sum(self._once(kept_gradient_bytes, parameter, self._arithmetic, **how) for parameter in members)

    def _norm_bytes(self, trained: list[Parameter]) -> int:
        """The CPU widens a narrow gradient as a whole before it takes its norm."""
        if self._on_gpu or self._arithmetic.w == FP32:
            return 0
        narrow = [p.numel for p in trained if self._gradients_of([p]) == self._arithmetic.w * p.numel]
        return FP32 * max(narrow, default=0)

    def _carried(self) -> int:
        """Gradients of earlier micro-batches of the same update."""
        return sum(self._carried_of(self._trained(layer)) for layer in self._layers) if self._several else 0

    def _carried_of(self, layer: list[Parameter]) -> int:
        """A sum over ranks is widened when the second is added to it."""
        if self._zero and self._setup.stage >= 2 and self._setup.micro_batches == 2:
            return self._wire.own(layer)
        return self._gradients_of(layer)


class _Kept(NamedTuple):
    """Bytes of gradients that wait for the update, and layers whose gradients are on their way between ranks, the latest first."""

    done: int
    flying: Sequence[list[Parameter]] = ()


def _state_bytes(parameter: Parameter, setup: Setup) -> dict[str, int]:
    assert parameter.settings is not None
    return state_bytes_on_rank(parameter.shape, parameter.settings, setup)


def _shapes(members: list[Parameter]) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Of the trained ones, as `ngpt.engine.zero_cost` takes a layer."""
    return [(parameter.shape, parameter.settings) for parameter in members if parameter.settings is not None]
