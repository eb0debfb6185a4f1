#!/usr/bin/env bash
# Is prompt B better than A? Both about each picture in one run, which opens and encodes it once; then row by row.
set -euo pipefail
MODEL=${MODEL:-demo}
[[ -n ${PICTURES:-} ]] || python "$(dirname "$0")/pictures.py" photos
PICTURES=${PICTURES:-photos}
vlm-batch run dataset=images dataset.path="$PICTURES" vlm=auto vlm.path="$MODEL" output_dir=outputs/prompts \
    'prompt.variants={first: "What is the first digit?", last: "What is the last digit?"}'
vlm-batch diff a=outputs/prompts b=outputs/prompts a_prompt=first b_prompt=last html=outputs/prompts.html
