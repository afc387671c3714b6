#!/usr/bin/env bash
# Trains a config on all nodes of a Slurm job, under any engine:
#
#     sbatch --nodes 16 launch/multinode.sh gpt3_13b.yaml [section.key=value ...] [--allow-recipe-change]
#
# sbatch's options override the lines below, and so does its environment: --account or SBATCH_ACCOUNT, --partition or
# SBATCH_PARTITION, --time or SBATCH_TIMELIMIT, --gpus-per-node or SBATCH_GPUS_PER_NODE, --signal, --exclude, ...
# `megagpt launch slurm` writes the whole command, and refuses what cannot work.
#
# Submitted with the environment activated that megagpt is installed in, or with PYTHON=/path/to/its/python.
# RANKS_PER_NODE (the GPUs of a node) and MASTER_PORT (derived from the job's number) may be set.
#SBATCH --job-name=megagpt
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# So many seconds before the time limit the ranks are told to save. Slurm may be a minute late.
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

# 0: done. 75: stopped by a signal, or failed in a way that may pass: back into the queue. Else: to be mended.
end() {
  if [[ $1 == 75 ]] && [[ $(scontrol show job -o "$SLURM_JOB_ID") == *" JobState=RUNNING "* ]]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 600 # Slurm ends this script long before
  fi
  exit "$1"
}

# Refuses a config that cannot be and nodes that are not fit, and gives the run's folder; nothing if it is finished.
run=$("$python" -m megagpt launch check "$@") || end $?
[[ -n $run ]] || end 0

# torchrun is deaf to signals: its ranks get them from Slurm, save, and end it by ending. It would die of SIGUSR1, and
# kill its ranks 30 s after a SIGTERM.
export PET_SIGNALS_TO_HANDLE=SIGHUP
export logs=$run/logs/$job python job
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c '
    trap "" USR1 TERM INT
    mkdir -p "$logs/$SLURMD_NODENAME"
    exec "$python" -m torch.distributed.run \
      --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
      --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --rdzv-id="$job" --max-restarts=0 \
      --log-dir="$logs/$SLURMD_NODENAME" --redirects=3 --tee=0:3 \
      --module megagpt train --auto-resume "$@" 2>> "$logs/$SLURMD_NODENAME.torchrun.log"
  ' train "$@" || true # the verdict tells

code=0
"$python" -m megagpt launch verdict "$@" --logs "$logs" || code=$?
end "$code"
