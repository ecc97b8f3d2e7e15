#!/usr/bin/env bash
# Installs what is missing and runs the checks and tests; options go to pytest (`-k plan`, `-m long`, `-n 2`).
# Nothing is fetched once installed: the Hub is switched off, so that a test that reaches for it fails at once.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh" test,deepspeed,lora
cd "$root"
export HF_HUB_OFFLINE=1
python=$root/.venv/bin/python
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest "$@"
