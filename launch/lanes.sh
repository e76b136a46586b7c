# Several runs, $jobs at a time, for scripts that source this after launch/setup.sh. Every run has its log beside its folder,
# and an interrupt lets all of them save where they stand.

threads=${OMP_NUM_THREADS:-$(($(getconf _NPROCESSORS_ONLN) / jobs))}
[ "$threads" -gt 0 ] || threads=1
main=$$
lanes=()

carry_out() { # module, run's folder, keys: one run, until it is complete
    local run=$2 status=0
    kill -0 "$main" 2>/dev/null || return 1 # nobody waits any more
    OMP_NUM_THREADS=$threads "$python" -m "$1" run="$run" "${@:3}" >>"$run.log" 2>&1 &
    training=$!
    wait "$training" || status=$?
    training=
    if [ "$status" != 0 ]; then
        { echo "error: $run stopped (status $status). The end of $run.log:"; tail -n 5 "$run.log"; } >&2
        return 1
    fi
}

lane() { # a function and its arguments, in a process of its own, which takes its run with it when it is stopped
    training=
    trap '[ -z "$training" ] || { kill -TERM "$training"; wait "$training"; } 2>/dev/null; exit 143' TERM
    "$@"
}

stopped() {
    trap '' INT TERM
    echo "Stopping: every run saves where it stands. The same command goes on from there." >&2
    [ ${#lanes[@]} = 0 ] || kill -TERM "${lanes[@]}" 2>/dev/null || true
    wait
    exit 130
}

in_lanes() { # a function, called with 0 and 1: at once, or with jobs=1 one after the other
    local failed=0 number process
    lanes=()
    trap stopped INT TERM
    for number in 0 1; do
        lane "$1" "$number" &
        lanes+=($!)
        [ "$jobs" = 2 ] || wait $! || failed=1
    done
    for process in "${lanes[@]}"; do wait "$process" || failed=1; done
    trap - INT TERM
    return $failed
}
