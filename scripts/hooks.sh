#!/bin/sh
# Usage: hooks.sh install | run HOOK... | fix HOOK...
# Called by the Makefile, which puts the environment in front of PATH.
set -eu
action=$1
shift

# Every file that git does not ignore, also those not added yet (--all-files would leave them out).
run_hooks() {
    for hook in "$@"; do
        git ls-files -z --cached --others --exclude-standard |
            xargs -0 python -m pre_commit run "$hook" --files
    done
}

install_hook() {
    if [ -n "$(git config core.hooksPath)" ]; then
        echo "git's core.hooksPath is set: left the commit hook out."
    elif ! grep -qsF "$(command -v python)" "$(git rev-parse --git-path hooks/pre-commit)"; then
        python -m pre_commit install
    fi
}

if [ ! -e .git ]; then # a directory above may be a repository, but not ours
    if [ "$action" = install ]; then
        echo "Not a git checkout: left the commit hook out."
        exit 0
    fi
    echo "This runs through pre-commit and needs a git checkout (make check does not)." >&2
    exit 1
fi

case $action in
    install) install_hook ;;
    run) run_hooks "$@" ;;
    # A hook that repairs a file also reports failure; what counts is what the second round says.
    fix) run_hooks "$@" >/dev/null 2>&1 || true; run_hooks "$@" ;;
esac
