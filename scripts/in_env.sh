#!/bin/sh
# Usage: in_env.sh PROGRAM ARGUMENT...
# Runs a program of the environment that `make install-dev` filled. git starts the commit hook from
# shells, editors and other programs where that environment is not active.
for env in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$PWD/.venv"; do
    if [ -f "$env/.spd-install-dev.stamp" ]; then
        PATH="$env/bin:$PATH"
        break
    fi
done
command -v "$1" >/dev/null || { echo "$1 is not installed: run make install-dev" >&2; exit 1; }
exec "$@"
