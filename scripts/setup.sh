#!/usr/bin/env bash
# Makes .venv and installs the package into it, editable, with what the tests and the demo need.
# Called by `make setup`. Safe to interrupt: what was half installed is thrown away by the next run,
# what was downloaded stays in pip's cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=dev,train,data,report,demo,bench
venv=.venv
unfinished=$venv/.unfinished
export PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
torch=$(sed -n 's/^torch==//p' constraints.txt)

newest_python() {
    # Being on the PATH proves little (version managers leave shims there), so each one is run.
    local name
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with the venv module" >&2
    echo "hint: on Debian or Ubuntu: apt-get install python3 python3-venv; elsewhere: uv python install 3.13" >&2
    exit 2
}

trap 'printf "\nsetup: interrupted; the same command continues\n" >&2; exit 130' INT TERM

gpu=no
if nvidia-smi -L >/dev/null 2>&1; then gpu=yes; fi

fresh=no
if [ -e $unfinished ] || ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    fresh=yes
    python=$(newest_python)
    if [ $gpu = yes ]; then
        size="about 3.5 GB to download, 9 GB on disk"
    else
        size="about 600 MB to download, 2.5 GB on disk"
    fi
    echo "setup: $("$python" --version) into $venv: $size, 3 to 10 minutes (nothing is put elsewhere)"
    "$python" -m venv --clear $venv
else
    echo "setup: bringing $venv up to date"
fi
touch $unfinished
pip() { $venv/bin/python -m pip "$@"; }

if [ $fresh = yes ]; then
    # A plain `pip install torch` brings CUDA along on Linux, 2.5 GB that a machine without a GPU
    # never uses. Where pip's own sources have no CPU build, uv knows where PyTorch keeps it.
    uv=$(command -v uv || true)
    if [ $gpu = yes ] || pip index versions torch 2>/dev/null | grep -qF "$torch+cpu"; then
        [ $gpu = yes ] || uv=
    elif [ -z "$uv" ] && [ "$(uname -s)" = Linux ]; then
        pip install --quiet uv && uv=$venv/bin/uv
    fi
    if [ -n "$uv" ]; then
        "$uv" pip install --python $venv/bin/python --torch-backend=auto "torch==$torch" ||
            echo "setup: uv could not install torch; pip installs the build it finds"
    fi
fi

scripts/python_headers.sh $venv
# The build uses this environment (--no-build-isolation), so its tools come first.
verbosity=--quiet
if [ $fresh = yes ]; then verbosity=--no-color; fi
pip install --quiet setuptools wheel pybind11
scripts/with_headers.sh $venv/bin/python -m pip install $verbosity --no-build-isolation --editable ".[$extras]"

rm -f $unfinished
$venv/bin/python -c 'import torch, blip3o_fast._ext as extension
print("setup: done; torch", torch.__version__ + ";", extension.ERROR or "C++ extension built")'
