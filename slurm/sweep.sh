#!/usr/bin/env bash
# Runs a sweep on one node, one run at a time for each GPU of the job; the tasks of a job array share the runs, or the search.
#
#     sbatch --array 0-3 --gpus-per-node 1 slurm/sweep.sh recipes/sweeps/alpha_over_r.yaml --model_name_or_path ...
#     sbatch --gpus-per-node 4 slurm/sweep.sh recipes/sweeps/search.yaml --model_name_or_path ...
#
# Paths are as seen from where it is submitted; what is not there to be read, from the project's folder. Before its time limit
# and when it is preempted a task has its runs save, requeues itself and goes on. After a plain scancel it saves and stays away.
# The task that ends last makes the comparison. The runs' own logs lie beside their folders.
# SITE: what is not given to sbatch on the command line (--partition, --account, --gpus-per-node, --mem ...)
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --job-name=carelm-sweep
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
asked="" step=""
trap 'asked=USR1; [[ -z $step ]] || kill "$step" 2>/dev/null || true' USR1
trap 'asked=TERM; [[ -z $step ]] || kill "$step" 2>/dev/null || true' TERM

if [[ -z ${SLURM_JOB_ID-} || $# == 0 ]]; then
    echo "usage: sbatch [--array 0-N] slurm/sweep.sh SWEEP [--config OVERLAY ...] [--key value ...]" >&2
    exit 2
fi
# What SLURM runs is a copy in its spool folder; the job knows where it came from.
here=$(dirname "${BASH_SOURCE[0]}")
for _ in 1 2 3 4 5; do
    [[ ! -f $here/job.sh ]] || break
    about=$(scontrol show job "$SLURM_JOB_ID") || sleep 3
    here=$(sed -n 's|^ *Command=\(.*/slurm\)/[^/]*\.sh.*|\1|p' <<<"$about" | head -n 1)
done
[[ -f $here/job.sh ]] || { echo "slurm/sweep.sh: its folder with job.sh is not found" >&2 && exit 2; }
project=$(realpath "$here/..")
source "$project/slurm/job.sh"
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
echo "carelm: job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $(hostname)"

status=0
[[ -n $asked ]] || run_step python -P "$project/train/sweep.py" "$@" || status=$?
if [[ $asked == USR1 && ($status == 75 || $status == 0) ]]; then
    echo "carelm: $(date +%T) requeued, to go on where it was"
    scontrol requeue "$job"
fi
exit "$status"
