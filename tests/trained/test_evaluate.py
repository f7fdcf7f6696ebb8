"""A model is measured as training measures it, on any text; and lm-eval's tasks get the model's own numbers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ngpt import evaluate as command
from ngpt.config.llama_folder import llama_config
from ngpt.evaluate import main
from ngpt.trained import find_source, open_trained

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: the extra [eval]")


def results(arguments, tmp_path) -> list[dict]:
    path = tmp_path / "scores.json"
    assert main([*map(str, arguments), "--device", "cpu", "--json", str(path)]) == 0
    return json.loads(path.read_text())["results"]


def only_val(record: dict) -> dict:
    return {name: value for name, value in record.items() if name.startswith(("val/", "step", "tokens"))}


@pytest.fixture(scope="module")
def llama_folder(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    source = find_source(small_run.folder)
    (folder / "config.json").write_text(json.dumps(llama_config(source.config, dtype="float32", token_ids={})))
    for name in ("model.safetensors", "tokenizer.model"):
        shutil.copy(source.folder / name, folder)
    return folder


def test_a_checkpoint_scores_what_training_recorded_to_the_last_bit(small_run, tmp_path, capsys):
    recorded = [only_val(record) for record in small_run.records() if "val/loss" in record]
    assert [only_val(record) for record in results([small_run.folder, "--steps", "all"], tmp_path)] == recorded
    assert recorded[0]["val/loss"] != recorded[1]["val/loss"]
    assert f"{recorded[1]['val/perplexity']:.2f}" in capsys.readouterr().out
    assert only_val(results([small_run.step(2)], tmp_path)[0]) == recorded[0]


def test_a_llama_folder_scores_as_the_run_on_the_same_text(small_run, llama_folder, text_folder, tmp_path):
    same = ["--data", text_folder / "corpus.jsonl", "--seq-len", "24", "--max-tokens", "400", "--batch-size", "4"]
    (of_run,), (of_folder,) = results([small_run.folder, *same], tmp_path), results([llama_folder, *same], tmp_path)
    assert of_folder["val/loss"] == pytest.approx(of_run["val/loss"], rel=1e-6)  # logits come in chunks of another size
    assert of_run["val/tokens"] == 400


def test_all_text_that_is_named_counts(small_run, tmp_path):
    texts = ["river garden", "orbit thunder marble. " * 9]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (record,) = results([small_run.folder, "--data", tmp_path / "two.jsonl"], tmp_path)
    trained = open_trained(small_run.folder)
    ids = [index for text in texts for index in [*trained.tokenizer.encode([text])[0], trained.tokenizer.eos_id]]
    assert record["val/tokens"] == len(ids) - 1
    rows = [torch.tensor([ids[start : start + 25]]) for start in range(0, len(ids) - 1, 24)]
    loss = sum(F.cross_entropy(trained.model(row[:, :-1])[0], row[0, 1:], reduction="sum") for row in rows)
    assert record["val/loss"] == pytest.approx(float(loss) / (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["LLAMA"], "has no held-out text: give --data GLOB or --builtin"),
        (["LLAMA", "--steps", "all"], "is no run folder with checkpoints"),
        (["RUN", "--steps", "2,3"], "there is no step 3; there are 2, 4"),
        (["RUN", "--seq-len", "65"], "the model's longest sequence is 64 tokens"),
        (["RUN", "--data", "nothing/*.jsonl"], "nothing/*.jsonl"),
        (["RUN", "--tasks", "x", "--builtin"], "--tasks brings its own text"),
    ],
)
def test_a_mistake_is_named_and_gives_code_2(small_run, llama_folder, capsys, arguments, complaint):
    if "--tasks" in arguments and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    places = {"RUN": str(small_run.folder), "LLAMA": str(llama_folder)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error


def test_without_the_extra_tasks_say_how_to_install_it(small_run, capsys, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main([str(small_run.folder), "--tasks", "hellaswag"]) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ lm-eval
@pytest.fixture(scope="module")
def harness(small_run):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: the extra [eval]")
    from ngpt.harness import HarnessModel

    return HarnessModel(open_trained(small_run.folder), batch_size=3)


class Request:
    """What lm-eval asks of a model."""

    def __init__(self, *args):
        self.args = args


def log_probability(trained, ids: list[int], count: int) -> float:
    """Of the last `count` tokens, by the model's plain forward."""
    with torch.no_grad():
        log_probs = trained.model(torch.tensor([ids[:-1]]))[0].log_softmax(dim=-1)
    return float(sum(log_probs[i - 1, ids[i]] for i in range(len(ids) - count, len(ids))))


def test_lm_eval_gets_the_models_log_probabilities(harness, small_run):
    trained = open_trained(small_run.folder)
    pairs = [("river garden", " orbit"), ("a\nb ", "velvet marble"), ("", "copper"), ("thunder " * 90, "lantern river"), ("x", " ed")]
    scores = harness.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, rest), (score, greedy) in zip(pairs, scores, strict=True):
        whole = trained.tokenizer.encode([context + rest])[0]
        own = trained.tokenizer.encode([context.rstrip(" ")])[0] if context else [trained.tokenizer.eos_id]
        ids = (whole if context else own + whole)[-65:]
        count = len(whole) - (len(own) if context else 0)
        assert score == pytest.approx(log_probability(trained, ids, count), abs=1e-4)
        assert isinstance(greedy, bool)


def test_lm_eval_rolls_over_long_texts(harness, small_run):
    trained, text = open_trained(small_run.folder), "thunder lantern " * 90
    ids = [trained.tokenizer.eos_id, *trained.tokenizer.encode([text])[0]]
    assert len(ids) > 130
    # Windows of at most 64 tokens, the first one behind EOS, each later one behind the token before it; the last one filled from the left.
    expected, start = log_probability(trained, ids[:65], 64), 65
    while start < len(ids):
        end = min(start + 64, len(ids))
        expected += log_probability(trained, ids[end - 65 : end], end - start)
        start = end
    assert harness.loglikelihood_rolling([Request(text)]) == [pytest.approx(expected, abs=1e-2)]


def test_lm_eval_gets_greedy_text_up_to_a_stop(harness):
    (free,) = harness.generate_until([Request("river", {"max_gen_toks": 20})])
    stop = free[3:5]
    assert harness.generate_until([Request("river", {"max_gen_toks": 20, "until": [stop]})]) == [free[: free.find(stop)]]
    sampled = harness.generate_until([Request("river", {"max_gen_toks": 20, "do_sample": True, "temperature": 2.0})])
    assert sampled != [free]


@needs_lm_eval
@pytest.mark.slow
def test_a_task_of_ones_own_runs_without_network(small_run, tmp_path, capsys, monkeypatch):
    questions = [{"question": "river", "choices": ["garden", "zzz qqq xxx"], "answer": 0} for _ in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "own.yaml").write_text(
        "task: own_task\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    scores = tmp_path / "scores.json"
    assert main([str(small_run.folder), "--tasks", "own_task", "--include-path", str(tmp_path), "--json", str(scores)]) == 0
    assert "own_task" in capsys.readouterr().out
    ((name, found),) = json.loads(scores.read_text())["tasks"].items()
    assert name == "small step 4"
    assert found["own_task"]["acc,none"] == 1.0
    monkeypatch.setattr("ngpt.harness.TaskManager", lambda **_options: SimpleNamespace(all_tasks=["own_task"]))
    assert main([str(small_run.folder), "--tasks", "own_task,of_nobody"]) == 2
    assert "--tasks of_nobody: lm-eval knows no such task" in capsys.readouterr().err
