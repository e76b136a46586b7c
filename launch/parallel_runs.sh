# Several runs, $jobs at a time, for scripts that source this after launch/setup.sh. Each run has its log beside its folder.
# On an interrupt all runs save a checkpoint and stop.

threads=${OMP_NUM_THREADS:-$(($(getconf _NPROCESSORS_ONLN) / jobs))}
[ "$threads" -gt 0 ] || threads=1
main=$$
workers=()

run_until_done() { # module, run's folder, keys: start one run and wait for its end
    local run=$2 status=0
    kill -0 "$main" 2>/dev/null || return 1 # the script itself is gone
    OMP_NUM_THREADS=$threads "$python" -m "$1" run="$run" "${@:3}" >>"$run.log" 2>&1 &
    training=$!
    wait "$training" || status=$?
    training=
    if [ "$status" != 0 ]; then
        { echo "error: $run stopped (status $status). The end of $run.log:"; tail -n 5 "$run.log"; } >&2
        return 1
    fi
}

worker() { # a function and its arguments, in a process of its own; SIGTERM stops its current run, too
    training=
    trap '[ -z "$training" ] || { kill -TERM "$training"; wait "$training"; } 2>/dev/null; exit 143' TERM
    "$@"
}

stop_all() {
    trap '' INT TERM
    echo "Stopping: every run saves a checkpoint. The same command resumes them." >&2
    [ ${#workers[@]} = 0 ] || kill -TERM "${workers[@]}" 2>/dev/null || true
    wait
    exit 130
}

in_parallel() { # a function, called with 0 and with 1: at once, or with jobs=1 one after the other
    local failed=0 number process
    workers=()
    trap stop_all INT TERM
    for number in 0 1; do
        worker "$1" "$number" &
        workers+=($!)
        [ "$jobs" = 2 ] || wait $! || failed=1
    done
    for process in "${workers[@]}"; do wait "$process" || failed=1; done
    trap - INT TERM
    return $failed
}

all_seeds() { # 0 or 1: calls that one of the two functions in $works with each of $seeds
    local seed
    for seed in ${seeds//,/ }; do "${works[$1]}" "$seed" || return 1; done
}

evaluate_all() { # names: evaluates $runs/NAME-seedN of each of $seeds, one after the other, and puts the folders into $made
    local seed name run
    made=()
    for seed in ${seeds//,/ }; do
        for name in "$@"; do
            run=$runs/$name-seed$seed
            made+=("$run")
            [ -f "$run/evaluation/test.json" ] || "$python" -m coconut.evaluate run="$run" batch_size=250 >/dev/null
        done
    done
}
