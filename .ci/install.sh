#!/usr/bin/env bash
# Create a virtual environment and install ngpt into it, with the versions of constraints.txt.
#
#   bash .ci/install.sh [VENV] [EXTRA]      bash .ci/install.sh .venv dev
#
# PYTHON=python3.12   the interpreter to start from (default python3; 3.10 or newer)
# TORCH=auto|cpu|cuda the build of torch: auto takes the CPU build, where one is offered, on a machine without an NVIDIA GPU.
#                     Say TORCH=cuda where the installing machine has no GPU but the training machine has (login nodes, images).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv} extra=${2:-} python=${PYTHON:-python3} build=${TORCH:-auto}

fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "no '$python' on this machine." "Install Python 3.10 or newer, or name one: PYTHON=/path/to/python3.12 make ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version 2>&1) is too old: ngpt needs Python 3.10 or newer." "Name a newer one: PYTHON=python3.12 make ..."
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$("$python" --version 2>&1) has no venv module." "On Debian and Ubuntu: apt-get install python3-venv"
[[ $build =~ ^(auto|cpu|cuda)$ ]] || fail "TORCH=$build is none of auto, cpu, cuda."

# An environment whose interpreter is gone (an upgraded system, a moved folder) is made anew.
"$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv --clear "$venv"

# Packages without a wheel are built apart from the environment, even by an old pip: beside torch, DeepSpeed's setup looks for a GPU.
# Set as variables, the pins hold there too (an old pip reads the first of the two, a new one the second).
export PIP_USE_PEP517=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 PIP_NO_INPUT=1
pip_install() { "$venv/bin/python" -m pip install --quiet --quiet "$@"; }

# torch comes first and alone: it is then there when the others ask for any torch, and none of them replaces the CPU build.
torch=$(sed -n 's/^torch==//p' constraints.txt)
if [[ $build == auto ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then build=cuda; fi
if [[ $build != cuda ]] && pip_install "torch==$torch+cpu" 2>/dev/null; then
    echo "install: torch $torch, CPU build"
else
    echo "install: torch $torch, the registry's standard build (with CUDA on Linux: several GB)"
    pip_install "torch==$torch"
fi

echo "install: ngpt and the other packages"
pip_install --editable ".${extra:+[$extra]}"
echo "install: done, in $venv"
