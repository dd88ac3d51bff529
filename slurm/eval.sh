#!/usr/bin/env bash
# Compares models on a recipe's test split on all nodes of a SLURM job; each rank answers its share of the questions.
#
#     job=$(sbatch --parsable --nodes 2 slurm/train.sh recipes/datasets/bitext_support.yaml)
#     sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes slurm/eval.sh recipes/datasets/bitext_support.yaml --models base adapter
#
# Paths are as seen from where it is submitted; what is not there to be read, from the project's folder. Answers are kept as
# they are made: before its time limit and when it is preempted the job requeues itself and goes on.
# SITE: what is not given to sbatch on the command line (--partition, --account, --gpus-per-node, --exclusive --mem=0 ...)
#SBATCH --time=24:00:00
#SBATCH --job-name=carelm-eval
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -euo pipefail
asked="" step="" kept="" goes_on=""
trap 'asked=1; [[ -z $step ]] || kill "$step" 2>/dev/null || true' USR1 TERM

if [[ -z ${SLURM_JOB_ID-} || $# == 0 ]]; then
    echo "usage: sbatch [--nodes N] slurm/eval.sh RECIPE [--config OVERLAY ...] [--key value ...]" >&2
    exit 2
fi
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
[[ -f $here/job.sh ]] || { echo "slurm/eval.sh: its folder with job.sh is not found" >&2 && exit 2; }
project=$(realpath "$here/..")
source "$project/slurm/job.sh"

ACCELERATE_CONFIG_FILE=accelerate_configs/nodes_zero2.yaml # as a way to start the ranks: nothing is trained
trap 'forget_code "$kept"' EXIT
prepare_job
keep_code 0 "$kept" --config "$@"
mapfile -t -d "" words <"$project/WORDS"
set -- "${words[@]}"
output=$(python -P -m carelm.cluster.job check 0 "$@")

if [[ -z $asked ]] && call_roll "$@" && [[ -z $asked ]] && launch "$project/eval/run.py" "$@"; then
    exit 0
fi

end_unless_cut_off
requeue "$(cat "$output"/eval/predictions-*.jsonl 2>/dev/null | wc -l) answers"
