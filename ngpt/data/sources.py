"""Which source of documents a configuration names."""

from __future__ import annotations

from functools import partial

from ngpt.config.redaction import redact
from ngpt.config.schema import BuiltinDataConfig, C4DataConfig, DataConfig, LocalC4DataConfig, TokenizedDataConfig
from ngpt.data.builtin import BuiltinSource, standard_library_prose
from ngpt.data.documents import DataError, DocumentSource, Split
from ngpt.data.hub import HubSource, Retries, open_hub_dataset
from ngpt.data.json_lines import JsonLinesSource, expand_globs
from ngpt.data.token_shards import TokenDocuments, TokenStore
from ngpt.data.tokenizer import Tokenizer


def open_source(data: DataConfig, tokenizer: Tokenizer, retries: Retries) -> DocumentSource:
    """The documents that a configuration names. Raises DataError if they cannot be found."""
    match data:
        case BuiltinDataConfig():
            return BuiltinSource(standard_library_prose(), data.holdout_every)
        case LocalC4DataConfig():
            if not data.train_files:
                raise DataError("data=local_c4 needs data.train_files: one or more globs of *.json.gz, *.jsonl or *.json.zst")
            train_files = expand_globs(list(data.train_files), option="data.train_files")
            return JsonLinesSource(train_files, expand_globs(list(data.val_files), option="data.val_files"), data.holdout_every)
        case C4DataConfig():
            open_split = partial(open_hub_dataset, data.repository, data.subset, data.revision)
            name = redact(f"{data.repository}/{data.subset}@{data.revision[:8]}")  # it stands in every state of the data
            return HubSource(open_split, {"train": data.train_split, "eval": data.val_split}, name=name, retries=retries)
        case TokenizedDataConfig():
            stores = {split: open_token_store(data, split, tokenizer)[0] for split in ("train", "eval")}
            held_out = stores["eval"] if data.val_files else None
            return TokenDocuments(stores["train"], held_out, eos_id=tokenizer.eos_id, holdout_every=data.holdout_every)
        case _:
            raise DataError(f"data={data.name} is not a source of documents")


def open_token_store(data: TokenizedDataConfig, split: Split, tokenizer: Tokenizer) -> tuple[TokenStore, tuple[int, bool] | None]:
    """The token shards of a split, and which of their rows belong to it (see `TokenizedRows`). Raises DataError."""
    own_files = split == "eval" and bool(data.val_files)
    option = "data.val_files" if own_files else "data.train_files"
    store = TokenStore(
        list(data.val_files if own_files else data.train_files), option=option, fingerprint=tokenizer.fingerprint, eos_id=tokenizer.eos_id
    )
    return store, None if data.val_files else (data.holdout_every, split == "eval")
