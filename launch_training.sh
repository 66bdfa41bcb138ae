#!/usr/bin/env bash
# Trains: ./launch_training.sh --config FILE [--gpus N] [--nodes N --node_rank R --master_addr A] [--dry-run] [-- overrides]
#
# The first call builds .venv beside this file (SFT_VENV names another environment, PYTHON the Python to build it with).
# `./launch_training.sh --help` shows every option; the logic is in sft/launch/.
set -euo pipefail

self="${BASH_SOURCE[0]}"
while [ -L "$self" ]; do # a link in ~/bin still finds the repository
    target="$(readlink "$self")"
    case "$target" in
    /*) self="$target" ;;
    *) self="$(dirname "$self")/$target" ;;
    esac
done
root="$(cd -P "$(dirname "$self")" && pwd)"

. "$root/sft/launch/environment.sh"
python="$(environment_python "$root/requirements.txt")"

# -P: a file or folder in the user's working directory must not be imported in place of the repository's.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m sft.launch.launcher "$@"
