"""Text from a model: the cache changes nothing but time, choices follow their rules, and characters come whole."""

from __future__ import annotations

import pytest
import torch

from ngpt.generate import main
from ngpt.generation import Choice, TextStream, encode_prompt, generate
from ngpt.model.cache import KeyValueCache
from ngpt.trained import open_trained


@pytest.fixture(scope="module")
def trained(small_run):
    return open_trained(small_run.folder)


def test_logits_with_a_cache_are_those_of_the_whole_sequence(trained):
    model, config = trained.model, trained.source.config
    ids = torch.randint(config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(config, batch_size=3, capacity=40, device=ids.device, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids)
        assert expected.std() > 0.1
        start = 0
        for length in (7, 1, 1, 5, 26):
            logits = model.next_logits(ids[:, start : start + length], cache)
            start += length
            torch.testing.assert_close(logits, expected[:, start - 1], atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="41 tokens do not fit into a cache of 40"):
            model.next_logits(ids[:, :1], cache)
    with pytest.raises(ValueError, match=r"65 tokens are more than model\.max_seq_len=64"):
        KeyValueCache(config, batch_size=1, capacity=65, device=ids.device, dtype=torch.float32)


def test_greedy_text_is_that_of_the_model_run_anew_for_each_token(trained):
    expected = [5, 9, 3]
    with torch.no_grad():
        for _ in range(20):
            expected.append(int(trained.model(torch.tensor([expected]))[0, -1].argmax()))
    got = [row[0] for row in generate(trained.model, [5, 9, 3], Choice(temperature=0), num_tokens=20, seed=0)]
    assert got == expected[3:]


def test_a_sample_is_the_same_alone_and_beside_others_and_leaves_the_global_generator_alone(trained):
    before = torch.get_rng_state()

    def samples(count: int, seed: int) -> list[list[int]]:
        rows = generate(trained.model, [5, 9], Choice(temperature=1.5), num_tokens=12, seed=seed, samples=count)
        return [list(column) for column in zip(*rows, strict=True)]

    alone, beside = samples(1, 7), samples(3, 7)
    assert alone[0] == beside[0]
    assert len({tuple(sample) for sample in beside}) == 3
    assert samples(1, 8) != alone
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_ends_at_eos_and_the_others_go_on(trained):
    free = list(generate(trained.model, [5, 9], Choice(temperature=1.5), num_tokens=12, seed=7, samples=3))
    eos = free[4][1]
    ending = list(generate(trained.model, [5, 9], Choice(temperature=1.5), num_tokens=12, seed=7, samples=3, eos_id=eos))
    for sample in range(3):
        whole = [row[sample] for row in free]
        cut = whole.index(eos) if eos in whole else len(whole)
        assert [row[sample] for row in ending if row[sample] is not None] == whole[:cut]
    assert len(list(generate(trained.model, [5, 9], Choice(temperature=1.5), num_tokens=12, seed=7, eos_id=free[2][0]))) <= 2


def test_top_k_and_top_p_keep_the_most_probable_tokens_and_their_proportions():
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()

    def close(choice: Choice, expected: list[float]) -> None:
        torch.testing.assert_close(choice.probabilities(logits), torch.tensor(expected))

    close(Choice(1.0), [0.5, 0.05, 0.3, 0.15])
    close(Choice(1.0, top_k=2), [0.625, 0, 0.375, 0])
    close(Choice(1.0, top_p=0.8), [0.625, 0, 0.375, 0])
    close(Choice(1.0, top_p=0.81), [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95])
    close(Choice(1.0, top_p=1e-9), [1.0, 0, 0, 0])
    close(Choice(0.5, top_k=2), [0.25 / 0.34, 0, 0.09 / 0.34, 0])
    drawn = [Choice(1.0, top_k=2).draw(logits, generator) for generator in [torch.Generator().manual_seed(0)] for _ in range(400)]
    assert set(drawn) == {0, 2}
    assert drawn.count(0) / 400 == pytest.approx(0.625, abs=0.08)


@pytest.mark.parametrize("settings", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_a_choice_out_of_bounds_is_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        Choice(**settings)


@pytest.mark.parametrize("text", ["river garden", "€uro — 日本 🙂🙂 café", "a\n\n b", "🙂", "\n"])
def test_text_comes_as_it_is_made_and_characters_come_whole(small_run, text):
    tokenizer = small_run.tokenizer
    for prompt in ("orbit", "\n", ""):
        ids = encode_prompt(tokenizer, prompt, None)
        stream, said = TextStream(tokenizer, ids), []
        tokens = tokenizer.encode([text])[0]
        for token in tokens:
            said.append(stream.add(token))
            assert "\ufffd" not in said[-1]
        assert "".join(said) + stream.rest() == tokenizer.decode(ids + tokens)[len(tokenizer.decode(ids)) :]
        assert sum(map(bool, said)) > 1 or len(tokens) < 3 or text == "🙂"


def test_bytes_that_are_no_character_are_said_at_the_end(small_run):
    tokenizer = small_run.tokenizer
    first_byte = tokenizer.encode(["🙂"])[0][1]
    stream = TextStream(tokenizer, tokenizer.encode(["orbit"])[0])
    assert stream.add(first_byte) == ""
    assert stream.rest() == "\ufffd"


def test_the_command_writes_prompt_and_text(small_run, capsys):
    arguments = [str(small_run.folder), "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*arguments, "--prompt", "river garden", "--prompt", "", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("river garden")
    assert captured.err.count("small step 4]") == 2
    assert main([*arguments, "--prompt", "river", "--samples", "2", "--seed", "3"]) == 0
    together = capsys.readouterr().out
    assert main([*arguments, "--prompt", "river", "--seed", "3"]) == 0
    assert together.split("--- sample ")[1] == "1\n" + capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompt", "x", "--temperature", "-1"], "--temperature = -1.0: must be at least 0"),
        (["--prompt", "river " * 100], "the model's longest sequence is 64 tokens"),
        (["--prompt", "x", "--device", "cuda"], "torch sees no NVIDIA GPU"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(small_run, capsys, arguments, complaint):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([str(small_run.folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_misspelt_option_is_answered_with_the_right_one(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["runs/x", "--promt", "a"])
    assert stopped.value.code == 2
    assert "--promt: no such option; did you mean --prompt?" in capsys.readouterr().err
