#!/usr/bin/env bash
# Trains a config on all nodes of a Slurm job, under any engine:
#
#     sbatch --nodes 16 launch/multinode.sh gpt3_13b.yaml [section.key=value ...] [--allow-recipe-change] [--at TOKENS]
#
# sbatch's options override the lines below, and so does its environment: --account or SBATCH_ACCOUNT, --partition or
# SBATCH_PARTITION, --time or SBATCH_TIMELIMIT, --gpus-per-node or SBATCH_GPUS_PER_NODE, --signal, --exclude, ...
# `megagpt launch slurm` prints the whole sbatch command, and refuses a run that cannot work.
#
# Before sbatch, activate the environment in which megagpt is installed, or set PYTHON=/path/to/its/python.
# Optional: RANKS_PER_NODE (default: the GPUs of a node), MASTER_PORT (default: derived from the job's number).
#SBATCH --job-name=megagpt
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Signal to save, and its time before the time limit (s); Slurm may be a minute late.
#SBATCH --signal=USR1@300
set -euo pipefail

if [[ $# == 0 || -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch --nodes N launch/multinode.sh CONFIG [section.key=value ...]" >&2
  exit 2
fi
python=${PYTHON:-python3}
job=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
echo "== job $job on $SLURM_NNODES node(s), $RANKS_PER_NODE rank(s) each: $*"

# Exit codes. 0: done. 75: stopped by a signal, or a failure that a retry may not repeat: requeue. Others: fix it first.
end() {
  if [[ $1 == 75 ]] && [[ $(scontrol show job -o "$SLURM_JOB_ID") == *" JobState=RUNNING "* ]]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 600 # Slurm ends this script earlier
  fi
  exit "$1"
}

# Refuses an impossible config and unfit nodes. Prints the run's folder, or nothing if the run is finished.
run=$("$python" -m megagpt launch check "$@") || end $?
[[ -n $run ]] || end 0

# torchrun must ignore signals: SIGUSR1 would kill torchrun, and after a SIGTERM torchrun would kill its ranks in 30 s.
# Slurm signals the ranks too; when they have saved and exited, torchrun exits.
export PET_SIGNALS_TO_HANDLE=SIGHUP
export logs=$run/logs/$job python job
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c '
    trap "" USR1 TERM INT
    ulimit -Sn "$(ulimit -Hn)" # torchrun holds the store, to which each rank has two connections
    mkdir -p "$logs/$SLURMD_NODENAME"
    exec "$python" -m torch.distributed.run \
      --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
      --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --rdzv-id="$job" --max-restarts=0 \
      --log-dir="$logs/$SLURMD_NODENAME" --redirects=3 --tee=0:3 \
      --module megagpt train --auto-resume "$@" 2>> "$logs/$SLURMD_NODENAME.torchrun.log"
  ' train "$@" || true # the verdict decides

code=0
"$python" -m megagpt launch verdict "$@" --logs "$logs" || code=$?
end "$code"
