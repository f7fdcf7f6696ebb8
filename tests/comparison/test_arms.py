"""Arms are composed before anything starts, all mistakes of all of them at once, and must learn from the same text."""

from __future__ import annotations

import pytest

from ngpt.comparison.arms import compose_arms, differing, requested
from ngpt.comparison.process import train_command
from ngpt.config.problems import ConfigError

COMMON = ["data=synthetic", "trainer.max_steps=7", "model=llama_20m"]


def arms(*named: str, common: list[str] = COMMON, allow: tuple[str, ...] = ()):
    return compose_arms(common, [requested(words.split(" ")) for words in named], allow=allow)


def problems(*named: str, **keywords) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        arms(*named, **keywords)
    return refused.value.problems


def test_an_arms_overrides_come_after_the_common_ones():
    first, second = arms("a", "b optimizer=adamw trainer.max_steps=9 optimizer.lr=0.5", allow=("tokens",))
    assert (first.config.optimizer.name, first.own) == ("natural_galore", ())
    assert (second.config.optimizer.name, second.config.optimizer.lr, second.config.trainer.max_steps) == ("adamw", 0.5, 9)
    assert second.overrides == (*COMMON, *second.own)


def test_overrides_may_stand_together_in_one_word_and_lists_with_blanks_stay_whole():
    assert requested(["a", "optimizer=adamw  optimizer.lr=0.5", "seed=1"]).words == ("optimizer=adamw", "optimizer.lr=0.5", "seed=1")
    assert requested(["a", "data.train_files=[a b/*.gz,it's]"]).words == ("data.train_files=[a b/*.gz,it's]",)
    assert requested(["a", "data.train_files=[a b/*.gz]"]).words == ("data.train_files=[a b/*.gz]",)


def test_all_mistakes_of_all_arms_are_listed_at_once():
    found = problems("a optimizer=adam", "b optimizer.rnk=8", "c trainer.grad_clip=-1", "d", common=[*COMMON, "trainer.max_stps=3"])
    assert found[0] == "trainer.max_stps = 3: no such setting; did you mean trainer.max_steps?", "what all arms have is said once"
    assert any(line.startswith("a: optimizer = adam: ") and "did you mean optimizer=adamw?" in line for line in found)
    assert "b: optimizer.rnk = 8: no such setting; did you mean optimizer.rank?" in found
    assert any(line.startswith("c: trainer.grad_clip = -1") for line in found)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("kind", "override", "setting"),
    [
        ("tokens", "trainer.max_steps=8", "trainer.max_steps = 7 (a), 8 (b)"),
        ("tokens", "trainer.seq_len=128", "trainer.seq_len = 256 (a), 128 (b)"),
        ("tokens", "trainer.global_batch_size=256", "trainer.global_batch_size = 512 (a), 256 (b)"),
        ("data", "data.streams=4", "data.streams = 8 (a), 4 (b)"),
        ("data", "data.document_tokens=64", "data.document_tokens = 512 (a), 64 (b)"),
        ("held-out", "eval.max_tokens=5", "eval.max_tokens = 10000000 (a), 5 (b)"),
    ],
)
def test_arms_that_do_not_learn_from_the_same_are_refused_unless_asked_for(kind, override, setting):
    found = problems("a", f"b {override}")
    assert any(line.startswith(setting) and line.endswith(f"or add --allow-different {kind}") for line in found)
    other = {"tokens": "data"}.get(kind, "tokens")
    assert problems("a", f"b {override}", allow=(other,)) == found
    allowed = arms("a", f"b {override}", allow=(kind,))
    assert any(line.startswith(setting) for line in differing(allowed)), "and the report says so"


def test_the_same_budget_may_be_said_in_steps_or_in_tokens():
    tokens = 7 * 512 * 256
    assert len(arms(f"a trainer.max_steps=null trainer.max_tokens={tokens}", "b")) == 2


def test_what_does_not_change_the_text_may_differ():
    assert differing(arms("a", "b data.prefetch_batches=1 trainer.micro_batch_size=8 eval.every_steps=2 scheduler=wsd")) == []


def test_another_model_is_compared_where_an_arm_names_it_and_not_where_it_comes_unnoticed():
    assert len(arms("a", "b model.hidden_size=512")) == 2
    common = ["data=synthetic", "data.packing=pad", "tokenizer.path=null", "trainer.max_steps=7", "scheduler.warmup_steps=0"]
    experiments = [f"{size} experiment=c4_{size}_galore" for size in ("60m", "130m")]
    with pytest.raises(ConfigError, match=r"model.hidden_size = 512 .60m., 768 .130m.: arms train the same model"):
        compose_arms([], [requested([name, experiment, *common]) for name, experiment in (words.split(" ") for words in experiments)])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed=3", "seed=3: is set by the comparison; give --seeds 0,1,2"),
        ("run.name=x", "run.name=x: is set by the comparison; the folder of a run is named"),
        ("+resume=never", "+resume=never: is set by the comparison"),
        ("adamw", "adamw: is no override; write SETTING=VALUE"),
        ("eval.at_end=false", "b: eval.at_end = false: arms are judged by the evaluation at their end; leave it true"),
    ],
)
def test_what_an_arm_cannot_set_is_refused_with_the_right_way(word: str, said: str):
    assert any(line.startswith(said) for line in problems("a", f"b {word}"))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["a"], "--arm = a: a comparison has two arms or more"),
        ([], "--arm = none: a comparison has two arms or more"),
        (["a", "a optimizer=adamw"], "--arm = a: two arms have this name"),
        (["optimizer=adamw", "b"], "--arm = optimizer=adamw: this is an override"),
        (["a/b", "b"], "--arm = a/b: an arm's name has letters"),
    ],
)
def test_a_comparison_that_is_none_is_refused(named: list[str], said: str):
    assert problems(*named)[0].startswith(said)


def test_several_values_stand_for_several_arms():
    assert [arm.label for arm in arms("a optimizer.lr=0.1,0.2", "b")] == ["a-optimizer.lr=0.1", "a-optimizer.lr=0.2", "b"]


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("torchrun --standalone --nproc_per_node 2", "torchrun --standalone --nproc_per_node 2 -m ngpt.train seed=1"),
        ("deepspeed --num_gpus 2", "deepspeed --num_gpus 2 --module ngpt.train seed=1"),
        ("python -m deepspeed.launcher.runner --num_gpus 2", "python -m deepspeed.launcher.runner --num_gpus 2 --module ngpt.train seed=1"),
        ("bash launch/torchrun.sh", "bash launch/torchrun.sh seed=1"),
        ("srun --ntasks 8 python", "srun --ntasks 8 python -m ngpt.train seed=1"),
    ],
)
def test_each_launcher_is_told_of_the_trainer_in_its_own_words(launcher: str, command: str):
    assert train_command(launcher.split(), ["seed=1"]) == command.split()
