"""Texts written during training: there at every evaluation, the same ones again after a resume, and nothing that training notices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ngpt import build
from ngpt.config.compose import compose_run
from ngpt.config.problems import ConfigError
from ngpt.dist.collectives import Collectives
from ngpt.dist.ranks import Ranks
from ngpt.generation import Choice, encode_prompt, generate
from ngpt.samples import Samples
from ngpt.train import train
from ngpt.trained import open_trained

SAMPLES = ["eval.sample_prompts=[river garden,'']", "eval.sample_tokens=12"]


def samples(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def trajectory(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key.startswith(("step", "train/", "val/", "optim/"))} for record in records]


@pytest.fixture(scope="module")
def sampled(train_small, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ngpt.summary.plot_run", lambda *_args, **_kwargs: None)
        return train_small(tmp_path_factory.mktemp("sampled"), *SAMPLES)


def test_samples_are_what_the_checkpoint_writes_and_training_does_not_notice(small_run, sampled):
    found = samples(sampled.folder)
    assert [(record["step"], record["prompt"]) for record in found] == [(2, "river garden"), (2, ""), (4, "river garden"), (4, "")]
    trained = open_trained(sampled.folder)
    for number, record in enumerate(found[2:]):
        ids = encode_prompt(trained.tokenizer, record["prompt"], None)
        tokens = [row[0] for row in generate(trained.model, ids, Choice(0.8), num_tokens=12, seed=number, eos_id=trained.tokenizer.eos_id)]
        expected = trained.tokenizer.decode(ids + tokens)[len(trained.tokenizer.decode(ids)) :]
        assert record["text"] == expected
    assert trajectory(sampled.records()) == trajectory(small_run.records())
    ours, theirs = (load_file(run.step(4) / "model.safetensors") for run in (sampled, small_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(*(load_file(run.step(4) / "random.safetensors")["torch"] for run in (sampled, small_run)))
    assert 'sample 4 | "river garden' in (sampled.folder / "train.log").read_text()
    assert not (small_run.folder / "samples.jsonl").exists()


def test_a_resumed_run_has_every_sample_once(sampled, tmp_path):
    again = [*sampled.overrides, f"run.dir={tmp_path}", f"resume={sampled.step(2)}"]
    (tmp_path / "small").mkdir()
    lines = (sampled.folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "small" / "samples.jsonl").write_text("".join(lines[:3]))  # a kill after the first sample of step 4
    assert train(compose_run(again), again) == 0
    assert samples(tmp_path / "small") == samples(sampled.folder)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data=synthetic", "tokenizer.path=null"], "needs text and its tokenizer"),
        (["engine=deepspeed", "engine.zero_stage=3"], "needs all weights on one process"),
        (["eval.sample_tokens=0"], "must be at least 1"),
    ],
)
def test_samples_that_cannot_be_are_refused(small_run, overrides, complaint):
    settings = [item for item in small_run.overrides if overrides[0] != "data=synthetic" or not item.startswith(("data", "tokenizer"))]
    with pytest.raises(ConfigError, match=complaint):
        compose_run([*settings, *SAMPLES, *overrides])


def test_a_prompt_that_is_too_long_is_refused_at_the_start(train_small, tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.sample_prompts = .*longer than model\.max_seq_len = 64"):
        train_small(tmp_path, f"eval.sample_prompts=[{'river ' * 60}]")


def sample_on_rank(overrides: list[str], path: Path) -> float:
    """Rank 0 writes a sample between two evaluations of all ranks. Returns how much the second one's loss is off the first one's."""
    config = compose_run(overrides, world_size=2)
    engine = build.build_engine(config, torch.device("cpu"))
    tokenizer = build.open_tokenizer(config)
    (batch, *_) = build.read_eval_batches(config, tokenizer, Ranks())
    before = engine.evaluate(batch.model_inputs())
    if Collectives().rank == 0:
        samples = Samples(config.eval, tokenizer, max_seq_len=64, path=path, seed=0, resume_step=0)
        samples.write(engine.model, step=1, tokens=1)
        samples.close()
    after = engine.evaluate(batch.model_inputs())
    engine.close()
    return float(after - before)


def test_rank_0_writes_while_the_others_wait(on_ranks, small_run, tmp_path):
    overrides = [*small_run.overrides, *SAMPLES, "trainer.micro_batch_size=2", "engine.zero_stage=2"]
    assert on_ranks(2, sample_on_rank, overrides, tmp_path / "samples.jsonl") == [0, 0]
    alone = build.build_model(compose_run(small_run.overrides)).eval()
    ids = encode_prompt(small_run.tokenizer, "river garden", None)
    tokens = [row[0] for row in generate(alone, ids, Choice(0.8), num_tokens=12, seed=0, eos_id=small_run.tokenizer.eos_id)]
    written = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert written["text"] == small_run.tokenizer.decode(ids + tokens)[len(small_run.tokenizer.decode(ids)) :]
