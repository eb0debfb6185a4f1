#!/usr/bin/env bash
# What does int8 cost in answers? The same rows with and without, compared, with the change of the score.
set -euo pipefail
MODEL=${MODEL:-demo}
words=(dataset=demo dataset.max_rows=200 vlm=auto vlm.path="$MODEL" generation.max_new_tokens=32)
vlm-batch run "${words[@]}" output_dir=outputs/as_it_is
vlm-batch run "${words[@]}" vlm.quantization=int8 output_dir=outputs/int8
vlm-batch diff a=outputs/as_it_is b=outputs/int8 reference=answer metric=[exact_match] html=outputs/int8.html
