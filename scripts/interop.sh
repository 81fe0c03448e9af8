#!/usr/bin/env bash
# Make .cache/interop: lm-evaluation-harness, axolotl and LLaMA-Factory in a virtual environment of its own, which sees
# .venv's packages (torch, transformers, datasets) and installs nothing into them. Of the trainers only the code comes
# along that reads data, without what training needs. `make interop` then compares results with them.
set -euo pipefail
cd "$(dirname "$0")/.."

HARNESS=0.4.13
AXOLOTL=0.19.0
LLAMA_FACTORY=0.9.5
folder=.cache/interop
ready="$folder/.ready-$HARNESS-$AXOLOTL-$LLAMA_FACTORY"

[ -e "$ready" ] && exit
echo "interop: lm-evaluation-harness $HARNESS, axolotl $AXOLOTL, LLaMA-Factory $LLAMA_FACTORY into $folder" >&2
rm -rf "$folder"
.venv/bin/python -m venv "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/spa_ray_packages.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "lm-eval==$HARNESS"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    "axolotl==$AXOLOTL" "llamafactory==$LLAMA_FACTORY"
touch "$ready"
