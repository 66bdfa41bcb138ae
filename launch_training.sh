#!/usr/bin/env bash
# Trains: ./launch_training.sh --config FILE [--gpus N] [--nodes N --node_rank R --master_addr A] [--dry-run] [-- overrides]
#
# The first call builds .venv beside this file (SFT_VENV names another environment, PYTHON the Python to build it with).
# `./launch_training.sh --help` says the rest; the logic is in sft/launch/launcher.py.
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

# -P: a file or folder in the user's working directory must not be imported in place of one of ours.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m sft.launch.launcher "$@"
