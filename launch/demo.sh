#!/usr/bin/env bash
# Installs what is missing and runs the demo: pretrain, SFT, reference pass and DPO on a small generated corpus.
# Results go to experiments/demo beside this folder; further options are those of `modern-llm demo --help`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh"
exec "$root/.venv/bin/modern-llm" demo --output_dir "$root/experiments/demo" "$@"
