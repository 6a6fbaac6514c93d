#!/usr/bin/env bash
# From photos to new images: trains a SimVQ tokenizer on the embedded photos, encodes them to codes,
# trains a mixture-of-experts language model on the codes and draws new images from it; training and
# encoding by the deepspeed launcher on 2 processes. About 5 minutes on 2 CPU cores.
# Run again it skips what is finished and goes on with what is not.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

# two processes share the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=passive
folder=runs/codes_to_language_model
on_two_processes() {
    deepspeed -q --no_local_rank --num_accelerators 2 --master_port "$(free_port)" \
        --module simvq_moe "$@"
}
step() { echo "codes_to_language_model: $1" >&2; }

step "1 of 4: the tokenizer"
on_two_processes train --config configs/image_codes_tokenizer.yaml
step "2 of 4: its codes"
on_two_processes encode "$folder/tokenizer" --out "$folder/codes" --shard_samples 2048 --crops
step "3 of 4: the language model"
on_two_processes train --config configs/image_codes_language.yaml
step "4 of 4: 64 new images"
if [[ -f "$folder/samples/000063.png" ]]; then
    step "$folder/samples has them already"
else
    rm -rf "$folder/samples"
    simvq-moe generate "$folder/language_model" --samples 64 --out "$folder/samples"
fi
step "done. New images: $folder/samples; held-out ones above new ones: $folder/language_model/samples"
step "codes and experts side by side: launch/dashboard.sh $folder"
