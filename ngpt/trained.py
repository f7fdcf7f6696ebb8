"""Trained models, wherever they lie: a run, one of its checkpoints, or a LLaMA in Hugging Face's layout; verified, then opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ngpt.checkpoint.contents import WEIGHTS
from ngpt.checkpoint.integrity import is_complete, problems_of, read_manifest, step_folders, step_of
from ngpt.checkpoint.tensor_file import CheckpointError, Layout, TensorFile
from ngpt.config.llama_folder import INDEX, SINGLE, NotLlama, read_llama_config
from ngpt.config.optimizers import LoRAConfig
from ngpt.config.recorded import NotRecorded, read_recorded_config
from ngpt.config.schema import ModelConfig, RunConfig
from ngpt.data.tokenizer import Tokenizer
from ngpt.model import lora
from ngpt.model.llama import LlamaForCausalLM

RECORDED = "config.yaml"
TOKENIZER = "tokenizer.model"
SPELLINGS = (TOKENIZER, "spiece.model")  # of a SentencePiece model in folders of Hugging Face
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_WEIGHTLESS = "rotary_emb.inv_freq"  # end of the names of a table that old versions of transformers saved


# ------------------------------------------------------------------------------------------------------------------ weights
class WeightFiles:
    """The weights of a plain model by Hugging Face name, read a tensor at a time from one safetensors file or several.

    Args:
        files: open ones. Where several have a tensor of the same name, the first one counts.
        lora_alpha: of a run with adapters, which are merged into their matrices as these are read (`ngpt.model.lora`).
        unused: names that the model has no use for.
    """

    def __init__(self, files: Sequence[TensorFile], *, lora_alpha: float | None = None, unused: Sequence[str] = ()) -> None:
        self._alpha = lora_alpha
        self._file_of: dict[str, TensorFile] = {}
        for file in files:
            for name in file.names:
                self._file_of.setdefault(name, file)
        adapters = [name for name in self._file_of if name.endswith((".lora_A", ".lora_B"))] if lora_alpha is not None else []
        self._adapted = {name.removesuffix(".lora_A") + ".weight" for name in adapters if name.endswith(".lora_A")}
        self.names = [name for name in self._file_of if name not in {*adapters, *unused} and not name.endswith(_WEIGHTLESS)]

    def layout(self) -> Layout:
        """Dtype and shape of every tensor, from the headers alone."""
        return {name: (self._file_of[name].dtype(name), self._file_of[name].shape(name)) for name in self.names}

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU. Raises CheckpointError."""
        if name not in self._adapted:
            return self._file_of[name].read(name)
        matrix = name.removesuffix(".weight")
        parts = {part: self._file_of[part].read(part) for part in (name, f"{matrix}.lora_A", f"{matrix}.lora_B")}
        assert self._alpha is not None
        return lora.merged_weights(parts, alpha=self._alpha)[name]


