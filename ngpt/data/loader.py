"""The public door of this room: from a configuration to training batches and to the fixed evaluation batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ngpt.config.schema import BuiltinDataConfig, DataConfig, LocalC4DataConfig, SyntheticDataConfig
from ngpt.data.batch import Batch, make_batch
from ngpt.data.builtin import BuiltinSource, standard_library_prose
from ngpt.data.documents import JSON, DataError, DocumentSource, Share, SkippedDocuments
from ngpt.data.json_lines import JsonLinesSource, expand_globs
from ngpt.data.layout import Layout, count_streams
from ngpt.data.packing import IGNORED, PackedRows, PaddedRows, Rows, RowSource, TokenBlock, cut_tokens, pad_documents
from ngpt.data.stream import TextBlocks, read_in_order
from ngpt.data.synthetic import EOS_ID, PAD_ID, SyntheticBlocks, SyntheticLanguage
from ngpt.data.tokenizer import Tokenizer
from ngpt.data.train_loader import TrainLoader
from ngpt.dist.process_group import Ranks

_READER_THREADS = 4


def build_train_loader(
    data: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    seq_len: int,
    micro_batch_size: int,
    global_batch_size: int,
    seed: int,
    ranks: Ranks,
    pin_memory: bool = False,
) -> TrainLoader:
    """Endless training micro-batches of this rank. Raises DataError for files, tokenizers and sizes that do not fit."""
    _check_vocabulary(data, tokenizer, vocab_size)
    eos_id, pad_id = _special_ids(data, tokenizer)
    executor = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="ngpt-read")
    skipped = SkippedDocuments(data.max_bad_documents)
    settings: dict[str, JSON] = {"source": data.name, "seed": seed, "seq_len": seq_len, "packing": data.packing}
    settings |= {"shuffle_window": data.shuffle_window, "tokenizer": tokenizer.fingerprint if tokenizer else None}
    open_blocks: Callable[[int], TextBlocks | SyntheticBlocks]
    if isinstance(data, SyntheticDataConfig):
        num_streams = count_streams(global_batch_size, data.streams)
        language = SyntheticLanguage(vocab_size, data.document_tokens, seed)
        settings |= {"vocab_size": vocab_size, "document_tokens": data.document_tokens}

        def open_blocks(stream: int) -> SyntheticBlocks:
            return SyntheticBlocks(language, f"train/{stream}")
    else:
        assert tokenizer is not None
        source = open_source(data)
        num_streams = count_streams(global_batch_size, min(data.streams, source.num_shards("train")))
        settings |= {"data": source.fingerprint("train")}

        def open_blocks(stream: int) -> TextBlocks:
            share = Share("train", stream, num_streams, seed)
            tally = skipped.tally(stream)
            return TextBlocks(
                source, share, tokenizer.encode, eos_id=eos_id, window=data.shuffle_window, tally=tally, executor=executor
            )

    layout = Layout(global_batch_size, micro_batch_size, num_streams, ranks)
    rows = {stream: _rows(open_blocks(stream), data, seq_len, eos_id=eos_id, pad_id=pad_id) for stream in layout.streams}
    return TrainLoader(
        layout,
        rows,
        settings=settings,
        counters=lambda: skipped.totals,
        executor=executor,
        prefetch=data.prefetch_batches,
        pin_memory=pin_memory,
    )


def build_eval_batches(
    data: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    seq_len: int,
    micro_batch_size: int,
    max_tokens: int,
    seed: int,
    ranks: Ranks,
) -> list[Batch]:
    """This rank's part of the held-out set: the same tokens every time, at most `max_tokens` labels over all ranks.

    Every rank gets as many batches of the same sizes as the others (so that collectives match); rows added for that have no labels.
    Raises DataError if nothing is held out.
    """
    _check_vocabulary(data, tokenizer, vocab_size)
    eos_id, pad_id = _special_ids(data, tokenizer)
    skipped = SkippedDocuments(data.max_bad_documents)
    if isinstance(data, SyntheticDataConfig):
        stream = SyntheticBlocks(SyntheticLanguage(vocab_size, data.document_tokens, seed), "eval")
        blocks = iter(stream.next_block, None)
    else:
        assert tokenizer is not None
        reader = open_source(data).open(Share("eval"), None, skipped.tally())
        blocks = read_in_order(reader, tokenizer.encode, eos_id)
    rows = _held_out_rows(blocks, data, seq_len, max_tokens, eos_id=eos_id, pad_id=pad_id)
    if not rows.num_label_tokens:
        raise DataError(
            f"data={data.name} holds no document out for evaluation ({skipped.totals['bad_documents']} bad ones skipped); "
            "give data.val_files, or a smaller data.holdout_every"
        )
    return _share_of_rank(rows, micro_batch_size, pad_id, ranks)


def open_source(data: DataConfig) -> DocumentSource:
    """The documents that a configuration names. Raises DataError if they cannot be found."""
    match data:
        case BuiltinDataConfig():
            return BuiltinSource(standard_library_prose(), data.holdout_every)
        case LocalC4DataConfig():
            if not data.train_files:
                raise DataError("data=local_c4 needs data.train_files: one or more globs of *.json.gz, *.jsonl or *.json.zst")
            train_files = expand_globs(list(data.train_files), option="data.train_files")
            return JsonLinesSource(train_files, expand_globs(list(data.val_files), option="data.val_files"), data.holdout_every)
        case _:
            raise DataError(f"data={data.name} is not a source of documents")


def _check_vocabulary(data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    if tokenizer is None:
        if not isinstance(data, SyntheticDataConfig):
            raise DataError(f"data={data.name} needs a tokenizer: set tokenizer.path to a SentencePiece .model file")
    elif tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only model.vocab_size={vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} (or more), or use a smaller tokenizer"
        )


def _special_ids(data: DataConfig, tokenizer: Tokenizer | None) -> tuple[int, int]:
    """(EOS, padding)."""
    if tokenizer is None or isinstance(data, SyntheticDataConfig):
        return EOS_ID, PAD_ID
    return tokenizer.eos_id, tokenizer.pad_id


def _rows(blocks: TextBlocks | SyntheticBlocks, data: DataConfig, seq_len: int, *, eos_id: int, pad_id: int) -> RowSource:
    if data.packing == "pad":
        return PaddedRows(blocks, seq_len, pad_id=pad_id)
    return PackedRows(blocks, seq_len, eos_id=eos_id, mask_documents=data.mask_documents)


def _held_out_rows(blocks: Iterable[TokenBlock], data: DataConfig, seq_len: int, max_tokens: int, *, eos_id: int, pad_id: int) -> Rows:
    """All held-out rows, in order, with at most `max_tokens` labels."""
    documents: list[np.ndarray] = []
    counted = 0

    def describe(_: int) -> dict[str, JSON]:
        return {"epoch": 0, "documents": []}

    for block in blocks:
        for tokens in np.split(block.tokens, block.starts[1:-1]):
            documents.append(tokens)
            counted += len(tokens) if data.packing == "pack" else min(len(tokens), seq_len) - 1
        if counted > max_tokens:
            break
    if data.packing == "pad":
        return _keep_labels(pad_documents(documents, seq_len, pad_id, describe), max_tokens)
    stream = np.concatenate([np.empty(0, np.int32), *documents])[: max_tokens + 1]
    return cut_tokens(stream, seq_len, pad_id=pad_id, eos_id=eos_id, mask_documents=data.mask_documents, describe=describe)


def _keep_labels(rows: Rows, most: int) -> Rows:
    """The same rows without the labels after the first `most`, and without the rows that have none left."""
    counted = rows.labels != IGNORED
    keep = counted & (np.cumsum(counted).reshape(counted.shape) <= most)
    used = int(keep.any(axis=1).sum())
    return Rows(rows.inputs[:used], np.where(keep, rows.labels, IGNORED)[:used], None, int(keep.sum()), rows.describe)


def _share_of_rank(rows: Rows, micro_batch_size: int, pad_id: int, ranks: Ranks) -> list[Batch]:
    """A contiguous part of the rows for each rank, in batches; the last part is filled up with rows that count nothing."""
    total = len(rows.inputs)
    per_rank = -(-total // ranks.world_size)
    first_row = ranks.rank * per_rank

    def part(array: np.ndarray, first: int, last: int, filler: int) -> np.ndarray:
        piece = array[first:last]
        return np.pad(piece, ((0, last - first - len(piece)), (0, 0)), constant_values=filler)

    batches = []
    for first in range(first_row, first_row + per_rank, micro_batch_size):
        last = min(first + micro_batch_size, first_row + per_rank)
        labels = part(rows.labels, first, last, IGNORED)
        ids = None if rows.document_ids is None else part(rows.document_ids, first, last, 0)
        piece = Rows(part(rows.inputs, first, last, pad_id), labels, ids, int((labels != IGNORED).sum()), rows.describe)
        batches.append(make_batch([piece], first_row=first))
    return batches
