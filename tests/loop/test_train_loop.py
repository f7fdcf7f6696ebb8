"""The loop counts, stops and skips as promised, whatever the engine."""

from __future__ import annotations

import itertools
import math
import time

import pytest

from ngpt.data.documents import DataError, DataUnavailable
from ngpt.loop.train_loop import Progress, TrainingDiverged, train_loop
from ngpt.loop.train_step import num_label_tokens, train_step


def endless(make_batch, tokens=4, loss_sum=8.0):
    for index in itertools.count():
        yield make_batch(index, tokens, loss_sum)


def run_loop(engine, batches, progress, **changes):
    settings = {
        "total_steps": 5,
        "micro_batches_per_step": 2,
        "lr_multiplier": lambda step: 1.0 + step,
        "max_nonfinite_steps": 3,
        "should_stop": lambda: False,
    } | changes
    return train_loop(engine, batches, progress, **settings)


def test_loss_is_the_mean_over_all_tokens_of_the_global_batch_not_of_the_micro_batch_means(engine, make_batch):
    batches = [make_batch(0, 1, 10.0), make_batch(1, 9, 9.0)]
    outcome = train_step(engine, batches, label_tokens=num_label_tokens(batches), lr_multiplier=1.0)
    assert outcome.loss == pytest.approx(19 / 10)  # the mean of means would be 5.5
    assert num_label_tokens(batches) == 10
    assert engine.updates[0].loss_divisor == 10
    assert engine.updates[0].seen == engine.updates[0].num_micro_batches == 2


def test_a_batch_without_labels_has_loss_zero(engine, make_batch):
    outcome = train_step(engine, [make_batch(0, 0, 0.0)], label_tokens=0, lr_multiplier=1.0)
    assert outcome.loss == 0.0
    assert outcome.applied


def test_every_step_reads_its_own_micro_batches_and_its_own_rate(engine, make_batch):
    results = list(run_loop(engine, endless(make_batch), Progress()))
    assert [result.step for result in results] == [1, 2, 3, 4, 5]
    assert [result.tokens for result in results] == [8, 16, 24, 32, 40]
    assert [[batch.index for batch in result.batches] for result in results] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [update.lr_multiplier for update in engine.updates] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_progress_and_batches_describe_the_same_moment_at_every_yield(engine, make_batch):
    source = endless(make_batch)
    progress = Progress()
    for result in run_loop(engine, source, progress):
        assert progress.step == result.step
        assert progress.tokens == result.tokens
        if result.step == 2:
            break
    assert next(source).index == 4  # nothing was read ahead


def test_resuming_continues_the_count(engine, make_batch):
    progress = Progress()
    progress.load_state_dict({"step": 3, "tokens": 24, "skipped_steps": 1, "skipped_in_a_row": 0, "seconds": 2.5})
    results = list(run_loop(engine, endless(make_batch), progress))
    assert [result.step for result in results] == [4, 5]
    assert results[-1].tokens == 40
    assert results[-1].skipped_steps == 1
    assert [update.lr_multiplier for update in engine.updates] == [4.0, 5.0]


def test_a_finished_run_yields_nothing(engine, make_batch):
    assert list(run_loop(engine, endless(make_batch), Progress(step=5))) == []


def test_a_stop_request_ends_the_loop_after_the_step_in_progress(engine, make_batch):
    asked = iter([False, False, True])
    results = list(run_loop(engine, endless(make_batch), Progress(), should_stop=lambda: next(asked)))
    assert [result.step for result in results] == [1, 2]


def test_a_step_that_is_not_finite_is_counted_and_a_good_one_resets_the_row(engine, make_batch):
    losses = itertools.cycle([math.nan, math.nan, 1.0])
    batches = (make_batch(i, 1, loss) for i, loss in enumerate(losses))
    results = list(run_loop(engine, batches, Progress(), micro_batches_per_step=1, total_steps=6))
    assert [result.update.applied for result in results] == [False, False, True] * 2
    assert [result.skipped_steps for result in results] == [1, 2, 2, 3, 4, 4]


def test_an_update_that_left_out_a_matrix_counts_as_skipped_too(engine, make_batch):
    engine.skipped_matrices = 1
    loop = run_loop(engine, endless(make_batch), Progress())
    assert [next(loop).skipped_steps for _ in range(3)] == [1, 2, 3]
    with pytest.raises(TrainingDiverged):
        next(loop)


def test_too_many_skipped_steps_in_a_row_stop_the_run_after_the_last_result(engine, make_batch):
    loop = run_loop(engine, endless(make_batch, loss_sum=math.inf), Progress())
    results = [next(loop), next(loop), next(loop)]
    assert [batch.index for batch in results[-1].batches] == [4, 5]
    with pytest.raises(TrainingDiverged, match=r"3 times in a row.*max_nonfinite_steps = 3.*optimizer\.lr"):
        next(loop)


def test_time_waiting_for_data_is_told_apart(engine, make_batch):
    def slow():
        for batch in endless(make_batch):
            time.sleep(0.01)
            yield batch

    result = next(run_loop(engine, slow(), Progress()))
    assert 0.02 <= result.data_seconds <= result.step_seconds


@pytest.mark.parametrize(
    ("own", "others", "kind"),
    [
        (DataUnavailable("the hub is away"), ("", ""), DataUnavailable),
        (DataUnavailable("the hub is away"), ("line 7 is no JSON", "lasting"), DataError),
        (None, ("the hub is away", ""), DataUnavailable),
        (None, ("line 7 is no JSON", "lasting"), DataError),
    ],
)
def test_ranks_wait_for_data_to_come_back_only_if_that_would_mend_all_of_them(engine, make_batch, own, others, kind):
    """data that cannot be read on some ranks, for a time or for good | all raise one error, of the kind that says whether to try again"""

    def batches():
        if own:
            raise own
        yield from endless(make_batch)

    answers = iter(others)
    across = {"sum_over_ranks": lambda _: -1, "texts_of_ranks": lambda text: [text, next(answers)]}
    loop = run_loop(engine, batches(), Progress(), **across)
    with pytest.raises(DataError) as caught:
        next(loop)
    assert type(caught.value) is kind
