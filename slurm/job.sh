# shellcheck shell=bash
# What train.sh and eval.sh share: the environment, the nodes of the job, a step that signals do not cut off, the end.
# They source it with $project set. Lines marked SITE are what a site may have to change, with the #SBATCH lines there.

origin=$project # or the project that the job has copied
[[ ! -f $project/ORIGIN ]] || origin=$(<"$project/ORIGIN")
# SITE: the environment; `module load ...` here where the cluster has one.
if [[ -f ${VENV:-$origin/.venv}/bin/activate ]]; then
    # shellcheck source=/dev/null
    source "${VENV:-$origin/.venv}/bin/activate"
fi
command -v accelerate-launch >/dev/null || {
    echo "error: no environment: make it with make -C $origin train, set VENV to another one, or load a module in slurm/job.sh" >&2
    exit 2
}
# Whichever copy the environment was made for; a node that does not see the job's copy says so by the project's code.
export PYTHONPATH=$project:$origin${PYTHONPATH:+:$PYTHONPATH}
# SITE: prepared data lies on the node's own disk; checkpoints and reports need a file system that all nodes share.
export CARELM_CACHE=${CARELM_CACHE:-${TMPDIR:-/tmp}/carelm-cache-$(id -un)}
# SITE: nodes without internet, after `slurm/train.sh --prefetch RECIPE` on a login node: export HF_HUB_OFFLINE=1
# SITE: nodes with several networks: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# SITE: seconds until a rank counts as missing; more where Python starts slowly from a network disk.
export ROLL_CALL_PATIENCE=${ROLL_CALL_PATIENCE:-40}
# SITE: seconds from the signal before the time limit (--signal in train.sh, less half a minute) to save in.
export SAVE_PATIENCE=${SAVE_PATIENCE:-150}
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30} # seconds between two lines of a progress bar in the log

# What SLURM says of this job; asked again where the controller does not answer.
show_job() {
    for _ in 1 2 3 4 5; do
        scontrol show job "$job" 2>/dev/null && return
        sleep 3
    done
}

# One field of it.
job_field() {
    show_job | sed -n "s/^.*\b$1=\([^ ]*\).*/\1/p" | head -n 1
}

# Sets what the nodes have to know of one another.
prepare_job() {
    local host_list log
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    host_list=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    mapfile -t hosts <<<"$host_list"
    ranks_per_node=${SLURM_GPUS_ON_NODE:-1}
    # Every step sees all GPUs of the job's nodes, and its processes share them by local rank.
    unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
    gpus=()
    [[ -z ${SLURM_GPUS_ON_NODE-} ]] || gpus=(--gpus-per-node="$ranks_per_node")
    # Jobs may share a node: the ports follow from the job's number.
    export MASTER_PORT=$((20000 + 2 * (SLURM_JOB_ID % 5000)))
    export ROLL_CALL_PORT=$((MASTER_PORT + 1))
    CARELM_STARTED=$(date +%s)
    export CARELM_STARTED RANKS=$((SLURM_NNODES * ranks_per_node)) HOSTS="${hosts[*]}" MASTER_ADDR=${hosts[0]}
    log=$(show_job | sed -n 's/^ *StdOut=//p')
    export JOB_LOG=$log NODE_LOG=${log%.log} CARELM_STATUS_FILE=${log%.log}.status
    rm -f "$CARELM_STATUS_FILE"
    ((${SLURM_RESTART_COUNT:-0})) || rm -f "$NODE_LOG.progress"
    echo "carelm: job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $RANKS ranks on ${hosts[*]}"
}

# Whether the code that runs is the copy that this job has made.
is_copy() {
    [[ $project == */.code/$SLURM_JOB_ID ]]
}

