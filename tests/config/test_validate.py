"""Validation: what every rule says, all of it at once, and nothing about configurations that are right."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from ngpt.config.file_rules import vocabulary_problem
from ngpt.config.optimizers import (
    AdamWConfig,
    AdaRankGradConfig,
    GaLoreConfig,
    LoRAConfig,
    NaturalGaLoreConfig,
    OptimizerConfig,
    ReLoRAConfig,
)
from ngpt.config.schema import (
    BuiltinDataConfig,
    C4DataConfig,
    EngineConfig,
    LocalC4DataConfig,
    RunConfig,
    TokenizedDataConfig,
    WSDSchedulerConfig,
    engine_of_launch,
)
from ngpt.config.validate import ConfigError, validate

Problems = Callable[..., list[str]]


def put(config: RunConfig, path: str, value: object) -> None:
    section, _, name = path.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)


# What is changed in a valid configuration -> the only line that it gets. 60M: 512 wide, 8 heads, 8 blocks; 100 steps of 512 rows.
RULES = {
    "at least": ({"optimizer.rank": 0}, "optimizer.rank = 0: must be at least 1; the default is 128"),
    "above": ({"optimizer.lr": 0.0}, "optimizer.lr = 0.0: must be above 0; the default is 0.01"),
    "at most": ({"scheduler.min_lr_ratio": 1.5}, "scheduler.min_lr_ratio = 1.5: must be at least 0 and at most 1; the default is 0.1"),
    "below": ({"scheduler.warmup_fraction": 1.0}, "scheduler.warmup_fraction = 1.0: must be at least 0 and below 1; the default is 0.1"),
    "not a number": ({"optimizer.lr": float("nan")}, "optimizer.lr = nan: must be finite and above 0; the default is 0.01"),
    "infinite": ({"trainer.grad_clip": float("inf")}, "trainer.grad_clip = inf: must be finite and at least 0; the default is 0.0"),
    "no default": ({"trainer.peak_flops": -1.0}, "trainer.peak_flops = -1.0: must be above 0; correct it or leave it out"),
    "choice with a near one": (
        {"trainer.precision": "bf16_neares"},
        "trainer.precision = bf16_neares: must be one of fp32, bf16, bf16_nearest, bf16_master; "
        "did you mean trainer.precision=bf16_nearest?",
    ),
    "choice": ({"trainer.device": "tpu"}, "trainer.device = tpu: must be one of auto, cpu, cuda; set trainer.device=auto"),
    "name of a group": (
        {"optimizer.name": "adamw"},
        "optimizer.name = adamw: only repeats the choice of the group, natural_galore; choose with optimizer=adamw",
    ),
    "width and heads": (
        {"model.num_attention_heads": 7},
        "model.hidden_size = 512: must be a multiple of num_attention_heads = 7; "
        "set model.hidden_size=504 or 518, or model.num_attention_heads=4 or 8",
    ),
    "odd heads": (
        {"model.hidden_size": 504, "trainer.max_steps": 50},
        "model.hidden_size = 504: must give every head an even width (rotary embeddings turn pairs), 8 heads are 63 wide; "
        "set model.hidden_size=496 or 512",
    ),
    "key/value heads": (
        {"model.num_key_value_heads": 3},
        "model.num_key_value_heads = 3: must divide num_attention_heads = 8; set model.num_key_value_heads=2 or 4",
    ),
    "sequence length": (
        {"trainer.seq_len": 2048},
        "trainer.seq_len = 2048: must be at most model.max_seq_len = 1024; set trainer.seq_len=1024 or model.max_seq_len=2048",
    ),
    "padded rows of one token": (
        {"trainer.seq_len": 1, "data.packing": "pad"},
        "trainer.seq_len = 1: must be at least 2 with data.packing=pad, where the last position of a row predicts nothing; "
        "set trainer.seq_len=256",
    ),
    "no length": (
        {"trainer.max_steps": None},
        "trainer.max_steps = null: one of trainer.max_steps and trainer.max_tokens must be given; set trainer.max_steps=10000",
    ),
    "two lengths": (
        {"trainer.max_tokens": 1000},
        "trainer.max_steps = 100: only one of trainer.max_steps and trainer.max_tokens = 1000 may be given; set one of them to null",
    ),
    "batch arithmetic": (
        {"trainer.global_batch_size": 500},
        "trainer.global_batch_size = 500: must be a multiple of micro_batch_size * processes = 16 * 1; "
        "set trainer.global_batch_size=496 or 512, or trainer.micro_batch_size=10 or 20",
    ),
    "batch below a micro-batch": (
        {"trainer.global_batch_size": 8},
        "trainer.global_batch_size = 8: must be a multiple of micro_batch_size * processes = 16 * 1; "
        "set trainer.global_batch_size=16, or trainer.micro_batch_size=8",
    ),
    "checkpointing policy": (
        {"trainer.activation_checkpointing": "every_0"},
        "trainer.activation_checkpointing = every_0: must be off, full or every_K with K >= 1; "
        "set trainer.activation_checkpointing=every_2",
    ),
    "checkpointing too far apart": (
        {"trainer.activation_checkpointing": "every_9"},
        "trainer.activation_checkpointing = every_9: recomputes nothing, the model has 8 blocks; "
        "set trainer.activation_checkpointing=off or full",
    ),
    "rank": (
        {"optimizer.rank": 512},
        "optimizer.rank = 512: must be below the short side of every projected matrix; q_proj of model=llama_60m is 512 x 512; "
        "set optimizer.rank=128 (a quarter is usual, 511 the largest)",
    ),
    "rank of grouped queries": (
        {"model.num_key_value_heads": 1},
        "optimizer.rank = 128: must be below the short side of every projected matrix; k_proj of model=llama_60m is 64 x 512; "
        "set optimizer.rank=16 (a quarter is usual, 63 the largest)",
    ),
    "rank of adapters": (
        {"optimizer": LoRAConfig(rank=512)},
        "optimizer.rank = 512: must be below the short side of every adapted matrix; q_proj of model=llama_60m is 512 x 512; "
        "set optimizer.rank=128 (a quarter is usual, 511 the largest)",
    ),
    "factor of adapters": (
        {"optimizer": LoRAConfig(lora_alpha=0.0)},
        "optimizer.lora_alpha = 0.0: must be above 0; the default is 32.0",
    ),
    "no updates between merges": (
        {"optimizer": ReLoRAConfig(merge_every=0)},
        "optimizer.merge_every = 0: must be at least 1; the default is 1000",
    ),
    "warm-up up to the next merge": (
        {"optimizer": ReLoRAConfig(merge_every=100)},
        "optimizer.restart_warmup_steps = 100: must be below merge_every = 100, or the learning rate never gets back to the schedule's; "
        "set optimizer.restart_warmup_steps=10",
    ),
    "share of moments": (
        {"optimizer": ReLoRAConfig(prune=1.1)},
        "optimizer.prune = 1.1: must be at least 0 and at most 1; the default is 0.99",
    ),
    "betas": (
        {"optimizer.betas": [0.9]},
        "optimizer.betas = [0.9]: must be two numbers, each at least 0 and below 1; set optimizer.betas='[0.9,0.999]'",
    ),
    "beta of one": (
        {"optimizer.betas": [0.9, 1.0]},
        "optimizer.betas = [0.9,1.0]: must be two numbers, each at least 0 and below 1; set optimizer.betas='[0.9,0.999]'",
    ),
    "immediate updates of several micro-batches": (
        {"optimizer.apply": "immediate"},
        "optimizer.apply = immediate: changes weights inside backward, so an update must be one micro-batch, here it is 32; "
        "set optimizer.apply=deferred, or trainer.micro_batch_size=512",
    ),
    "spikes that immediate updates cannot skip": (
        {"optimizer.apply": "immediate", "trainer.micro_batch_size": 512, "trainer.on_spike": "skip"},
        "trainer.on_spike = skip: cannot drop an update that optimizer.apply=immediate has made inside backward; "
        "set trainer.on_spike=log or rollback, or optimizer.apply=deferred",
    ),
    "spikes without a checkpoint to go back to": (
        {"trainer.on_spike": "rollback", "checkpoint.every_steps": 0},
        "trainer.on_spike = rollback: needs a checkpoint to go back to, and checkpoint.every_steps = 0 writes none on the way; "
        "set checkpoint.every_steps=1000",
    ),
    "immediate updates and clipping": (
        {"optimizer.apply": "immediate", "trainer.micro_batch_size": 512, "trainer.grad_clip": 1.0},
        "optimizer.apply = immediate: cannot clip by the global norm, no gradient waits for the others (trainer.grad_clip = 1.0); "
        "set optimizer.apply=deferred or trainer.grad_clip=0",
    ),
    "nothing to stagger": (
        {"optimizer.update_proj_gap": 1},
        "optimizer.stagger = true: has nothing to spread with update_proj_gap = 1, where every step refreshes every matrix; "
        "set optimizer.stagger=false or a larger optimizer.update_proj_gap",
    ),
    "second moment beside a diagonal Fisher": (
        {"optimizer": NaturalGaLoreConfig(fisher="diagonal", moments="adam")},
        "optimizer.moments = adam: does not go with fisher=diagonal, which takes the place of the second moment; "
        "set optimizer.moments=momentum",
    ),
    "Fira's complement beside a diagonal Fisher": (
        {"optimizer": NaturalGaLoreConfig(fisher="diagonal", complement="fira")},
        "optimizer.complement = fira: does not go with fisher=diagonal, which scales what the projection dropped itself; "
        "set optimizer.complement=raw or none",
    ),
    "raw complement without a diagonal Fisher": (
        {"optimizer": NaturalGaLoreConfig(fisher="factored", complement="raw")},
        "optimizer.complement = raw: goes with fisher=diagonal alone, which scales it; here fisher=factored; "
        "set optimizer.complement=fira or none",
    ),
    "raw complement of two sides": (
        {"optimizer": NaturalGaLoreConfig(fisher="two_sided", complement="raw")},
        "optimizer.complement = raw: goes with fisher=diagonal alone, which scales it; here fisher=two_sided; "
        "set optimizer.complement=none",
    ),
    "complement of two sides": (
        {"optimizer": GaLoreConfig(proj_type="full", complement="fira")},
        "optimizer.complement = fira: cannot be added where both sides are projected; set optimizer.complement=none",
    ),
    "no such complement": (
        {"optimizer": GaLoreConfig(complement="raw")},
        "optimizer.complement = raw: must be one of none, fira; set optimizer.complement=none",
    ),
    "no such Fisher": (
        {"optimizer": NaturalGaLoreConfig(fisher="diagnal")},
        "optimizer.fisher = diagnal: must be one of history, two_sided, factored, diagonal, none; did you mean optimizer.fisher=diagonal?",
    ),
    "no such dtype of moments": (
        {"optimizer": AdamWConfig(state_dtype="8bits")},
        "optimizer.state_dtype = 8bits: must be one of fp32, bf16, 8bit; did you mean optimizer.state_dtype=8bit?",
    ),
    "few tokens to project": (
        {"optimizer.embeddings": True, "model.vocab_size": 128},
        "optimizer.embeddings = true: has nothing to project where model.vocab_size = 128 is not above optimizer.rank = 128; "
        "set optimizer.embeddings=false or a smaller optimizer.rank",
    ),
    "smallest rank above the largest": (
        {"optimizer": AdaRankGradConfig(rank=8, min_rank=9)},
        "optimizer.min_rank = 9: must not be above the largest rank, optimizer.rank = 8; set optimizer.min_rank=8 or lower",
    ),
    "share of the gradient": (
        {"optimizer": AdaRankGradConfig(energy=96.0)},
        "optimizer.energy = 96.0: must be above 0 and at most 1; the default is 0.96",
    ),
    "never converged": (
        {"optimizer": AdaRankGradConfig(converged_below=1.0)},
        "optimizer.converged_below = 1.0: must be at least 0 and below 1; the default is 0.5",
    ),
    "moments over a change of rank": (
        {"optimizer": AdaRankGradConfig(on_refresh="keep")},
        "optimizer.on_refresh = keep: cannot keep moments of one rank at another, and the rank of optimizer=adarankgrad adapts; "
        "set optimizer.on_refresh=rotate or reset",
    ),
    "warm-up": (
        {"scheduler.warmup_steps": 100},
        "scheduler.warmup_steps = 100: must leave steps after the warm-up, the run has 100; set scheduler.warmup_steps=10",
    ),
    "warm-up share": (
        {"scheduler.warmup_fraction": 0.9, "trainer.max_steps": 1},
        "scheduler.warmup_fraction = 0.9: must leave steps after the warm-up, the run has 1; set scheduler.warmup_steps=0",
    ),
    "decay": (
        {"scheduler": WSDSchedulerConfig(decay_fraction=0.95)},
        "scheduler.decay_fraction = 0.95: must leave room for the warm-up, 10 + 95 steps are more than the 100 of the run; "
        "set scheduler.decay_fraction=0.9 or less, or a shorter warm-up",
    ),
    "masks over padding": (
        {"data.packing": "pad", "data.mask_documents": True},
        "data.mask_documents = true: needs data.packing=pack, a padded row holds one document only; "
        "set data.mask_documents=false or data.packing=pack",
    ),
    "run name with folders": (
        {"run.name": "a/b"},
        "run.name = a/b: must be the name of one visible folder, without / and \\; set run.name=b; the folder above it is run.dir",
    ),
    "run name above": (
        {"run.name": ".."},
        "run.name = ..: must be the name of one visible folder, without / and \\; set run.name=my-run; the folder above it is run.dir",
    ),
    "no run name": (
        {"run.name": " "},
        "run.name =  : must be the name of one visible folder, without / and \\; set run.name= ; the folder above it is run.dir",
    ),
    "no run folder": ({"run.dir": ""}, "run.dir = : must name a folder; set run.dir=runs"),
    "resume": (
        {"resume": "atuo"},
        "resume = atuo: must be auto, never or an existing step folder; did you mean resume=auto?",
    ),
    "resume from nowhere": (
        {"resume": "runs/x/checkpoints/step-1"},
        "resume = runs/x/checkpoints/step-1: must be auto, never or an existing step folder; set resume=runs/NAME/checkpoints/step-0001000",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_named_with_value_and_fix_and_nothing_else_is(rule: str, config: RunConfig, problems_of: Problems):
    """Each rule of the settings broken in turn | named with value, rule and fix, and nothing else is"""
    changes, line = RULES[rule]
    for path, value in changes.items():
        put(config, path, value)
    assert problems_of(config) == [line]
    assert re.fullmatch(r"[\w.]+ = .*: .+; .+", line)


def test_a_valid_configuration_passes_unchanged(config: RunConfig):
    before = repr(config)
    validate(config)
    assert repr(config) == before


def test_all_problems_come_in_one_error(config: RunConfig):
    broken = ["at least", "choice", "sequence length", "no length", "batch arithmetic", "betas", "run name with folders", "resume"]
    for rule in broken:
        for path, value in RULES[rule][0].items():
            put(config, path, value)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert sorted(caught.value.problems) == sorted(RULES[rule][1] for rule in broken)
    assert str(caught.value) == "8 problems in the configuration:\n  " + "\n  ".join(caught.value.problems)


def test_a_wrong_value_does_not_trigger_the_rules_that_build_on_it(config: RunConfig, problems_of: Problems):
    config.model.num_attention_heads = 0
    config.trainer.micro_batch_size = -1
    config.trainer.seq_len = 0
    assert [line.partition(" = ")[0] for line in problems_of(config)] == [
        "model.num_attention_heads",
        "trainer.micro_batch_size",
        "trainer.seq_len",
    ]


def test_the_suggested_values_work(config: RunConfig, problems_of: Problems):
    config.trainer.global_batch_size = 500
    for rows in (496, 512):
        config.trainer.global_batch_size = rows
        assert problems_of(config) == []
    config.trainer.global_batch_size = 500
    for rows in (10, 20):
        config.trainer.micro_batch_size = rows
        assert problems_of(config) == []
    config.optimizer = GaLoreConfig(rank=511)
    assert problems_of(config) == []


def test_the_engine_follows_the_launch_and_local_is_for_one_process(config: RunConfig, problems_of: Problems):
    assert engine_of_launch(config.engine, 1) == "local"
    assert engine_of_launch(config.engine, 4) == "deepspeed"
    assert problems_of(config, world_size=4) == []
    config.engine.name = "local"
    assert problems_of(config, world_size=4) == [
        "engine.name = local: trains on one process, this launch has 4; set engine=auto, or start one: python -m ngpt.train ..."
    ]


def test_settings_of_the_engine_that_mean_nothing_here_are_refused(config: RunConfig, problems_of: Problems):
    config.engine.offload_optimizer = True
    config.engine.deepspeed = {"wall_clock_breakdown": True}
    assert [line.partition(" =")[0] for line in problems_of(config)] == ["engine.offload_optimizer", "engine.deepspeed"]
    assert problems_of(config, world_size=2) == []
    config.engine.zero_stage = 0
    assert [line.partition(" =")[0] for line in problems_of(config, world_size=2)] == ["engine.offload_optimizer"]
    config.engine = EngineConfig(zero_stage=4, timeout_seconds=0)
    assert [line.partition(" =")[0] for line in problems_of(config)] == ["engine.zero_stage", "engine.timeout_seconds"]


def test_relora_merges_whole_matrices_and_divides_no_state(config: RunConfig, problems_of: Problems):
    config.optimizer = ReLoRAConfig(rank=8)
    assert problems_of(config) == []
    assert problems_of(config, world_size=2)[0].startswith("engine.zero_stage = 1: divides the optimizer's state, and optimizer=relora")
    config.engine.zero_stage = 0
    assert problems_of(config, world_size=2) == []


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (AdamWConfig(), "optimizer.name = adamw"),
        (AdamWConfig(apply="immediate"), None),
        (GaLoreConfig(), None),
        (GaLoreConfig(apply="whole"), "optimizer.apply = whole"),
        (GaLoreConfig(complement="fira"), "optimizer.complement = fira"),
        (NaturalGaLoreConfig(), "optimizer.fisher = diagonal"),
        (NaturalGaLoreConfig(apply="immediate"), None),
        (NaturalGaLoreConfig(fisher="history"), None),
        (LoRAConfig(rank=8, apply="whole"), None),
    ],
    ids=lambda value: f"{value.name}-{value.apply}" if isinstance(value, OptimizerConfig) else "",
)
def test_forbidden_full_gradients_name_what_would_keep_them(config: RunConfig, problems_of: Problems, optimizer, named):
    config.optimizer = dataclasses.replace(optimizer, forbid_full_gradients=True)
    config.trainer.global_batch_size = config.trainer.micro_batch_size
    found = problems_of(config)
    assert [line.partition(":")[0] for line in found] == ([named] if named else [])


def test_batch_arithmetic_counts_the_processes(config: RunConfig, problems_of: Problems):
    config.trainer.global_batch_size = 48
    assert problems_of(config, world_size=2)[0] == (
        "trainer.global_batch_size = 48: must be a multiple of micro_batch_size * processes = 16 * 2; "
        "set trainer.global_batch_size=32 or 64, or trainer.micro_batch_size=12 or 24"
    )
    config.trainer.global_batch_size = 33
    assert problems_of(config, world_size=2)[0].endswith("; set trainer.global_batch_size=32 or 64")


def test_adamw_has_no_rank_to_check(config: RunConfig, problems_of: Problems):
    config.optimizer = AdamWConfig()
    config.model.num_key_value_heads = 1
    assert problems_of(config) == []


def test_the_vocabulary_of_the_model_must_hold_the_tokenizers():
    assert vocabulary_problem(32000, 32000) is None
    assert vocabulary_problem(32064, 32000) is None
    assert vocabulary_problem(4096, 32000) == (
        "model.vocab_size = 4096: must be at least the number of the tokenizer's pieces, 32000; "
        "set model.vocab_size=32000, or tokenizer.path to a smaller tokenizer"
    )


def test_training_and_held_out_text_of_the_hub_must_differ(config: RunConfig, problems_of: Problems):
    config.data = C4DataConfig(val_split="train")
    line = "data.val_split = train: must differ from data.train_split, or the model is judged by text that it was trained on; "
    assert problems_of(config, check_files=False) == [line + "set data.val_split=validation"]
    config.eval.every_steps, config.eval.at_end = 0, False
    assert problems_of(config, check_files=False) == []


# --------------------------------------------------------------------------------------------------------------- files
def test_text_needs_a_tokenizer_and_the_error_says_how_to_train_one(
    config: RunConfig, problems_of: Problems, folder: Path, tokenizer_model: bytes
):
    config.data = BuiltinDataConfig()
    train = "train one: python -m data_prep.train_tokenizer --builtin --vocab-size 32000 --out"
    assert problems_of(config) == [
        f"tokenizer.path = null: data=builtin needs a SentencePiece model; {train} tokenizer.model and set tokenizer.path=tokenizer.model"
    ]
    config.tokenizer.path = "missing.model"
    assert problems_of(config) == [f"tokenizer.path = missing.model: no such file; {train} missing.model"]
    config.tokenizer.path = "."
    assert problems_of(config)[0].startswith("tokenizer.path = .: must be a SentencePiece .model file, this is a folder; train one")
    config.tokenizer.path = "spiece.model"
    assert "bring spiece.model of t5-base from the hub, or train one" in problems_of(config)[0]
    (folder / "spiece.model").write_bytes(tokenizer_model)
    assert problems_of(config) == []


def test_the_tokenizers_vocabulary_is_checked_together_with_everything_else(
    config: RunConfig, problems_of: Problems, folder: Path, tokenizer_model: bytes
):
    (folder / "t.model").write_bytes(tokenizer_model)
    config.data, config.tokenizer.path = BuiltinDataConfig(), "t.model"
    config.model.vocab_size, config.optimizer.lr = 64, 0.0
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).vocab_size()
    assert pieces > 256
    assert problems_of(config) == [
        "optimizer.lr = 0.0: must be above 0; the default is 0.01",
        f"model.vocab_size = 64: must be at least the number of the tokenizer's pieces, {pieces}; "
        f"set model.vocab_size={pieces}, or tokenizer.path to a smaller tokenizer",
    ]
    config.model.vocab_size, config.optimizer.lr = pieces, 0.01
    assert problems_of(config) == []


def test_a_tokenizer_given_for_synthetic_text_is_checked_too(
    config: RunConfig, problems_of: Problems, folder: Path, tokenizer_model: bytes
):
    (folder / "t.model").write_bytes(tokenizer_model)
    config.tokenizer.path, config.model.vocab_size = "t.model", 64
    assert [line.partition(":")[0] for line in problems_of(config)] == ["model.vocab_size = 64"]


@pytest.mark.parametrize("contents", [b"", b"not a tokenizer"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(config: RunConfig, problems_of: Problems, folder: Path, contents: bytes):
    (folder / "broken.model").write_bytes(contents)
    config.data, config.tokenizer.path = BuiltinDataConfig(), "broken.model"
    assert problems_of(config) == [
        "tokenizer.path = broken.model: is no SentencePiece model; "
        "give one that `python -m data_prep.train_tokenizer` wrote, or spiece.model of t5-base from the hub"
    ]


def test_a_model_without_eos_is_refused(config: RunConfig, problems_of: Problems, folder: Path, model_without_eos: bytes):
    (folder / "t.model").write_bytes(model_without_eos)
    config.data, config.tokenizer.path = BuiltinDataConfig(), "t.model"
    assert problems_of(config) == ["tokenizer.path = t.model: has no EOS, which closes every document; train the model with eos_id >= 0"]


def test_plans_about_another_machine_open_no_tokenizer(config: RunConfig, problems_of: Problems, folder: Path):
    (folder / "broken.model").write_bytes(b"not a tokenizer")
    config.data, config.tokenizer.path = BuiltinDataConfig(), "broken.model"
    assert problems_of(config, check_files=False) == []


def test_the_tokenizer_is_trained_on_the_text_of_the_run(config: RunConfig, problems_of: Problems, folder: Path):
    (folder / "a.jsonl").touch()
    config.data = LocalC4DataConfig(train_files=["*.jsonl"])
    assert "train_tokenizer --files '*.jsonl' --vocab-size 32000" in problems_of(config)[0]


def test_a_path_may_start_at_the_home_folder(
    config: RunConfig, problems_of: Problems, folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_model: bytes
):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "t.model").write_bytes(tokenizer_model)
    config.tokenizer.path = "~/t.model"
    config.data = LocalC4DataConfig(train_files=["~/t.*"])
    assert problems_of(config) == []


def test_globs_must_match_something(config: RunConfig, problems_of: Problems, folder: Path, tokenizer_model: bytes):
    """Globs that match no file | refused before training"""
    config.tokenizer.path = str(folder / "t.model")
    (folder / "t.model").write_bytes(tokenizer_model)
    config.data = LocalC4DataConfig()
    assert problems_of(config) == [
        "data.train_files = []: data=local_c4 needs files to train on; set data.train_files='[corpus/*.json.gz]'"
    ]
    config.data = LocalC4DataConfig(train_files=["train-*.json.gz"], val_files=["val-*.json.gz"])
    assert problems_of(config) == [
        f"data.{name}_files = {name}-*.json.gz: matches no file (working directory {folder}); set data.{name}_files='[corpus/*.json.gz]'"
        for name in ("train", "val")
    ]
    for name in ("train-1.json.gz", "val-1.json.gz"):
        (folder / name).touch()
    assert problems_of(config) == []
    assert problems_of(config, check_files=False) == []


def test_no_file_is_trained_on_and_evaluated_on(config: RunConfig, problems_of: Problems, folder: Path, tokenizer_model: bytes):
    """A file in both data.train_files and data.val_files | refused"""
    config.tokenizer.path = str(folder / "t.model")
    (folder / "t.model").write_bytes(tokenizer_model)
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).touch()
    config.data = LocalC4DataConfig(train_files=["*.jsonl"], val_files=[str(folder / "b.jsonl")])
    assert problems_of(config) == [
        f"data.val_files = [{folder}/b.jsonl]: must share no file with train_files, both match {folder.resolve()}/b.jsonl; "
        "narrow one of the globs"
    ]
    (folder / "tokens").mkdir()
    (folder / "tokens/manifest.json").touch()
    config.data = TokenizedDataConfig(train_files=["tokens"], val_files=["tokens/manifest.json"])
    assert problems_of(config)[0].startswith("data.val_files = [tokens/manifest.json]: must share no file with train_files")


def test_resuming_needs_a_finished_step_folder(config: RunConfig, problems_of: Problems, folder: Path):
    step = folder / "runs/mine/checkpoints/step-0000010"
    step.mkdir(parents=True)
    config.resume = "runs/mine"
    assert problems_of(config) == [
        "resume = runs/mine: must be a step folder, this is a run folder; "
        "set resume=auto with run.name=mine, or resume=runs/mine/checkpoints/step-..."
    ]
    config.resume = str(step)
    assert problems_of(config) == [
        f"resume = {step}: is no finished checkpoint, it has no file .complete; choose another step folder, or resume=auto"
    ]
    (step / ".complete").touch()
    assert problems_of(config) == []


def test_runs_are_kept_in_a_folder(config: RunConfig, problems_of: Problems, folder: Path):
    (folder / "runs").touch()
    assert problems_of(config) == ["run.dir = runs: must be a folder, this is a file; set run.dir=runs"]
