#!/usr/bin/env bash
# Build sdist and wheel, unpack the wheel into an empty folder, and use it from another working folder.
# The libraries come from .venv, spa_ray itself only from the wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
python=$checkout/.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m build --no-isolation --outdir "$scratch/dist" . >"$scratch/build.log" 2>&1 ||
    { cat "$scratch/build.log" >&2; exit 1; }
"$python" -m pip install --quiet --no-deps --no-compile --target "$scratch/site" "$scratch"/dist/*.whl
cp scripts/wheel_check.py "$scratch/check.py"
cd "$scratch"
PYTHONPATH=$scratch/site "$python" -P check.py "$scratch/site" "$scratch/dist" "$checkout"