# From here on the job runs a copy of its code and recipes. The first start makes it; in its WORDS stands the command line.
keep_code() {
    is_copy || project=$(python -P -m carelm.cluster.job keep "$@")
    export PYTHONPATH=$project:$PYTHONPATH
    ACCELERATE_CONFIG_FILE=$(python -P -m carelm.cluster.job locate "$ACCELERATE_CONFIG_FILE")
    export ACCELERATE_CONFIG_FILE
}

# The copy, and the link to it ($1), go with the job, unless that or SLURM starts it again.
forget_code() {
    if is_copy && [[ -z $goes_on && $(job_field Restarts) == "${SLURM_RESTART_COUNT:-0}" ]]; then
        rm -rf "$project" "$1"
    fi
}

# Runs a step in the background, so that a signal to this script is served while it runs; returns the step's status.
run_step() {
    local status=0 own=0
    "$@" &
    step=$!
    wait "$step" || status=$?
    while kill -0 "$step" 2>/dev/null; do # a trap has cut the wait short
        status=0
        wait "$step" || status=$?
    done
    wait "$step" || own=$? # 127 where the last wait has told it already
    step=""
    ((own == 127)) || status=$own
    return "$status"
}

# Every rank reports in, or the job ends with the name of the node that does not.
call_roll() {
    run_step srun --export=ALL --kill-on-bad-exit --overcommit --cpu-bind=none --distribution=block "${gpus[@]}" \
        --ntasks="$RANKS" --ntasks-per-node="$ranks_per_node" python -P -m carelm.cluster.rollcall "$@"
}

# One launcher per node. The first node writes to the job's log, each other one to a log of its own; not through srun, which
# keeps a progress bar back until its line ends.
launch() {
    # shellcheck disable=SC2016
    run_step srun --export=ALL --kill-on-bad-exit --cpu-bind=none --distribution=block "${gpus[@]}" \
        --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c '
        trap "" USR1 # the launcher would die of it
        ((SLURM_PROCID == 0)) || JOB_LOG=$NODE_LOG-$SLURMD_NODENAME.log
        exec >>"$JOB_LOG" 2>&1
        exec accelerate-launch --config_file "$ACCELERATE_CONFIG_FILE" \
            --num_machines "$SLURM_NNODES" --num_processes "$RANKS" --machine_rank "$SLURM_PROCID" \
            --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@"
        ' launcher "$@"
}

# Ends the job where something is to be mended first (2: the log says what), where SLURM wants it no more (after scancel) or
# sees to the requeue itself, and where max_hours or a person has stopped the run (75: saved).
end_unless_cut_off() {
    local ended="" why="" # of the first rank
    local state
    [[ ! -f $CARELM_STATUS_FILE ]] || read -r ended why <"$CARELM_STATUS_FILE" || true
    [[ $ended != 2 ]] || exit 2
    state=$(job_field JobState)
    if [[ -n $state && $state != RUNNING ]]; then
        echo "carelm: the job is $state: it ends here, or SLURM starts it again"
        exit 1
    fi
    [[ $ended != 75 || -n $asked || $why == SIG* || $why == "the launcher has died" ]] || exit 75
}

# Starts the job again, unless three starts in a row have ended with the same progress ($1); one that gave way to a more
# urgent job does not count.
requeue() {
    local before="" times=0
    [[ ! -f $NODE_LOG.progress ]] || { read -r times && read -r before; } <"$NODE_LOG.progress" || true
    [[ $before == "$1" ]] || times=0
    [[ $(job_field PreemptTime) == [0-9]* ]] || times=$((times + 1))
    printf '%s\n%s\n' "$times" "$1" >"$NODE_LOG.progress"
    if ((times >= 3)); then
        echo "carelm: three starts have ended after ${1:-nothing at all}; it is not requeued again" >&2
        rm -f "$NODE_LOG.progress" # who requeues it by hand has mended something
        exit 1
    fi
    echo "carelm: $(date +%T) requeued, to go on where it was"
    for _ in 1 2 3 4 5; do
        scontrol requeue "$job" && goes_on=1 && return
        sleep 3
    done
    return 1
}
