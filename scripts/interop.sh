#!/usr/bin/env bash
# Make .cache/interop: lm-evaluation-harness in a virtual environment of its own, which sees .venv's packages (torch,
# transformers, datasets) and installs nothing into them. `make interop` then compares results with it.
set -euo pipefail
cd "$(dirname "$0")/.."

HARNESS=0.4.13
folder=.cache/interop

[ -e "$folder/.ready-$HARNESS" ] && exit
echo "interop: lm-evaluation-harness $HARNESS into $folder" >&2
rm -rf "$folder"
.venv/bin/python -m venv "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/spa_ray_packages.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "lm-eval==$HARNESS"
touch "$folder/.ready-$HARNESS"
