#!/usr/bin/env bash
# Builds an image of this checkout.
#
#   docker/build.sh gpu [OPTION of docker build ...]         megatrain:latest
#   docker/build.sh cpu [OPTION of docker build ...]         megatrain:cpu
#   docker/build.sh sif [OPTION of apptainer build ...]      megatrain.sif, here; needs no Docker
#
# TORCH_INDEX: where torch's wheels come from; by default PyTorch's own index for CUDA 13.0, or for the CPU.
set -euo pipefail

wheels=https://download.pytorch.org/whl
repository=$(dirname "$(dirname "$(readlink -f "$0")")")
kind=${1:-}
if (($#)); then shift; fi
cd "$repository"

case $kind in
    gpu) docker build -f docker/Dockerfile -t megatrain:latest \
        --build-arg TORCH_INDEX="${TORCH_INDEX-$wheels/cu130}" "$@" . ;;
    cpu) docker build -f docker/Dockerfile.cpu -t megatrain:cpu \
        --build-arg TORCH_INDEX="${TORCH_INDEX-$wheels/cpu}" "$@" . ;;
    sif) apptainer build --build-arg TORCH_INDEX="${TORCH_INDEX-$wheels/cu130}" "$@" megatrain.sif docker/megatrain.def ;;
    *)
        echo "docker/build.sh: ${kind:-nothing given}: legal: gpu, cpu, sif" >&2
        exit 2
        ;;
esac
