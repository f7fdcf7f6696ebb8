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

# pip chooses; each file that it has chosen must be one whose SHA-256 is on record, and is then installed by that hash.
chosen=$(mktemp -d)
trap 'rm -rf "$chosen"' EXIT
exec 3>&2 # what is hidden of pip's errors below is not to hide a hash that differs
install_verified() {
    pip_install --dry-run --report "$chosen/report.json" "$@" || return
    "$venv/bin/python" .ci/hashes.py check "$chosen/report.json" >"$chosen/requirements.txt" 2>&3 || exit 1
    pip_install --no-deps --require-hashes --requirement "$chosen/requirements.txt"
}

# Reports came with pip 22.2; environments of the oldest Pythons begin with an older one.
if ! "$venv/bin/python" -m pip install --help | grep --quiet -- --report; then
    awk '/^pip==/ { printf "%s", $1; for (i = 2; i <= NF; i++) printf " --hash=sha256:%s", $i }' .ci/hashes.txt >"$chosen/pip.txt"
    pip_install --upgrade --require-hashes --requirement "$chosen/pip.txt"
fi

# torch comes first and alone: it is then there when the others ask for any torch, and none of them replaces the CPU build.
torch=$(sed -n 's/^torch==//p' constraints.txt)
if [[ $build == auto ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then build=cuda; fi
if [[ $build != cuda ]] && install_verified "torch==$torch+cpu" 2>/dev/null; then
    echo "install: torch $torch, CPU build"
else
    echo "install: torch $torch, the registry's standard build (with CUDA on Linux: several GB)"
    install_verified "torch==$torch"
fi

echo "install: ngpt and the other packages"
install_verified --editable ".${extra:+[$extra]}"
pip_install --no-deps --editable .
echo "install: done, in $venv"
