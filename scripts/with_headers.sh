#!/usr/bin/env bash
# Runs a command with the compiler pointed at .venv/headers, where scripts/python_headers.sh had to put Python.h.
headers=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/headers
if [ -d "$headers" ]; then
    export CPLUS_INCLUDE_PATH=$headers:$(echo "$headers"/python3.*)${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH}
fi
exec "$@"
