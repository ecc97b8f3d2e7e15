#!/usr/bin/env bash
# Installs what is missing, and runs the linter and the tests. By default those that take seconds; `--all` adds the slow ones.
# `--parity` compares DPO's losses and KTO with TRL's, which it installs beside .venv; its options are those of tests/parity/dpo_trl.py.
# Other options go to pytest (`-k plan`, `-m long`, `-n 0` for one process).
# Nothing is fetched once installed: the Hub is switched off, so that a test that reaches for it fails at once.
set -euo pipefail

if [ "${1:-}" = "--all" ]; then set -- -m "not long" "${@:2}"; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh" test,deepspeed,lora
cd "$root"
if [ "${1:-}" = "--parity" ]; then
  trl=$root/.venv/trl-1.16.0
  # Beside the package's own environment: the tests must not find TRL there.
  [ -d "$trl/trl" ] || .venv/bin/python -m pip install -q --no-deps --target "$trl" trl==1.16.0
  export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONPATH=$root:$trl
  status=0
  for stage in dpo kto; do .venv/bin/python "tests/parity/${stage}_trl.py" "${@:2}" || status=$?; done
  exit $status
fi
export HF_HUB_OFFLINE=1
# A file of tests stays in one process, with one thread: threads that spin for each other's cores cost more than they give.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=$root/.venv/bin/python
"$python" -m ruff check .
"$python" -m ruff format --check .
workers=$("$python" -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
exec "$python" -m pytest -n "$workers" --dist loadfile "$@"
