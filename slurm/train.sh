#!/usr/bin/env bash
# Trains a recipe on all nodes of a SLURM job; the same file for one node and for eight.
#
#     sbatch --nodes 2 --gpus-per-node 4 slurm/train.sh recipes/datasets/bitext_support.yaml --learning_rate 1e-4
#     sbatch slurm/train.sh recipes/datasets/bitext_support.yaml --config recipes/overlays/demo_base.yaml
#     slurm/train.sh --prefetch recipes/datasets/bitext_support.yaml       on a login node, for nodes without internet
#
# Paths are as seen from where it is submitted; what is not there to be read, from the project's folder. Before its time limit
# and when it is preempted the job saves, requeues itself and goes on. After a plain scancel it saves and stays away.
# ACCELERATE_CONFIG_FILE=accelerate_configs/nodes_zero3.yaml names another ZeRO stage.
# SITE: what is not given to sbatch on the command line (--partition, --account, --gpus-per-node, --exclusive --mem=0 ...)
#SBATCH --time=24:00:00
#SBATCH --job-name=carelm
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
asked="" step="" kept="" goes_on="" late=""
trap 'asked="a signal before the start"' USR1 TERM

# What SLURM runs is a copy in its spool folder; the job knows where it came from. Its first start copies code and recipes for
# the later ones, which find them by a link beside the log.
here=$(dirname "${BASH_SOURCE[0]}")
for _ in 1 2 3 4 5; do
    [[ ! -f $here/job.sh ]] || break
    about=$(scontrol show job "${SLURM_JOB_ID-}") || sleep 3
    here=$(sed -n 's|^ *Command=\(.*/slurm\)/[^/]*\.sh.*|\1|p' <<<"$about" | head -n 1)
    kept=$(sed -n 's|^ *StdOut=\(.*\)/.*|\1|p' <<<"$about" | head -n 1)/slurm-${SLURM_JOB_ID-}.code
    [[ ${SLURM_RESTART_COUNT:-0} == 0 || ! -f $kept/slurm/job.sh ]] || here=$kept/slurm
done
[[ -f $here/job.sh ]] || { echo "slurm/train.sh: its folder with job.sh is not found" >&2 && exit 2; }
project=$(realpath "$here/..")
source "$project/slurm/job.sh"
if [[ ${1-} == --prefetch && $# -ge 2 ]]; then
    exec python -P -m carelm.cluster.job prefetch --config "${@:2}"
elif [[ -z ${SLURM_JOB_ID-} || $# == 0 ]]; then
    echo "usage: sbatch [--nodes N] slurm/train.sh RECIPE [--config OVERLAY ...] [--key value ...]" >&2
    exit 2
fi

ACCELERATE_CONFIG_FILE=${ACCELERATE_CONFIG_FILE:-accelerate_configs/nodes_zero2.yaml}
trap '[[ -z $late ]] || kill "$late" 2>/dev/null || true; forget_code "$kept"' EXIT
prepare_job
keep_code "$RANKS" "$kept" --config "$@"
mapfile -t -d "" words <"$project/WORDS"
set -- "${words[@]}"
output=$(python -P -m carelm.cluster.job check "$RANKS" "$@")
holder=$(sed -n "s/^job \([0-9]*\), .*/\1/p" "$output/.lock" 2>/dev/null || true)
if [[ -n $holder && $holder != "$SLURM_JOB_ID" && -n $(squeue -h -t PD,R,S -j "$holder" 2>/dev/null || true) ]]; then
    echo "error: output_dir: $output is that of job $holder, which waits or runs; --dependency=afterany:$holder waits for it" >&2
    exit 2
fi

# The checkpoint that the next start goes on from.
newest_checkpoint() {
    find "$output" -regex '.*/checkpoint-[0-9]+/complete.json' 2>/dev/null | sort --version-sort | tail -n 1 || true
}

# A stop request is a file in the output folder that all ranks look for; a signal does no more than write it. Before the
# first rank holds the folder's lock there is nothing to save: another run may still be writing there.
ask_to_stop() {
    asked=$1
    if grep -q "^job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))," "$output/.lock" 2>/dev/null; then
        echo "$1" >"$output/stop_request" || true
        echo "carelm: $(date +%T) $1: the ranks are asked to save and stop"
    else
        echo "carelm: $(date +%T) $1, before there was anything to save"
        [[ -z $step ]] || kill "$step" 2>/dev/null || true
    fi
}
# SLURM does not start a job again that its time limit has ended: ranks that do not answer in time are left behind.
leave_in_time() {
    sleep "$SAVE_PATIENCE"
    echo "carelm: the ranks have not saved within $SAVE_PATIENCE s" >&2
    requeue "$(newest_checkpoint)"
}
trap 'ask_to_stop "time limit or preemption"; leave_in_time & late=$!' USR1
trap 'ask_to_stop SIGTERM' TERM

if [[ -z $asked ]] && call_roll "$@" && [[ -z $asked ]] && launch "$project/train/sft.py" "$@"; then
    exit 0
fi

[[ -z $late ]] || kill "$late" 2>/dev/null || true
end_unless_cut_off
requeue "$(newest_checkpoint)"
