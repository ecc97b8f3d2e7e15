#!/usr/bin/env bash
# Makes the environment .venv beside this folder, or brings it up to date:
#
#   bash launch/setup.sh              what running needs
#   bash launch/setup.sh test         and the extras named `test` in pyproject.toml (`test,lora` for two)
#
# Exact versions come from constraints.txt. Nothing is done when nothing changed, so a second call
# takes no time. PYTHON=/path/to/python3 chooses the interpreter for a new environment.
# demo.sh and test.sh call this; it leaves nothing running and changes nothing outside the repository.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.modern-llm-installed     # digest of the requirements, then the extras, one per line
unfinished=$venv/.modern-llm-unfinished  # exists while pip writes: an environment with it is incomplete
log=$venv/install.log

fail() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 2
}

supported() { # PYTHON: whether it is 3.11 or newer
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || fail "PYTHON=$PYTHON does not run as Python 3.11 or newer; give the path of one that does"
    printf '%s\n' "$PYTHON"
    return
  fi
  for name in python3 python3.13 python3.12 python3.11 python3.14; do
    if supported "$name"; then
      command -v "$name"
      return
    fi
  done
  fail "Python 3.11 or newer is needed, and 'python3' is $(python3 --version 2>&1 || true);" \
    "install one, or name one you have: PYTHON=/path/to/python3 bash launch/setup.sh"
}

make_venv() {
  local python
  # Killed while pip replaced files: pip would take a package with missing files for a complete one.
  if [ -e "$unfinished" ]; then
    printf 'setup: an earlier installation was interrupted; making .venv again\n'
    rm -rf "$venv"
  fi
  python=$venv/bin/python
  if "$python" -c '' >/dev/null 2>&1; then
    supported "$python" || fail "$venv holds $("$python" --version 2>&1), and Python 3.11 or newer is needed;" \
      "remove that folder and run this again"
    if "$python" -m pip --version >/dev/null 2>&1; then return; fi
  else
    python=$(find_python)
    rm -f "$venv/bin/python" "$venv/bin/python3" # else links to a deleted interpreter would be kept
  fi
  printf 'setup: making .venv with %s\n' "$("$python" --version 2>&1)"
  # Over an existing environment: pip is added if it is missing, and an incomplete one is completed.
  "$python" -m venv "$venv" ||
    fail "$python could not make $venv (reason above);" \
      "on Debian and Ubuntu: apt install python3-venv, then run this again"
}

digest() { # of all that decides what is installed; the path too, because scripts hold absolute paths
  "$venv/bin/python" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [sys.version, str(root), (root / "pyproject.toml").read_text(), (root / "constraints.txt").read_text()]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

up_to_date() { # DIGEST EXTRA...: whether the stamp is of this digest and lists every extra
  local want=$1 extra
  shift
  [ -f "$stamp" ] && [ ! -e "$unfinished" ] && [ "$(head -n 1 "$stamp")" = "$want" ] || return 1
  for extra in "$@"; do
    grep -qxF "$extra" "$stamp" || return 1
  done
}

show_progress() { # PID: for how long pip has worked, how much is on disk and what it is doing, until it ends
  local begun=$SECONDS pause=15 line
  if [ -t 1 ]; then pause=2; fi
  while kill -0 "$1" 2>/dev/null; do
    if [ $(((SECONDS - begun) % pause)) -eq 0 ]; then
      line=$(grep -oE '^ *(Collecting|Downloading|Processing|Building|Installing|Preparing) .*' "$log" | tail -n 1 || true)
      line=$(printf '%4d s  %5d MB  %.48s' $((SECONDS - begun)) "$(du -sm "$venv" | cut -f 1)" "${line#"${line%%[! ]*}"}")
      if [ -t 1 ]; then printf '\r\033[Ksetup: %s' "$line"; else printf 'setup: %s\n' "$line"; fi
    fi
    sleep 1
  done
  if [ -t 1 ]; then printf '\r\033[K'; fi
  printf 'setup: pip worked %d s\n' $((SECONDS - begun))
}

install() { # EXTRA...
  local target=. pid
  [ $# -eq 0 ] || target=".[$(IFS=, && printf '%s' "$*")]"
  printf 'setup: installing (PyTorch is the large part; some minutes on the first run)\n'
  # Pip before 25.3 takes the build environment's pins from the first variable, later ones from the second.
  # Both split their value at spaces, hence a path without a folder in it.
  cd "$root"
  PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PYTHONUNBUFFERED=1 \
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    -c constraints.txt -e "$target" >"$log" 2>&1 &
  pid=$!
  # A pip left behind would keep writing into an environment that the next call takes for its own.
  trap 'kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; exit 130' INT TERM HUP
  show_progress "$pid"
  if ! wait "$pid"; then
    tail -n 25 "$log" >&2
    fail "pip could not install (above: the end of $log); fix the cause and run this again"
  fi
  trap - INT TERM HUP
}

main() {
  local want extra extras=()
  if [ -n "${1:-}" ]; then IFS=, read -r -a extras <<<"$1"; fi
  # Two calls at once must not install into one environment; without flock (macOS) the user must prevent it.
  if command -v flock >/dev/null 2>&1; then
    exec 9>"$root/.venv.lock"
    flock -n 9 || { printf 'setup: waiting for another setup in this folder\n' && flock 9; }
  fi
  make_venv
  want=$(digest)
  if up_to_date "$want" ${extras[@]+"${extras[@]}"}; then return; fi
  # Extras of an earlier call stay, in the versions that are pinned now.
  if [ -f "$stamp" ]; then
    while read -r extra; do
      case " ${extras[*]-} " in *" $extra "*) ;; *) extras+=("$extra") ;; esac
    done < <(tail -n +2 "$stamp")
  fi
  : >"$unfinished"
  install ${extras[@]+"${extras[@]}"}
  printf '%s\n' "$want" ${extras[@]+"${extras[@]}"} >"$stamp"
  rm -f "$unfinished"
}

main "$@"
