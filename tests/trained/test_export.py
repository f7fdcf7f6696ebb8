"""What an export writes is what transformers loads: the same logits, the same token ids; and nothing of the user's is overwritten."""

from __future__ import annotations

import io
import json
import random

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from ngpt.data.builtin import standard_library_prose
from ngpt.data.tokenizer import Tokenizer
from ngpt.export import main
from ngpt.export_check import AWKWARD
from ngpt.hugging_face_tokenizer import tokenizer_files
from ngpt.trained import open_trained

tokenizers = pytest.importorskip("tokenizers")
TEXTS = [document.text[:3000] for document in standard_library_prose()[:60]]


def unigram(**options) -> Tokenizer:
    return trained_on_prose(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **options)


def trained_on_prose(**options) -> Tokenizer:
    model, lines = io.BytesIO(), [line for text in TEXTS for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, minloglevel=2, num_threads=1, **options)
    return Tokenizer(model.getvalue())


KINDS = {
    "ours": lambda: unigram(vocab_size=1200, byte_fallback=True, user_defined_symbols=["\n"]),
    "t5": lambda: unigram(vocab_size=1200),
    "llama": lambda: trained_on_prose(
        model_type="bpe", vocab_size=800, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_converted_tokenizer_gives_sentencepieces_ids_and_text(kind):
    ours = KINDS[kind]()
    converted = tokenizers.Tokenizer.from_str(tokenizer_files(ours, max_tokens=64)["tokenizer.json"].decode())
    letters, generator = "ab z.\n\t€é日🙂½ \u00a0\u200b", random.Random(0)
    scrambled = ["".join(generator.choices(letters, k=generator.randint(1, 12))) for _ in range(300)]
    for text in [*AWKWARD, *scrambled, *TEXTS]:
        ids = converted.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode([text])[0], repr(text)
        if kind != "t5" or 2 not in ids:  # without bytes to spell it, what is unknown is "\u2047" to one and nothing to the other
            assert converted.decode(ids) == ours.decode(ids), repr(text)
    assert converted.get_vocab_size() == ours.vocab_size
    assert converted.token_to_id("</s>") == ours.eos_id


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert main([str(small_run.folder), "--to", str(folder)]) == 0
    return folder


def test_a_run_comes_back_from_its_export(small_run, exported):
    ours, back = open_trained(small_run.folder), open_trained(exported)
    for (name, weight), (_, expected) in zip(back.model.named_parameters(), ours.model.named_parameters(), strict=True):
        assert torch.equal(weight, expected), name
    assert back.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert back.source.bos_id is None
    card = (exported / "README.md").read_text()
    assert f"loss {small_run.records()[-1]['val/loss']:.4f} nats" in card
    assert "Trained with ngpt for 4 steps (384 tokens) on data=local_c4 with adamw" in card
    assert str(small_run.folder) not in "".join(path.read_text(errors="ignore") for path in exported.iterdir())


def test_shards_and_dtype_are_as_asked(small_run, tmp_path, capsys):
    assert main([str(small_run.step(2)), "--to", str(tmp_path / "model"), "--max-shard-size", "20KB", "--dtype", "bf16"]) == 0
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 25_000 for path in files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    expected = load_file(small_run.step(2) / "model.safetensors")
    assert all(torch.equal(tensors[name], weight.bfloat16()) for name, weight in expected.items())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert open_trained(tmp_path / "model").model.lm_head.weight.dtype is torch.bfloat16
    # From one folder to another: one file again, the tokenizer as it was.
    assert main([str(tmp_path / "model"), "--to", str(tmp_path / "whole"), "--dtype", "fp32"]) == 0
    assert (tmp_path / "whole" / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == expected.keys()
    assert "bfloat16" in capsys.readouterr().out


def test_a_folder_is_replaced_on_request_only_and_never_with_files_of_others(small_run, tmp_path, capsys, monkeypatch):
    target, arguments = tmp_path / "model", [str(small_run.folder), "--to", str(tmp_path / "model")]
    assert main(arguments) == 0
    before = (target / "model.safetensors").stat().st_ino
    assert main(arguments) == 2
    assert "is there already; give another folder, or --force" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("ngpt.export._card", lambda source: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*arguments, "--force"])
    assert (target / "model.safetensors").stat().st_ino == before
    assert main([*arguments, "--force"]) == 0
    assert (target / "model.safetensors").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (target / "thesis.txt").write_text("years of work")
    assert main([*arguments, "--force"]) == 2
    assert "has files that no export has written (thesis.txt)" in capsys.readouterr().err
    assert (target / "thesis.txt").exists()


@pytest.mark.slow
def test_transformers_loads_it_offline_and_agrees(small_run, exported, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target = tmp_path / "model"
    assert main([str(small_run.folder), "--to", str(target), "--verify", "--max-shard-size", "20KB"]) == 0
    said = capsys.readouterr().out
    assert "awkward texts, 0 differ" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ours = open_trained(exported)
    ids = tokenizer("river garden\n  naïve 🙂", return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.tokenizer.encode(["river garden\n  naïve 🙂"])[0]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours.model(ids), atol=1e-5, rtol=0)
    written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert model.generation_config.eos_token_id == ours.tokenizer.eos_id
    assert written.shape[1] > ids.shape[1]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id) == (1, 0, 2, None)
    # A broken export is told.
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    from ngpt import export_check

    monkeypatch.setattr(export_check, "open_trained", lambda *_args, **_kwargs: open_trained(exported))
    assert not export_check.check_export(target, ours.tokenizer).passed
