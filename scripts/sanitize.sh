#!/usr/bin/env bash
# The CPU kernels' tests with an extension that stops at the first access outside of memory (AddressSanitizer) and at
# the first undefined operation (UndefinedBehaviorSanitizer). Everything happens in a copy, build/sanitize.
# Arguments replace the tests that are run: scripts/sanitize.sh tests/ops/test_swiglu.py -k avx512
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$PWD/.venv/bin/python
copy=build/sanitize
library() { "${CXX:-g++}" -print-file-name="$1"; }
runtime=$(library libasan.so)
if [ ! -e "$runtime" ]; then
    echo "error: the compiler has no libasan.so (GCC is needed: CXX=g++)" >&2
    exit 2
fi

# With their times, so that only what changed is compiled again.
mkdir -p $copy
rm -rf $copy/csrc $copy/tests
git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' name; do if [ -e "$name" ]; then printf '%s\0' "$name"; fi; done |
    tar -c --null --exclude=.venv --files-from=- | tar -C $copy -xf -
cd $copy
# Python's own -fwrapv would hide overflows.
CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-wrapv -fno-omit-frame-pointer -g1" \
    BLIP3O_FAST_BUILD=cpu "$python" setup.py --quiet build_ext --inplace

# libstdc++ too: the sanitizer looks for its functions before any extension has loaded it.
export LD_PRELOAD="$runtime $(library libstdc++.so.6)"
export PYTHONMALLOC=malloc TRITON_INTERPRET=1 OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
if [ $# -eq 0 ]; then
    set -- tests/csrc tests/ops -k "(csrc and not portable) or cpu or threads" -m "not slow"
fi
exec "$python" -m pytest -q -x -p no:cacheprovider "$@"
