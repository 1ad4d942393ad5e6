#!/usr/bin/env bash
# Text to a trained and evaluated model by one command: submits the jobs, each of which waits for the one before.
#
#   . .venv/bin/activate
#   launch/slurm/pipeline.sh \
#       prep --time=12:00:00 input=text output=shards tokenizer.train=true slurm.tasks=64 \
#       train --nodes=16 --time=24:00:00 model=llama_7b data.path=shards run_dir=run max_steps=20000 \
#       eval checkpoint=run data.path=shards output=scores.json
#
# The stages are prep.sbatch, pretrain.sbatch and eval.sbatch; any of them may be left out. --OPTION is for sbatch,
# KEY=VALUE for megatrain.
#
# Design choices:
# - Nothing is submitted before all of the command line was read, and where sbatch refuses a job those before it are
#   cancelled.
# - A job that fails ends those that wait for it (--kill-on-invalid-dep); Slurm would keep them for ever.
set -euo pipefail

folder=$(dirname "$(readlink -f "$0")")
declare -A scripts=([prep]=prep.sbatch [train]=pretrain.sbatch [eval]=eval.sbatch)
submitted=()

fail() {
    echo "pipeline.sh: $*" >&2
    exit 2
}

# STAGE WORD...: the job of a stage, after the one before.
submit() {
    local stage=$1 word job options=() keys=()
    shift
    for word in "$@"; do
        if [[ $word == --* ]]; then options+=("$word"); else keys+=("$word"); fi
    done
    if ((${#submitted[@]})); then
        options+=("--dependency=afterok:${submitted[-1]}" --kill-on-invalid-dep=yes)
    fi
    if ! job=$(sbatch --parsable "${options[@]}" "$folder/${scripts[$stage]}" "${keys[@]}"); then
        if ((${#submitted[@]})); then scancel "${submitted[@]}"; fi
        fail "$stage: sbatch refuses it; nothing is left in the queue"
    fi
    submitted+=("${job%%;*}")
    echo "$stage: job ${submitted[-1]}"
}

is_stage() { [[ $1 == prep || $1 == train || $1 == eval ]]; }

is_stage "${1:-}" || fail "${1:-nothing given}: begins with a stage: prep, train or eval"
for word in "$@"; do
    is_stage "$word" || [[ $word == --?* || $word == [!-]*=* ]] ||
        fail "$word: neither a stage (prep, train, eval) nor --OPTION nor KEY=VALUE"
done

while (($#)); do
    stage=$1 words=()
    shift
    while (($#)) && ! is_stage "$1"; do
        words+=("$1")
        shift
    done
    submit "$stage" "${words[@]}"
done
