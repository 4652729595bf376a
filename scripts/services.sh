# shellcheck shell=bash
# Sourced, not run: background processes with a pid file and a log each, under $run_dir.
#
# A pid file holds two lines, the process id and the moment that process started. Ids are used again after a crash or
# a reboot; a process with the same id but another start is not ours, and is neither reported nor killed.
# Expects environment.sh to have been sourced.

run_dir="${KVCACHE_RUN_DIR:-$root/run}"
grace_s="${KVCACHE_GRACE_S:-15}"

pid_file() { printf '%s/%s.pid' "$run_dir" "$1"; }
log_file() { printf '%s/%s.log' "$run_dir" "$1"; }

# When a process started, in a form that only needs to compare equal. Empty for one that is gone or a zombie.
started_at() {
    local state
    state="$(ps -o stat= -p "$1" 2>/dev/null)" || return 0
    [[ $state == Z* ]] || ps -o lstart= -p "$1" 2>/dev/null || true
}

# The process id of a service if it runs, else nothing; a stale pid file is removed.
running_pid() {
    local file pid started
    file="$(pid_file "$1")"
    [[ -f $file ]] || return 0
    { read -r pid && read -r started; } <"$file" || true
    if [[ ${pid:-} =~ ^[0-9]+$ && -n ${started:-} && "$(started_at "$pid")" == "$started" ]]; then
        printf '%s' "$pid"
    else
        rm -f "$file"
    fi
}

# The names of the services that run, workers by number.
running_services() {
    local file name
    for file in "$run_dir"/*.pid; do
        [[ -f $file ]] || continue
        name="$(basename "$file" .pid)"
        [[ -z "$(running_pid "$name")" ]] || printf '%s\n' "$name"
    done | sort -V
}

# spawn NAME COMMAND...: start it in the background, unless it runs already.
spawn() {
    local name="$1" pid
    shift
    [[ -z "$(running_pid "$name")" ]] || return 0
    mkdir -p "$run_dir"
    nohup "$@" >"$(log_file "$name")" 2>&1 </dev/null &
    pid=$!
    disown
    printf '%s\n%s\n' "$pid" "$(started_at "$pid")" >"$(pid_file "$name")"
    say "started $name (pid $pid, log ${run_dir#"$root"/}/$name.log)"
}

# terminate NAME...: SIGTERM to all of them at once, SIGKILL to what is left after the grace.
terminate() {
    local name pid deadline=$((SECONDS + grace_s))
    for name in "$@"; do
        pid="$(running_pid "$name")"
        [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true
    done
    for name in "$@"; do
        while [[ -n "$(running_pid "$name")" ]] && ((SECONDS < deadline)); do sleep 0.1; done
        pid="$(running_pid "$name")"
        if [[ -n $pid ]]; then
            say "$name (pid $pid) did not end within $grace_s s; killing it"
            kill -KILL "$pid" 2>/dev/null || true
            while [[ -n "$(running_pid "$name")" ]]; do sleep 0.05; done
        else
            say "stopped $name"
        fi
    done
}

show_log_end() {
    say "--- last lines of $(log_file "$1")"
    tail -n 20 "$(log_file "$1")" >&2 2>/dev/null || say "(no log)"
}
