#!/usr/bin/env bash
# Installs what is missing and runs the tests that need a CUDA GPU (one is enough); options go to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh" test,deepspeed,lora,qlora
cd "$root"
export HF_HUB_OFFLINE=1
python=$root/.venv/bin/python
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "test_gpu: error: torch sees no CUDA GPU on this machine; bash launch/test.sh runs the rest" >&2
  exit 2
}
exec timeout 480 "$python" -m pytest tests/gpu "$@"
