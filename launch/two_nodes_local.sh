#!/usr/bin/env bash
# Two "nodes" on one machine: two network namespaces with a virtual link, one launcher in each.
#
#   bash launch/two_nodes_local.sh dpo --config run.yaml
#
# Needs root and `ip` (Debian: iproute2). Environment as in torchrun.sh (PROCESSES_PER_NODE,
# ACCELERATE_CONFIG); NODE_RANKS="0 0" starts the second with a wrong rank, "0" starts one alone.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
fail() {
  printf 'two_nodes_local: error: %s\n' "$*" >&2
  exit 2
}
[ $# -gt 0 ] || fail "say what to run: dpo --config run.yaml"
[ "$(id -u)" = 0 ] || fail "network namespaces need root; run it as root, or in a container that allows them"
command -v ip >/dev/null || fail "ip is missing; on Debian and Ubuntu: apt install iproute2"

name=mllm$$
pids=()
clean() {
  local node
  # Each node is a group of processes; a remaining process would keep its namespace.
  for node in ${pids[@]+"${pids[@]}"}; do kill -- "-$node" 2>/dev/null || true; done
  wait 2>/dev/null || true
  ip netns del "$name-0" 2>/dev/null || true
  ip netns del "$name-1" 2>/dev/null || true
}
trap clean EXIT
trap 'exit 130' INT TERM

ip netns add "$name-0" || fail "this kernel or container allows no network namespaces"
ip netns add "$name-1"
ip link add "$name-a" netns "$name-0" type veth peer name "$name-b" netns "$name-1"
for node in 0 1; do
  end=$([ "$node" = 0 ] && printf a || printf b)
  ip -n "$name-$node" addr add "10.77.0.$((node + 1))/24" dev "$name-$end"
  ip -n "$name-$node" link set "$name-$end" up
  ip -n "$name-$node" link set lo up
done

place=0
for rank in ${NODE_RANKS:-0 1}; do
  end=$([ "$place" = 0 ] && printf a || printf b)
  ip netns exec "$name-$place" env NODES=2 NODE_RANK="$rank" MAIN_ADDRESS=10.77.0.1 \
    GLOO_SOCKET_IFNAME="$name-$end" setsid bash "$root/launch/torchrun.sh" "$@" &
  pids+=($!)
  place=$((place + 1))
done
# The first that fails ends both: the other would wait for it.
for _ in "${pids[@]}"; do wait -n "${pids[@]}"; done
