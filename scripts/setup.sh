#!/bin/sh
# Usage: setup.sh ENV run|dev. Called by the Makefile, which sets PYTHON and TORCH_VERSION.
# Makes ENV if it does not exist and installs this checkout into it. A stamp in ENV says what was
# installed from where, so that a second call returns at once, and a changed pyproject.toml or
# another checkout that shares the environment leads to a new installation.
set -eu
env=$1
kind=$2
checkout=$(pwd -P)
key="$checkout torch==$TORCH_VERSION pyproject $(cksum < pyproject.toml)"

is_stamped() {
    [ -x "$env/bin/python" ] && [ -f "$1" ] && [ "$(cat "$1")" = "$key" ]
}

require_python() { # PROGRAM ADVICE
    found=$("$1" -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])' 2>/dev/null) ||
        found="not there"
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "SPD needs Python 3.11 or later, but $1 is $found. $2" >&2
        exit 1
    fi
}

is_moved() { # the scripts of a virtual environment hold its path
    [ -f "$env/bin/activate" ] && ! (set +eu; . "$env/bin/activate"; [ "$VIRTUAL_ENV" -ef "$env" ])
}

run_stamp=$env/.spd-install.stamp
dev_stamp=$env/.spd-install-dev.stamp
if is_stamped "$run_stamp" && { [ "$kind" = run ] || is_stamped "$dev_stamp"; }; then
    exit 0
fi

if [ ! -x "$env/bin/python" ]; then
    require_python "$PYTHON" "Name a later one: make install PYTHON=python3.12"
    echo "Making the environment $env ($PYTHON is $found) ..."
    "$PYTHON" -m venv --clear "$env" || { rm -rf "$env"; exit 1; }
elif [ "$env" = "$checkout/.venv" ] && is_moved; then
    echo "Making the environment $env anew: it was made in another directory ..."
    "$env/bin/python" -m venv --clear "$env"
fi
require_python "$env/bin/python" "Deactivate or remove it, or activate another one."

pip() {
    "$env/bin/python" -m pip --disable-pip-version-check -qq "$@"
}
"$env/bin/python" -m pip --version >/dev/null 2>&1 || "$env/bin/python" -m ensurepip >/dev/null

rm -f "$run_stamp"
torch="torch==$TORCH_VERSION"
# Alone first, then named again: nothing that follows can move it to another version.
echo "Installing PyTorch $TORCH_VERSION (the largest part) ..."
pip install "$torch"
if [ "$kind" = dev ]; then
    echo "Installing SPD with the tools for development ..."
    pip install "$torch" -e ".[dev]"
    echo "$key" > "$dev_stamp"
else
    echo "Installing SPD ..."
    pip install "$torch" -e .
fi
echo "$key" > "$run_stamp"
