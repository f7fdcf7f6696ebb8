"""Whether an exported folder does in transformers what the model does here: the same logits, the same token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.data.builtin import standard_library_prose
from ngpt.data.tokenizer import Tokenizer
from ngpt.trained import open_trained

TOLERANCE = 1e-4  # of logits, in fp32, per unit of the largest one
_TEXTS = 200
# What tokenizers that were converted get wrong.
AWKWARD = [
    *("", " ", "  two  spaces ", "\n", "a\nb", "a \n\n  b\n", "\ttab\r\nline", "word", " word", "Word", "x\u00a0y\u3000z"),
    *(
        "café",
        "cafe\u0301",
        "naïve",
        "\ufb01ne",
        "①½²",
        "\uff21\uff22\uff23",
        "日本語のテキスト",
        "हिन्दी",
        "ภาษาไทย",
        "Ελληνικά",
        "русский",
        "العربية",
    ),
    *("🙂", "👩‍👩‍👧", "🇩🇪", "€100", "\u200bzero", "\x00\x07", "\u2581under", "1234567890", "def f(x):\n    return x**2\n"),
]


@dataclass(frozen=True)
class ExportCheck:
    """What was compared, a line each, and whether all of it agrees."""

    lines: list[str]
    passed: bool


def check_export(folder: Path, tokenizer: Tokenizer | None) -> ExportCheck:
    """Compare an exported folder, in fp32 on the CPU. Raises CheckpointError where transformers is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("--verify needs transformers: pip install 'transformers>=4.48,<6'") from error
    transformers.utils.logging.set_verbosity_error()
    ours = open_trained(folder, dtype=torch.float32).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()
    length = min(ours.config.max_seq_len, 64)
    ids = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(ids)
        difference = float((theirs(ids).logits - expected).abs().max())
    largest = float(expected.abs().max())
    lines = [
        f"logits: largest difference {difference:.1e}, largest logit {largest:.2f}, in fp32, with transformers {transformers.__version__}"
    ]
    passed = difference <= TOLERANCE * max(1.0, largest)
    if tokenizer is None:
        return ExportCheck(lines, passed)
    converted = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [document.text for document in standard_library_prose()[:_TEXTS]]
    wrong = {text for text in [*AWKWARD, *texts] if converted.encode(text, add_special_tokens=False) != tokenizer.encode([text])[0]}
    awkward = [text for text in AWKWARD if text in wrong]
    lines.append(
        f"token ids: {len(AWKWARD)} awkward texts, {len(awkward)} differ; {len(texts)} documents, {len(wrong) - len(awkward)} differ"
    )
    lines += [f"  differs: {text!r}" for text in awkward]
    return ExportCheck(lines, passed and not awkward)
