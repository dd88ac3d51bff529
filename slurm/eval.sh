#!/usr/bin/env bash
# Compares models on a recipe's test split on all nodes of a SLURM job; each rank answers its share of the questions.
#
#     job=$(sbatch --parsable --nodes 2 slurm/train.sh recipes/bitext_support.yaml)
#     sbatch --dependency=afterok:$job slurm/eval.sh recipes/bitext_support.yaml --models base adapter
#
# Answers are kept as they are made: before its time limit and when it is preempted the job requeues itself and goes on.
# SITE: what is not given to sbatch on the command line (--partition, --account, --gpus-per-node, --time ...)
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --job-name=carelm-eval
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -euo pipefail

# What SLURM runs is a copy in its spool folder; the job knows where it came from.
if [[ -z ${SLURM_JOB_ID-} || $# == 0 ]]; then
    echo "usage: sbatch [--nodes N] slurm/eval.sh RECIPE [--key value ...]" >&2
    exit 2
fi
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
project=$(realpath "$(dirname "$script")/..")
source "$project/slurm/job.sh"

prepare_job "$1"
set -- --config "$recipe" "${@:2}"
export ACCELERATE_CONFIG_FILE=accelerate_configs/nodes_zero2.yaml # as a way to start the ranks: nothing is trained
python -m carelm.job check 1 "$@" >/dev/null

asked="" step=""
trap 'asked=1; [[ -z $step ]] || kill "$step"' USR1 TERM
call_roll "$@"
status=0
[[ -n $asked ]] || launch eval/run.py "$@" || status=$?
[[ $status != 0 || -n $asked ]] || exit 0
[[ -n $asked ]] || exit "$status"
is_wanted || exit 1
requeue
