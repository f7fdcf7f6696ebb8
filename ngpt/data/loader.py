"""The public door of this room: from a configuration to training batches and to the fixed evaluation batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ngpt.config.file_rules import vocabulary_problem
from ngpt.config.schema import C4DataConfig, DataConfig, LocalC4DataConfig, SyntheticDataConfig, TokenizedDataConfig
from ngpt.data.batch import Batch
from ngpt.data.documents import DataError, Share, SkippedDocuments
from ngpt.data.held_out import held_out_rows, keep_labels, share_of_rank
from ngpt.data.hub import Retries
from ngpt.data.layout import Layout, count_streams
from ngpt.data.packing import RowShape, RowSource, rows_of_blocks
from ngpt.data.sources import open_source, open_token_store
from ngpt.data.stream import TextBlocks, read_in_order
from ngpt.data.synthetic import EOS_ID, PAD_ID, SyntheticBlocks, SyntheticLanguage
from ngpt.data.token_rows import TokenizedRows
from ngpt.data.token_shards import verify_shards
from ngpt.data.tokenizer import Tokenizer
from ngpt.data.train_loader import TrainLoader
from ngpt.dist.ranks import Ranks

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
    shape = _row_shape(data, tokenizer, seq_len)
    skipped = SkippedDocuments(data.max_bad_documents)
    retries = _retries(data)
    if isinstance(data, TokenizedDataConfig) and data.verify:
        verify_shards([*data.train_files, *data.val_files], ranks=ranks)
    executor = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="ngpt-read")
    text_streams: list[TextBlocks] = []
    if isinstance(data, SyntheticDataConfig):
        language = SyntheticLanguage(vocab_size, data.document_tokens, seed)
        shards, fingerprint = data.streams, f"{vocab_size} words, {data.document_tokens} tokens a document"

        def synthetic_rows(stream: int, num_streams: int) -> RowSource:
            return rows_of_blocks(SyntheticBlocks(language, f"train/{stream}"), shape)

        open_rows = synthetic_rows
    elif isinstance(data, TokenizedDataConfig) and data.packing == "pack":
        assert tokenizer is not None
        store, holdout = open_token_store(data, "train", tokenizer)
        shards = 1  # any rank jumps to any row: one stream is enough
        fingerprint = store.fingerprint + (f", 1 row in {holdout[0]} held out" if holdout else "")

        def token_rows(stream: int, num_streams: int) -> RowSource:
            return TokenizedRows(store, shape, holdout=holdout, window=data.shuffle_window, seed=seed)

        open_rows = token_rows
    else:
        assert tokenizer is not None
        source = open_source(data, tokenizer, retries)
        shards, fingerprint = source.num_shards("train"), source.fingerprint("train")

        def text_rows(stream: int, num_streams: int) -> RowSource:
            share, tally = Share("train", stream, num_streams, seed), skipped.tally(stream)
            window, eos_id = data.shuffle_window, shape.eos_id
            blocks = TextBlocks(source, share, tokenizer.encode_documents, eos_id=eos_id, window=window, tally=tally, executor=executor)
            text_streams.append(blocks)
            return rows_of_blocks(blocks, shape)

        open_rows = text_rows

    num_streams = count_streams(global_batch_size, min(data.streams, shards))

    def start() -> None:
        for blocks in text_streams:
            blocks.prepare()

    def close() -> None:
        retries.stop.set()
        executor.shutdown(wait=True, cancel_futures=True)

    layout = Layout(global_batch_size, micro_batch_size, num_streams, ranks)
    return TrainLoader(
        layout,
        {stream: open_rows(stream, num_streams) for stream in layout.streams},
        settings={
            "source": data.name,
            "data": fingerprint,
            "val_files": eval_fingerprint(data, tokenizer),
            "tokenizer": tokenizer.fingerprint if tokenizer else None,
            "seed": seed,
            "seq_len": seq_len,
            "packing": data.packing,
            "shuffle_window": data.shuffle_window,
        },
        counters=lambda: {**skipped.totals, "retries": retries.count},
        on_start=start,
        on_close=close,
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
    shape = _row_shape(data, tokenizer, seq_len)
    skipped = SkippedDocuments(data.max_bad_documents)
    if isinstance(data, SyntheticDataConfig):
        stream = SyntheticBlocks(SyntheticLanguage(vocab_size, data.document_tokens, seed), "eval")
        rows = held_out_rows(iter(stream.next_block, None), shape, max_tokens)
    elif isinstance(data, TokenizedDataConfig) and data.packing == "pack":
        assert tokenizer is not None
        store, holdout = open_token_store(data, "eval", tokenizer)
        every_row = TokenizedRows(store, shape, holdout=holdout, window=0, seed=seed)
        rows = keep_labels(every_row.take(min(every_row.num_rows, -(-max_tokens // seq_len))), max_tokens)
    else:
        assert tokenizer is not None
        reader = open_source(data, tokenizer, _retries(data)).open(Share("eval"), None, skipped.tally())
        rows = held_out_rows(read_in_order(reader, tokenizer.encode_documents, shape.eos_id), shape, max_tokens)
    if not rows.num_label_tokens:
        raise DataError(
            f"data={data.name} holds no document out for evaluation ({skipped.totals['bad_documents']} bad ones skipped); "
            "give data.val_files, or a smaller data.holdout_every"
        )
    return share_of_rank(rows, micro_batch_size, shape.pad_id, ranks)


def eval_fingerprint(data: DataConfig, tokenizer: Tokenizer | None) -> str | None:
    """What the files of data.val_files hold, wherever they are; None where the held-out set follows from the training data."""
    if not isinstance(data, LocalC4DataConfig | TokenizedDataConfig) or not data.val_files:
        return None
    assert tokenizer is not None
    return open_source(data, tokenizer, _retries(data)).fingerprint("eval")


def _check_vocabulary(data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    if tokenizer is None:
        if not isinstance(data, SyntheticDataConfig):
            raise DataError(f"data={data.name} needs a tokenizer: set tokenizer.path to a SentencePiece .model file")
    elif problem := vocabulary_problem(vocab_size, tokenizer.vocab_size):
        raise DataError(problem)


def _row_shape(data: DataConfig, tokenizer: Tokenizer | None, seq_len: int) -> RowShape:
    if tokenizer is None or isinstance(data, SyntheticDataConfig):
        eos_id, pad_id = EOS_ID, PAD_ID
    else:
        eos_id, pad_id = tokenizer.eos_id, tokenizer.pad_id
    return RowShape(seq_len, data.packing, eos_id, pad_id, mask_documents=data.mask_documents and data.packing == "pack")


def _retries(data: DataConfig) -> Retries:
    return Retries(data.max_retries, data.retry_seconds) if isinstance(data, C4DataConfig) else Retries(0, 0.0)
