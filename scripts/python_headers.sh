#!/usr/bin/env bash
# Debian keeps Python.h in a package of its own, and neither the C++ extension nor torch.compile builds without it.
# Where it is missing, its package is fetched and unpacked into .venv/headers: no root, nothing installed. with_headers.sh
# points the compiler there. A failure is told and is not an error: the extension is optional.
set -uo pipefail
venv=$1
read -r include version < <("$venv/bin/python" -c \
    'import sys, sysconfig; print(sysconfig.get_paths()["include"], "%d.%d" % sys.version_info[:2])')
[ -e "$include/Python.h" ] || [ -e "$venv/headers/python$version/Python.h" ] && exit 0
hint="setup: Python.h is missing, so there will be no C++ extension (Debian: apt-get install python3-dev)"
if [ "$include" != "/usr/include/python$version" ] || ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "$hint"
    exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
private=(-o "Dir::State::lists=$scratch/lists" -o "Dir::Cache=$scratch/cache" -o APT::Sandbox::User=root
    -o APT::Update::Post-Invoke= -o Debug::NoLocking=1)
package=libpython$version-dev
fetch() { (cd "$scratch" && apt-get -qq "$@" download "$package") >/dev/null 2>&1; }

echo "setup: Python.h is missing: unpacking it from $package (5 MB) into $venv/headers"
# The machine's package lists may be empty or older than the archive: then they are refreshed, in the scratch folder.
if { fetch || { apt-get -qq "${private[@]}" update >/dev/null 2>&1 && fetch "${private[@]}"; }; } &&
    dpkg-deb -x "$scratch/$package"_*.deb "$scratch/unpacked"; then
    rm -rf "$venv/headers"
    mv "$scratch/unpacked/usr/include" "$venv/headers"
else
    echo "$hint"
fi
