#!/usr/bin/env bash
# Trains a recipe on all nodes of a SLURM job; the same file for one node and for eight.
#
#     sbatch --nodes 2 slurm/train.sh recipes/bitext_support.yaml --learning_rate 1e-4
#     slurm/train.sh --prefetch recipes/bitext_support.yaml       on a login node, where the others have no internet
#
# The job is stopped in time before its time limit and by a preemption, saves, requeues itself and goes on; after a plain
# scancel it saves and stays away. ACCELERATE_CONFIG_FILE names another file than accelerate_configs/nodes_zero2.yaml.
# Lines marked SITE are what a site may have to change; each can be given to sbatch instead, as --time or --gpus-per-node.
#SBATCH --job-name=carelm
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --exclusive
#SBATCH --time=24:00:00
# SITE: the line above, and where the cluster wants them: #SBATCH --partition, --account, --gpus-per-node
set -euo pipefail

# A batch script is a copy in SLURM's spool folder: the job knows where it came from.
script=${BASH_SOURCE[0]}
[[ -z ${SLURM_JOB_ID-} ]] || script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
project=$(realpath "$(dirname "$script")/..")

# SITE: the environment; a module in its place where the cluster has one.
source "${VENV:-$project/.venv}/bin/activate"
# SITE: what is read again and again lies on the node's own disk; the output must be on one that all nodes share.
export CARELM_CACHE=${CARELM_CACHE:-${TMPDIR:-/tmp}/carelm-cache-$USER}
# SITE: where the nodes have several networks: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

if [[ ${1-} == --prefetch ]]; then
    exec python -m carelm.job prefetch --config "${@:2}"
fi
if [[ -z ${SLURM_JOB_ID-} || $# == 0 ]]; then
    echo "usage: sbatch [--nodes N] slurm/train.sh RECIPE [--key value ...]" >&2
    exit 2
fi

ranks_per_node=${SLURM_GPUS_ON_NODE:-1}
ranks=$((SLURM_NNODES * ranks_per_node))
output=$(python -m carelm.job check "$ranks" --config "$@")

reason=
request_stop() {
    reason=$1
    echo "$1" >"$output/stop_request"
}
trap 'request_stop "the time limit or a preemption"' USR1
trap 'request_stop SIGTERM' TERM

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
