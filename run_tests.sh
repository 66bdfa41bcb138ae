#!/usr/bin/env bash
# ./run_tests.sh                          checks style, types and the order of imports, then runs every test, slow ones last
# ./run_tests.sh tests/data               only pytest, with these arguments
#
# The first call builds .venv beside this file, as launch_training.sh does.
set -euo pipefail

root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/sft/launch/environment.sh"
python="$(environment_python "$root/requirements.txt" "$root/requirements-dev.txt")"
cd "$root"

options=()
if [ "$#" -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    "$(dirname "$python")/lint-imports" --no-cache --no-logo
    # As many processes as cores; each test runs on one thread (tests/conftest.py).
    options=(--numprocesses logical --dist loadgroup --durations 10)
fi
# A test that hangs fails after five minutes.
exec "$python" -m pytest -p tests.slow_last --timeout 300 ${options[@]+"${options[@]}"} "$@"
