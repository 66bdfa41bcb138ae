# Sourced by launch_training.sh and run_tests.sh, which set `root` to the repository before.

# Prints the first Python of at least 3.11: $PYTHON if it is set; else that of the environment if it exists already (in a
# cluster's job the `module load` under which it was built may be missing); else the usual names.
find_python() {
    local environment="${SFT_VENV:-$root/.venv}" candidate
    for candidate in ${PYTHON:+"$PYTHON"} "$environment/bin/python" python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        if [ "$candidate" = "${PYTHON:-}" ]; then
            break # the user named it: another one in its place would hide that
        fi
    done
    echo "error: Python 3.11 or newer is needed; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)" >&2
    echo "    Name one in PYTHON, for example: PYTHON=/usr/bin/python3.12 $0" >&2
    return 1
}

# Prints the Python of the environment in which the given requirements files are installed.
environment_python() {
    local python
    python="$(find_python)" || return
    # -P: the folder of the script must not come before the standard library.
    "$python" -P "$root/sft/launch/environment.py" --default "$root/.venv" "$@"
}
