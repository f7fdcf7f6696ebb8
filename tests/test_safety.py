"""Nothing that is read can run code or reach outside its folder, and nothing that is written tells a secret or is open to everybody."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngpt.checkpoint.integrity import Manifest
from ngpt.config.redaction import HIDDEN, redact, redact_argument, redact_settings

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = sorted(path for folder in ("ngpt", "data_prep", "bench", "launch", "docs", ".ci") for path in (REPOSITORY / folder).rglob("*.py"))
RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "tempfile.mktemp",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- code from outside
def dangers(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that comes from outside, or hands text to a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in RUNS_CODE)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN_CALLS:
            yield f"{node.lineno}: calls {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        if name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle", "False") != "False":
            yield f"{node.lineno}: numpy.load with pickles"
        yield from (f"{node.lineno}: {key}={given[key]}" for key in ("trust_remote_code", "shell") if given.get(key, "False") != "False")


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_module_can_run_what_it_reads(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
        "load(name, trust_remote_code=True)", "subprocess.run('ls', shell=True)", "os.system('ls')", "eval('1')", "yaml.load(text)",
    ],
)  # fmt: skip
def test_each_danger_would_be_seen(line: str) -> None:
    assert list(dangers(ast.parse(line)))


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "sub/file", "..", ".", "", "a\\b", ".hidden", "a\0b", "a\nb"])
def test_the_manifest_of_a_checkpoint_cannot_name_a_file_outside_its_folder(name: str) -> None:
    record = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    text = json.dumps({"format": "ngpt checkpoint", "version": 1, "run": "r", "step": 1, "ranks": 1, "files": {name: record}})
    with pytest.raises(ValueError, match="a file is called"):
        Manifest.from_bytes(text.encode())


# ------------------------------------------------------------------------------------------------------------- secrets
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@example.org/x.json", f"https://{HIDDEN}@example.org/x.json"),
        ("s3://bucket/x?X-Amz-Signature=abc&part=1", f"s3://bucket/x?X-Amz-Signature={HIDDEN}&part=1"),
        ("GET https://example.org/?token=abc failed", f"GET https://example.org/?token={HIDDEN} failed"),
        ("hf_abcdefghijklmnopqrstuvwxyz", HIDDEN),
        ("the key AKIAABCDEFGHIJKLMNOP is not valid", f"the key {HIDDEN} is not valid"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", HIDDEN),
        ("logger.api_key = abc: no such setting", f"logger.api_key = {HIDDEN} no such setting"),
        ("Ordinary text: tokens=5, keys, monkey=3, tokenizer.path=a.model", None),
        ("trainer.max_tokens=100 a@b.org http://example.org/a@b", None),
    ],
)
def test_what_looks_like_a_secret_is_hidden_and_nothing_else(text: str, shown: str | None) -> None:
    assert redact(text) == (text if shown is None else shown)


def test_values_of_the_environment_that_are_named_like_secrets_are_hidden_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "correct horse")
    monkeypatch.setenv("SHORT_TOKEN", "word")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long")
    assert redact("word: correct horse battery, false-but-long") == f"word: {HIDDEN} battery, false-but-long"


def test_settings_and_arguments_lose_the_values_of_secret_names_at_any_depth() -> None:
    settings = {"a": [{"api_key": "x", "path": "ftp://u:p@h/f"}], "key": "", "num_key_value_heads": 3, "hf_token": "y"}
    hidden = {"a": [{"api_key": HIDDEN, "path": f"ftp://{HIDDEN}@h/f"}], "key": "", "num_key_value_heads": 3, "hf_token": HIDDEN}
    assert redact_settings(settings) == hidden
    assert redact_argument("engine.deepspeed.comet={api_key: x y, b: z}") == f"engine.deepspeed.comet={{api_key: {HIDDEN}, b: z}}"
    assert redact_argument("a.password=x y z") == f"a.password={HIDDEN}"


SECRETS = {
    "HF_TOKEN": "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",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAQQWWEERRTTYYUUII",
    "AWS_SECRET_ACCESS_KEY": "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",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEJr0123456789",
    "DATABASE_PASSWORD": "opensesame-please",
}
IN_A_URL = "hunter2-hunter2"
TINY = [
    "data=synthetic", "optimizer=adamw", "scheduler=constant", "scheduler.warmup_steps=0", "run.name=tiny", "eval.max_tokens=16",
    "model.vocab_size=64", "model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "trainer.micro_batch_size=2", "trainer.global_batch_size=2", "trainer.seq_len=8", "trainer.precision=fp32", "trainer.device=cpu",
    "trainer.peak_flops=1e12",
]  # fmt: skip


def train(folder: Path, *arguments: str, umask: int = 0o022, **environment: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-m", "ngpt.train", *TINY, f"run.dir={folder}", *arguments],
        capture_output=True,
        env=inherited | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment,
        cwd=folder,
        umask=umask,
        check=False,
        timeout=240,
    )


def files_with(secret: str, folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_writes_and_says_no_secret_of_its_environment_and_of_its_settings(tmp_path: Path) -> None:
    """Keys, tokens and passwords in environment, settings and URLs of a run, W&B offline | in no file and no line of output"""
    arguments = [
        "logger.wandb=offline",
        f"logger.group=https://me:{IN_A_URL}@example.org/group",
        f"logger.tags=[{SECRETS['HF_TOKEN']},plain]",
        f"logger.entity={SECRETS['DATABASE_PASSWORD']}",
    ]
    said = b""
    for steps in (2, 4):  # a start, and a resume that compares settings
        done = train(tmp_path, *arguments, f"trainer.max_steps={steps}", **SECRETS)
        assert done.returncode == 0, done.stderr.decode()
        said += done.stdout + done.stderr
    assert {"config.yaml", "manifest.json", "train.log", "metrics.jsonl", "wandb"} <= {path.name for path in (tmp_path / "tiny").iterdir()}
    for secret in [*SECRETS.values(), IN_A_URL]:
        assert files_with(secret, tmp_path) == []
        assert secret.encode() not in said
    assert files_with(HIDDEN, tmp_path), "and what was taken out shows"


@pytest.mark.slow
def test_a_message_about_a_mistake_tells_no_secret(tmp_path: Path) -> None:
    """The same in settings that are refused | not in the message"""
    pattern = f"https://me:{IN_A_URL}@example.org/*.json"
    arguments = ["data=local_c4", f"data.train_files=['{pattern}']", f"resume={SECRETS['HF_TOKEN']}", "trainer.max_steps=1"]
    done = train(tmp_path, *arguments, **SECRETS)
    assert done.returncode == 2
    assert b"matches no file" in done.stderr
    for secret in (IN_A_URL, SECRETS["HF_TOKEN"]):
        assert secret.encode() not in done.stdout + done.stderr


@pytest.mark.slow
def test_nobody_else_can_write_to_a_run_folder_even_where_the_umask_lets_them(tmp_path: Path) -> None:
    """umask 0 | nothing in the run folder can be written by everybody"""
    done = train(tmp_path, "trainer.max_steps=1", umask=0)
    assert done.returncode == 0, done.stderr.decode()
    paths = [tmp_path / "tiny", *(tmp_path / "tiny").rglob("*")]
    assert len(paths) > 10
    open_to_all = [path.name for path in paths if stat.S_IMODE(path.stat().st_mode) & stat.S_IWOTH]
    assert open_to_all == []
    executable = [path.name for path in paths if path.is_file() and path.stat().st_mode & 0o111]
    assert executable == []
