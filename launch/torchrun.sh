#!/usr/bin/env bash
# Runs a verb on every process of one or several nodes; call it on each node with the same arguments:
#
#   NODES=2 NODE_RANK=0 MAIN_ADDRESS=10.0.0.1 PROCESSES_PER_NODE=8 \
#     bash launch/torchrun.sh dpo --config run.yaml
#
# NODES, NODE_RANK        number of nodes and this one's rank, from 0         (1, 0)
# MAIN_ADDRESS, MAIN_PORT where node 0 is reached; the port after it is used too (127.0.0.1, 29500)
# PROCESSES_PER_NODE      usually the GPUs of one node                        (1)
# ACCELERATE_CONFIG       a file of accelerate_configs/; torchrun and DDP without it
# PYTHON                  the interpreter                                     (.venv beside this folder, else python3)
#
# On several machines GLOO_SOCKET_IFNAME names the network interface by which ranks agree, with GPUs
# too; it is needed where the name of a machine leads to itself (/etc/hosts), and the start says so.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$root/.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
# Kubernetes' PyTorchJob names the pod's rank RANK and the number of pods WORLD_SIZE.
nodes=${NODES:-${WORLD_SIZE:-1}}
rank=${NODE_RANK:-${RANK:-0}}
address=${MAIN_ADDRESS:-${MASTER_ADDR:-127.0.0.1}}
port=${MAIN_PORT:-${MASTER_PORT:-29500}}
each=${PROCESSES_PER_NODE:-1}
unset WORLD_SIZE RANK MASTER_ADDR MASTER_PORT
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ $# -eq 0 ]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
# A launcher alone would wait minutes for a node that is missing or claims another's rank.
"$PYTHON" -m modern_llm.distributed.rendezvous.preflight --nodes "$nodes" --node_rank "$rank" \
  --main_address "$address" --main_port $((port + 1)) "${@:2}"

if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  cd "$root" # the DeepSpeed files are named from here
  exec "$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$nodes" --machine_rank "$rank" --num_processes $((nodes * each)) \
    --main_process_ip "$address" --main_process_port "$port" \
    -m modern_llm "$@" --expect_world $((nodes * each))
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --node_rank "$rank" \
  --nproc_per_node "$each" --master_addr "$address" --master_port "$port" \
  -m modern_llm "$@" --expect_world $((nodes * each))
