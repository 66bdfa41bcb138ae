#!/usr/bin/env bash
# ./run_tests.sh                          checks the style and the types, then runs every test, the slow ones last
# ./run_tests.sh tests/test_x.py -k y     only pytest, with these arguments
#
# The first call builds .venv beside this file, as launch_training.sh does.
set -euo pipefail

root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$root/sft/launch/environment.sh"
python="$(environment_python "$root/requirements.txt" "$root/requirements-dev.txt")"
cd "$root"

if [ "$#" -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
fi
# One run, so that the closing line counts every test; a test that hangs fails after five minutes.
exec "$python" -m pytest -p tests.slow_last --timeout 300 "$@"
