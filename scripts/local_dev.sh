#!/usr/bin/env bash
# Run the whole system on this machine: one broker and some workers, as processes, with logs under run/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$root/scripts/services.sh"

port="${KVCACHE_PORT:-5555}"
model="${KVCACHE_MODEL:-smollm2}"
ready_s="${KVCACHE_READY_S:-120}"
default_workers=2
export KVCACHE_URL="tcp://127.0.0.1:$port"

usage() {
    cat <<HELP
usage: scripts/local_dev.sh COMMAND

  start [N]       start the broker and N workers (default $default_workers) and wait until they serve; the default command
  stop            stop them all, workers first: SIGTERM, then SIGKILL after KVCACHE_GRACE_S
  restart [N]     stop, then start with N workers (default: as many as ran)
  status          what runs, and what the workers hold
  logs [SERVICE]  follow the log of broker, worker-1, worker-2, ... (default: all)
  scale N         start or stop workers until N run
  demo [--json]   a two-turn chat with a real model on a broker and two workers of its own, with figures
  test [ARG...]   every test, inner rings first; arguments go to pytest
  clean           stop, then remove the logs and the caches of the tools; the environment and the models stay

Environment: KVCACHE_PORT (first of a block of six ports, now $port), KVCACHE_MODEL (a name, folder or hub id, now $model),
KVCACHE_KV_BYTES (each worker's KV memory, default 1GiB), KVCACHE_GRACE_S ($grace_s), KVCACHE_READY_S ($ready_s),
KVCACHE_RUN_DIR. The Python environment is the active one, else .venv at the root, made on first use; or that of
KVCACHE_PYTHON, where nothing is installed.
HELP
}

kvcache() { "$python" -m kvcache.cli "$@"; }

need_count() {
    [[ $1 =~ ^[0-9]+$ ]] || { say "error: the number of workers must be a whole number, not '$1'"; exit 2; }
}

need_free_ports() {
    "$python" - "$port" <<'PYTHON' || fail "choose another block of six free ports: KVCACHE_PORT=6555 scripts/local_dev.sh start"
import socket, sys
for port in range(int(sys.argv[1]), int(sys.argv[1]) + 6):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            sys.exit(f"error: port {port} cannot be used: {error}")
PYTHON
}

need_model() {
    [[ -d $model ]] || kvcache models pull "$model" || fail "the model $model could not be fetched; see the message above"
}

running_workers() { running_services | grep '^worker-' || true; }

start_broker() {
    [[ -z "$(running_pid broker)" ]] || return 0
    need_free_ports
    spawn broker "$python" -m kvcache.broker --bind "$KVCACHE_URL"
}

# start_worker NUMBER TOTAL: with its share of the cores; a worker keeps the share it started with.
start_worker() {
    local threads=$(($(getconf _NPROCESSORS_ONLN) / $2))
    spawn "worker-$1" "$python" -m workers --broker "$KVCACHE_URL" --model "$model" --worker-id "worker-$1" \
        --kv-cache-memory-bytes "${KVCACHE_KV_BYTES:-1GiB}" --threads "$((threads > 0 ? threads : 1))"
}

# How many of our workers the broker would send work to now; nothing while the broker does not answer.
num_serving() {
    kvcache workers --json --timeout 2 2>/dev/null | "$python" -c \
        'import json, sys; print(sum(worker["status"] == "ready" for worker in json.load(sys.stdin)))' 2>/dev/null || true
}

# wait_until_ready N: until the broker counts N serving workers, and every process we started is alive.
wait_until_ready() {
    local deadline=$((SECONDS + ready_s)) name services
    services="broker $(seq -f 'worker-%g' "$1" | tr '\n' ' ')"
    while [[ "$(num_serving)" != "$1" ]]; do
        for name in $services; do
            [[ -n "$(running_pid "$name")" ]] || { show_log_end "$name"; fail "$name ended while starting"; }
        done
        if ((SECONDS >= deadline)); then
            for name in $services; do show_log_end "$name"; done
            fail "no $1 serving workers at $KVCACHE_URL after $ready_s s; raise KVCACHE_READY_S on a slow machine"
        fi
        sleep 0.3
    done
}

scale_to() {
    local surplus=() name number
    while read -r name; do
        [[ -z $name ]] || ((${name#worker-} <= $1)) || surplus+=("$name")
    done < <(running_workers)
    ((${#surplus[@]} == 0)) || terminate "${surplus[@]}"
    for ((number = 1; number <= $1; number++)); do start_worker "$number" "$1"; done
    wait_until_ready "$1"
}

start() {
    local count="${1:-$default_workers}"
    need_count "$count"
    need_model
    start_broker
    scale_to "$count"
    say "$count workers serve $model at $KVCACHE_URL"
    [[ $port == 5555 ]] || say "  export KVCACHE_URL=$KVCACHE_URL"
    say "  ${python%/*}/kvcache generate 'The capital of France is'"
}

stop() {
    local workers
    mapfile -t workers < <(running_workers)
    ((${#workers[@]} == 0)) || terminate "${workers[@]}"
    if [[ -n "$(running_pid broker)" ]]; then
        terminate broker
    elif ((${#workers[@]} == 0)); then
        say "nothing is running"
    fi
}

restart() {
    local count
    count="${1:-$(running_workers | wc -l)}"
    need_count "$count"
    stop
    start "$((count > 0 ? count : default_workers))"
}

status() {
    local name services
    services="$(running_services)"
    [[ -n $services ]] || { say "nothing is running"; exit 3; }
    for name in $services; do
        printf '%-10s pid %-8s up %s\n' "$name" "$(running_pid "$name")" "$(ps -o etime= -p "$(running_pid "$name")" | tr -d ' ')"
    done
    kvcache workers
}

logs() {
    local files=("$run_dir"/*.log)
    [[ -f ${files[0]} ]] || fail "no logs under $run_dir; start something first"
    if (($# > 0)); then
        [[ -f "$(log_file "$1")" ]] || fail "no log of '$1' among: ${files[*]##*/}"
        files=("$(log_file "$1")")
    fi
    exec tail -n 50 -F "${files[@]}"
}

clean() {
    stop
    cd "$root"
    rm -f "$run_dir"/*.log
    rmdir "$run_dir" 2>/dev/null || true
    rm -rf build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
    say "removed logs and caches; the environment $(env_prefix) and the models stay"
}

main() {
    local command="${1:-start}"
    (($# == 0)) || shift
    case "$command" in -h | --help | help) usage; return ;; esac
    if ! [[ $port =~ ^[1-9][0-9]*$ ]] || ((port > 65530)); then
        fail "KVCACHE_PORT must be a port from 1 to 65530, not '$port'"
    fi
    python="$(env_python)"
    case "$command" in
        stop | logs | clean) "$command" "$@"; return ;;
        start | restart | status | scale | demo | test) ;;
        *) say "error: unknown command '$command'"; usage >&2; exit 2 ;;
    esac
    "$root/scripts/setup.sh"
    cd "$root"
    case "$command" in
        scale)
            need_count "${1:-}"
            [[ -n "$(running_pid broker)" ]] || fail "nothing is running; start it: scripts/local_dev.sh start $1"
            scale_to "$1"
            ;;
        demo) need_model; exec "$python" -m kvcache.demo --model "$model" "$@" ;;
        test) need_model; exec "$python" -m pytest "$@" ;;
        *) "$command" "$@" ;;
    esac
}

main "$@"
