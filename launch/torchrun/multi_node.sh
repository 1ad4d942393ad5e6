#!/usr/bin/env bash
# Trains on several machines: start it on each of them with the same arguments, in any order.
#
#   NODES=4 RENDEZVOUS=node1:29500 launch/torchrun/multi_node.sh model=llama_7b data.path=DIR run_dir=DIR max_steps=N ...
#
# NODES is their number; RENDEZVOUS is HOST:PORT of one of them, with a free port. data.path and run_dir are on storage
# that all of them see. A stop needs one signal to one of them: the ranks agree on a step. Stopped or failed, start it on
# all machines again.
set -euo pipefail

nodes=${NODES:?is needed: the number of machines}
rendezvous=${RENDEZVOUS:?is needed: HOST:PORT of one of the machines}

exec megatrain train launch.nodes="$nodes" launch.rendezvous="$rendezvous" "$@"
