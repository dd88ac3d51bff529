# shellcheck shell=bash
# What train.sh and eval.sh share: the environment, the nodes of the job, a step that signals do not cut off, the end.
# They source it with $project set. Lines marked SITE are what a site may have to change, with the #SBATCH lines there.

# SITE: the environment; `module load ...` in its place where the cluster has one.
# shellcheck source=/dev/null
source "${VENV:-$project/.venv}/bin/activate"
# SITE: prepared data lies on the node's own disk; checkpoints and reports need a file system that all nodes share.
export CARELM_CACHE=${CARELM_CACHE:-${TMPDIR:-/tmp}/carelm-cache-$(id -un)}
# SITE: nodes without internet, after `slurm/train.sh --prefetch RECIPE` on a login node: export HF_HUB_OFFLINE=1
# SITE: nodes with several networks: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30} # seconds between two lines of a progress bar in the log

# Sets what the nodes have to know of one another, and `recipe`.
prepare_job() {
    local host_list log
    host_list=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    mapfile -t hosts <<<"$host_list"
    ranks_per_node=${SLURM_GPUS_ON_NODE:-1}
    # Jobs may share a node: the ports follow from the job's number.
    export RANKS=$((SLURM_NNODES * ranks_per_node)) HOSTS="${hosts[*]}" MASTER_ADDR=${hosts[0]}
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) ROLL_CALL_PORT=$((30000 + SLURM_JOB_ID % 10000))
    log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
    export NODE_LOG=${log%.*} CARELM_STATUS_FILE=${log%.*}.status
    rm -f "$CARELM_STATUS_FILE"
    echo "carelm: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $RANKS ranks on ${hosts[*]}"
    recipe=$1
    [[ ! -f $recipe ]] || recipe=$(realpath --no-symlinks "$recipe")
    cd "$project" || exit
}

# Runs a step in the background, so that a signal to this script is served while it runs; returns the step's status.
run_step() {
    local status=0
    "$@" &
    step=$!
    while wait "$step" && status=0 || status=$?; kill -0 "$step" 2>/dev/null; do :; done
    step=""
    return "$status"
}

# Every rank reports in, or the job ends with the name of the node that does not.
call_roll() {
    run_step srun --kill-on-bad-exit --overcommit --ntasks="$RANKS" --ntasks-per-node="$ranks_per_node" \
        python -m carelm.rollcall "$@"
}

# One launcher per node. The first node writes to the job's log, each other one to a log of its own.
launch() {
    # shellcheck disable=SC2016
    run_step srun --kill-on-bad-exit --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c '
        trap "" USR1 # the launcher would die of it
        ((SLURM_PROCID == 0)) || exec >>"$NODE_LOG-$SLURMD_NODENAME.log" 2>&1
        exec accelerate launch --config_file "$ACCELERATE_CONFIG_FILE" \
            --num_machines "$SLURM_NNODES" --num_processes "$RANKS" --machine_rank "$SLURM_PROCID" \
            --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@"
        ' launcher "$@"
}

# Whether SLURM still wants this job; false after scancel, and after a requeue that SLURM sees to itself.
is_wanted() {
    local state
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p')
    [[ $state == RUNNING ]] || echo "carelm: the job is $state: it ends here, or SLURM starts it again"
    [[ $state == RUNNING ]]
}

requeue() {
    echo "carelm: $(date +%T) requeued, to go on where it was"
    scontrol requeue "$SLURM_JOB_ID"
}
