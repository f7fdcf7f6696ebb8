"""GPUs by name: memory and peak rates as printed in the vendors' data sheets, for the MFU and for plans."""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """`key` is how it is asked for, `words` are part of the name that its driver gives, `gigabytes` are those on the box.

    Rates are dense, FLOP/s: of the tensor cores in bf16 (the figure without sparsity), of the other cores in fp32.
    """

    key: str
    words: str
    gigabytes: int
    bf16: float
    fp32: float


# Older cards have no bf16 in theirs and are measured. A name that contains another one comes before it.
GPUS = (
    Gpu("h200", "H200", 141, 989e12, 67e12),
    Gpu("h100-pcie", "H100 PCIe", 80, 756e12, 51e12),
    Gpu("h100", "H100", 80, 989e12, 67e12),
    Gpu("a100-40gb", "A100-(?:SXM4|PCIE)-40GB", 40, 312e12, 19.5e12),
    Gpu("a100", "A100", 80, 312e12, 19.5e12),
    Gpu("l40s", "L40S", 48, 362e12, 91.6e12),
    Gpu("l4", "L4", 24, 121e12, 30.3e12),
    Gpu("a10g", "A10G", 24, 70e12, 31.5e12),
    Gpu("a10", "A10", 24, 125e12, 31.2e12),
    Gpu("rtx4090", "RTX 4090", 24, 165e12, 82.6e12),
    Gpu("rtx3090", "RTX 3090", 24, 71e12, 35.6e12),
)


def gpu_of(driver_name: str) -> Gpu | None:
    """The GPU whose words are in the name that torch reports; None for one that is not known."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.words}\b", driver_name)), None)


def gpu_called(key: str) -> Gpu | None:
    """The GPU asked for as `rtx4090`, `RTX-4090`, `a100`, ...; None for one that is not known."""
    plain = re.sub(r"[\s_-]", "", key.lower())
    return next((gpu for gpu in GPUS if gpu.key.replace("-", "") == plain), None)