@dataclass(frozen=True)
class Source:
    """A trained model on disk, verified and not yet loaded.

    `run` are the settings of the run that trained it, `step` its optimizer updates; None for a folder of Hugging Face's layout. `bos_id` is
    what such a folder's tokenizer puts before every text (None: nothing, as in our runs).
    """

    folder: Path
    config: ModelConfig
    weights: WeightFiles
    tokenizer: Tokenizer | None
    run: RunConfig | None = None
    step: int | None = None
    bos_id: int | None = None

    @property
    def name(self) -> str:
        """What to call it in a table: `quickstart step 600`, or the folder's name."""
        return self.folder.name if self.run is None else f"{self.run.run.name} step {self.step}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights on disk: that of the first matrix."""
        return next(iter(self.weights.layout().values()))[0]

    def load(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LlamaForCausalLM:
        """The model in evaluation mode, without gradients, in `dtype` (None: as on disk). Raises CheckpointError."""
        chunk = {} if self.run is None else {"loss_chunk_tokens": self.run.trainer.loss_chunk_tokens}
        with torch.device("meta"):  # no weight is drawn that is replaced at once
            model = LlamaForCausalLM(self.config, **chunk)
        expected = {name: parameter.shape for name, parameter in model.named_parameters()}
        layout = self.weights.layout()
        problems = [f"missing: {name}" for name in expected if name not in layout]
        problems += [f"unknown: {name}" for name in layout if name not in expected]
        problems += [
            f"{name}: {tuple(layout[name][1])} in the file, {tuple(shape)} in the model"
            for name, shape in expected.items()
            if name in layout and layout[name][1] != shape
        ]
        if problems:
            raise CheckpointError(f"{self.folder}: its weights do not fit its settings:\n  " + "\n  ".join(problems))
        weights = {name: self.weights.read(name).to(device=device, dtype=dtype) for name in expected}
        model.load_state_dict(weights, strict=False, assign=True)
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Trained:
    """A trained model in memory, with where it comes from."""

    model: LlamaForCausalLM
    source: Source

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError where the source has none."""
        if self.source.tokenizer is None:
            raise CheckpointError(f"{self.source.folder} has no {TOKENIZER}, so text cannot be turned into tokens")
        return self.source.tokenizer


def open_trained(source: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Trained:
    """The model of a run folder (its newest checkpoint), of a step folder or of a folder in Hugging Face's layout.

    Args:
        dtype: of weights and activations; None for that of the files.

    Raises:
        CheckpointError: there is no such model, its files are not what was saved, or they are not what this project can run.
    """
    found = find_source(source)
    return Trained(found.load(device=device, dtype=dtype), found)


# ------------------------------------------------------------------------------------------------------------------ finding
def find_source(path: Path) -> Source:
    """As `open_trained`, without loading. The checkpoint's files that are used are read once, to compare their SHA-256."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is no such folder; give a run folder such as runs/NAME, a step folder, or a Hugging Face folder"
        )
    if steps := checkpoints_of(path):
        return _of_checkpoint(steps[-1])
    if (path / "checkpoints").is_dir() or ((path / RECORDED).exists() and not _is_step(path)):
        raise CheckpointError(f"{path}: this run has no complete checkpoint yet; checkpoint.every_steps says when one is written")
    return _of_checkpoint(path) if _is_step(path) else _of_hugging_face(path)


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, or of its folder `checkpoints`, the lowest step first; none for any other folder."""
    for folder in (run / "checkpoints", run):
        if steps := [step for step in reversed(step_folders(folder)) if is_complete(step)]:
            return steps
    return []


def _is_step(path: Path) -> bool:
    return is_complete(path) or (path.name.startswith("step-") and (path / RECORDED).exists())


def _of_checkpoint(folder: Path) -> Source:
    manifest = read_manifest(folder)
    if manifest is not None:
        used = [name for name in (WEIGHTS, RECORDED, TOKENIZER) if name in manifest.files]
        if found := list(problems_of(folder, manifest, used)):
            raise CheckpointError(f"{'; '.join(found)}; choose another step folder, or put the file back")
    try:
        run = read_recorded_config(folder / RECORDED)
    except NotRecorded as error:
        raise CheckpointError(str(error)) from error
    alpha = run.optimizer.lora_alpha if isinstance(run.optimizer, LoRAConfig) else None
    tokenizer = folder / TOKENIZER
    return Source(
        folder=folder,
        config=run.model,
        weights=WeightFiles([TensorFile(folder / WEIGHTS)], lora_alpha=alpha),
        tokenizer=Tokenizer(tokenizer.read_bytes(), name=str(tokenizer)) if tokenizer.exists() else None,
        run=run,
        step=manifest.step if manifest else step_of(folder),
    )


def _of_hugging_face(folder: Path) -> Source:
    try:
        config = read_llama_config(folder)
    except NotLlama as error:
        raise CheckpointError(str(error)) from error
    model = next((folder / name for name in SPELLINGS if (folder / name).exists()), None)
    tokenizer = None if model is None else Tokenizer(model.read_bytes(), name=str(model))
    return Source(folder, config, open_weights(folder, config), tokenizer, bos_id=_bos_id(folder, tokenizer))


def open_weights(folder: Path, config: ModelConfig) -> WeightFiles:
    """The safetensors files of a folder in Hugging Face's layout: one, or the shards that its index lists.

    Raises:
        CheckpointError: there are none, a shard is missing, or weights are there as Python's pickles, which are programs and are not run.
    """
    unused = ("lm_head.weight",) if config.tie_word_embeddings else ()
    if (folder / INDEX).exists():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(shard).name != shard for shard in shards):
                raise ValueError("a shard lies outside of the folder")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} cannot be read: {error}") from error
        return WeightFiles([TensorFile(folder / shard) for shard in shards], unused=unused)
    if (folder / SINGLE).exists():
        return WeightFiles([TensorFile(folder / SINGLE)], unused=unused)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    why = f"; {pickled[0]} is a pickle, a program that is not run here: convert it to safetensors" if pickled else ""
    raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}{why}")


def _bos_id(folder: Path, tokenizer: Tokenizer | None) -> int | None:
    """What tokenizers of LLaMA put before every text, unless tokenizer_config.json says otherwise."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if tokenizer is None or tokenizer.bos_id is None or not isinstance(settings, dict):
        return None
    return tokenizer.bos_id if settings.get("add_bos_token", True) else None
