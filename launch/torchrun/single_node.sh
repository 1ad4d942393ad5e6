#!/usr/bin/env bash
# Trains on this machine: a process for each of its GPUs, one process where there are none.
#
#   launch/torchrun/single_node.sh model=llama_1b data.path=DIR run_dir=DIR max_steps=N ...
#
# The arguments are those of `megatrain train`, which starts the processes itself, through torchrun's elastic API.
# exec: a signal to this script's process is one to megatrain, and the exit code is megatrain's.
set -euo pipefail

exec megatrain train "$@"
