"""Peak memory of a run on one rank, by moment and by kind, from its configuration alone.

An update is walked through from its first forward to its last weight: at the loss, at each block's backward, at the embedding's and in
the update itself, what is alive is added up by kind. The largest of these sums is the estimate; bytes of tensors, without the
device's context, the libraries' workspaces and what an allocator leaves unused between tensors (`ngpt.planning.devices` has those).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ngpt.config.schema import RunConfig, engine_of_launch
from ngpt.engine.local import weight_dtype
from ngpt.engine.zero_cost import Setup, gradient_bytes, sharded_state_bytes, state_bytes_on_rank
from ngpt.optim.state_cost import KINDS as STATE_KINDS
from ngpt.planning.activations import Activations, activations_of, head_gradient_bytes
from ngpt.planning.parameters import Parameter, layer_name, parameters_of
from ngpt.planning.update_memory import Arithmetic, apply_bytes, kept_gradient_bytes, reduce_bytes, together_bytes
from ngpt.planning.zero_memory import Wire, gathered_weight_bytes

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
    state: dict[str, int]

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
        self._wire = Wire(self._setup, gloo=not on_gpu) if self._zero else None

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
        )

    def _backward(self) -> Iterator[Moment]:
        """Head, last norm, blocks from the last to the first, embedding: in the first micro-batch, and in those after it."""
        blocks = [f"model.layers.{layer}" for layer in reversed(range(self._config.model.num_hidden_layers))]
        for first in (True, False) if self._several else (True,):
            done = 0 if first else self._carried()
            for layer in ("lm_head.weight", "model.norm.weight", *blocks, "model.embed_tokens.weight"):
                members = self._members(layer)
                if members:
                    yield from self._backward_of(layer, members, done, first=first)
                    done += self._kept[layer] if first else 0

    def _backward_of(self, layer: str, members: list[Parameter], done: int, *, first: bool) -> Iterator[Moment]:
        """The moments of one layer, when there are `done` bytes of gradients already."""
        kept, w = self._activations, self._arithmetic.w
        when = "" if first else ", a later micro-batch"
        below, born_beside = kept.shared, 0
        number = int(layer.split(".")[2]) if layer.startswith("model.layers.") else None
        if self._config.model.tie_word_embeddings:
            done += w * self._numel("model.embed_tokens.weight")  # the head's share waits for the embedding's
        if number is not None:
            below += sum(kept.blocks[: number + 1])
            yield self._moment(f"the norm after block {number}{when}", gradients=done, activations=below + kept.norm_backward)
            below += kept.recomputed[number]
            down = [parameter for parameter in members if parameter.name.endswith("mlp.down_proj.weight")]
            yield self._moment(
                f"backward of block {number}{when}",
                gradients=done + (self._gradients_of(down) if first and not self._zero else 0),
                activations=below + kept.feed_forward_backward,
                **self._received(members, first=first, treated=False),
            )
        elif layer == "lm_head.weight":
            below += sum(kept.blocks) + kept.output
            in_loss = head_gradient_bytes(self._config, w)
            born_beside = in_loss if in_loss > w * self._numel(layer) else 0
        elif layer == "model.norm.weight":
            below += sum(kept.blocks)
        else:
            yield self._moment(f"the norm before block 0{when}", gradients=done, activations=below + kept.norm_backward)
        largest = max(members, key=lambda parameter: parameter.numel if parameter.settings is not None else 0)
        if largest.settings is None:
            return
        reduced = 0 if self._zero or not self._several or not first else self._gradients_of([largest])
        yield self._moment(
            f"gradients of {layer.removesuffix('.weight')}{when}",
            gradients=done + largest.numel * w + born_beside + reduced,
            activations=below + kept.hidden_gradient,
            **self._received(members, first=first, treated=True),
        )

    def _received(self, members: list[Parameter], *, first: bool, treated: bool) -> dict[str, int]:
        """Temporaries and buffers of the gradients of a layer, which are not yet `treated` while those of its activations are computed."""
        trained = [parameter for parameter in members if parameter.settings is not None]
        sizes = {} if self._wire is None else {"between ranks": self._wire.in_backward(_shapes(trained))}
        if not treated or (self._config.optimizer.apply == "whole" and not self._zero):
            return sizes
        each = [self._once(reduce_bytes, parameter, self._arithmetic, first=first) for parameter in trained]
        if self._setup.immediate:
            each += [self._applied_together(trained)] if self._zero else [self._once(apply_bytes, p, self._arithmetic) for p in trained]
        return sizes | {"temporaries": max(each, default=0)}

    def _update(self) -> Iterator[Moment]:
        if self._setup.immediate:
            return
        trained = [parameter for parameter in self._parameters if parameter.settings is not None]
        gradients = sum(self._kept.values())
        yield self._moment("the norm of the gradient", gradients=gradients, temporaries=self._norm_bytes(trained))
        if self._wire is not None:
            for name, members in reversed(self._layers.items()):
                yield self._moment(f"update of {name}", gradients=gradients, temporaries=self._applied_together(members))
                gradients -= self._kept[name]
            return
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

    # --------------------------------------------------------------------------------------------------------- its terms
    def _moment(self, name: str, **sizes: int) -> Moment:
        named = {kind: sizes.get(kind, 0) for kind in KINDS}
        if self._setup.stage == 3:
            named["between ranks"] += gathered_weight_bytes(self._config, self._parameters, self._setup)
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
        return sum(self._kept.values()) if self._several else 0

    def _applied_together(self, members: list[Parameter]) -> int:
        """Under ZeRO the updates of a layer run side by side, each on the part that is here."""
        assert self._wire is not None
        each = [self._once(apply_bytes, parameter, self._arithmetic) for parameter in members if parameter.settings is not None]
        return sum(each) // self._setup.parts + self._wire.in_update(_shapes(members))


def _state_bytes(parameter: Parameter, setup: Setup) -> dict[str, int]:
    assert parameter.settings is not None
    return state_bytes_on_rank(parameter.shape, parameter.settings, setup)


def _shapes(members: list[Parameter]) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Of the trained ones, as `ngpt.engine.zero_cost` takes a layer."""
    return [(parameter.shape, parameter.settings) for parameter in members if parameter.settings is not None]
