#!/usr/bin/env bash
# The quick part of the suite against every minor version of torch from the floor to the newest, each in a throwaway
# environment: that torch with what it requires, and behind it the packages of .venv. The CPU extension is that of the
# checkout: it knows no torch, so one build serves all.
#   scripts/test_matrix.sh                   every version of which a CPU build can be had
#   scripts/test_matrix.sh 2.11.0 2.14.1     only these
#   CUDA_BUILDS=1 scripts/test_matrix.sh     where there is no CPU build, pip's own: on Linux 3 GB each, also without a GPU
#   TESTS="tests/flow" scripts/test_matrix.sh
# A version that could not be had is named, with the reason. Exit status: 1 where a test failed, 2 where nothing ran.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
python=.venv/bin/python
work=$PWD/build/matrix
tests=${TESTS:-tests/flow tests/models tests/ops tests/test_public_api.py tests/test_import_is_lean.py}
floor=$(sed -n 's/^ *"torch>=2\.\([0-9]*\)".*/\1/p' pyproject.toml)

newest_of_each_minor() {
    # "Available versions: 2.15.0, 2.14.1, 2.14.0, ...", newest first
    $python -m pip index versions torch 2>/dev/null | sed -n 's/^Available versions: //p' | tr -d ' ' | tr ',' '\n' |
        sed 's/+.*//' | awk -F. -v floor="$floor" '$1 > 2 || ($1 == 2 && $2 >= floor + 0) { if (!seen[$1 "." $2]++) print }' | sort -V
}

install() { # VERSION ENVIRONMENT LOG
    local pip=("$2/bin/python" -m pip install --quiet --no-cache-dir)
    if [ "$(uname -s)" != Linux ]; then
        "${pip[@]}" "torch==$1" >"$3" 2>&1 # what pip has there is a CPU build
        return
    fi
    "${pip[@]}" "torch==$1+cpu" >"$3" 2>&1 && return
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$2/bin/python" --torch-backend=cpu "torch==$1" >>"$3" 2>&1 && return
    fi
    [ "${CUDA_BUILDS:-0}" = 1 ] && "${pip[@]}" "torch==$1" >>"$3" 2>&1
}

env=
trap 'rm -rf "${env:-/nonexistent}"' EXIT
mkdir -p "$work"
[ $# -gt 0 ] || mapfile -t found < <(newest_of_each_minor)
[ $# -gt 0 ] || set -- "${found[@]}"
if [ $# -eq 0 ]; then
    echo "error: pip finds no torch from 2.$floor on" >&2
    exit 2
fi
echo "matrix: $($python --version), torch $*"
tested=() failed=() skipped=()
for version in "$@"; do
    env=$work/env-$version log=$work/$version.log
    rm -rf "$env"
    $python -m venv "$env"
    if ! install "$version" "$env" "$log"; then
        reason=$(grep -m 1 -i error "$log" || echo "no reason given")
        [ "${CUDA_BUILDS:-0}" = 1 ] || reason="pip has no CPU build here (CUDA_BUILDS=1 takes its other one); $reason"
        rm -rf "$env"
        skipped+=("$version")
        echo "matrix: $version NOT TESTED: $reason"
        continue
    fi
    # Last on the path, so that the torch of this environment is the one that is found; its .pth files stay unread.
    # Triton 3.6's interpreter cannot work with numpy 2.4.
    if "$env/bin/python" -c 'import triton; raise SystemExit(triton.__version__ >= "3.7")' 2>>"$log"; then
        "$env/bin/python" -m pip install --quiet --no-cache-dir "numpy<2.4" >>"$log" 2>&1
    fi
    site=$(echo "$env"/lib/python3.*/site-packages)
    $python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' >"$site/lent.pth"
    build=$("$env/bin/python" -c 'import torch; print(torch.__version__)' 2>>"$log") || build="$version (no import)"
    start=$SECONDS status=0
    # shellcheck disable=SC2086  # TESTS are several words
    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 scripts/with_headers.sh "$env/bin/python" -m pytest -q -p no:cacheprovider \
        -m "not slow and not gpu" $tests >"$log" 2>&1 || status=$?
    tested+=("$build")
    [ $status -eq 0 ] || { failed+=("$build"); grep -E '^(FAILED|ERROR)' "$log" || tail -5 "$log"; }
    echo "matrix: $build $([ $status -eq 0 ] && echo ok || echo FAILED) in $((SECONDS - start)) s: $(tail -1 "$log")"
    rm -rf "$env"
done
echo "matrix: tested ${tested[*]:-nothing}; not tested ${skipped[*]:-none}; failed ${failed[*]:-none}; logs in $work"
[ ${#tested[@]} -gt 0 ] || exit 2
[ ${#failed[@]} -eq 0 ]
