#!/usr/bin/env bash
# Answers that can only be one of a list: every one of them can be counted.
set -euo pipefail
MODEL=${MODEL:-demo}
[[ -n ${PICTURES:-} ]] || python "$(dirname "$0")/pictures.py" photos
PICTURES=${PICTURES:-photos}
vlm-batch run dataset=images dataset.path="$PICTURES" vlm=auto vlm.path="$MODEL" output_dir=outputs/choices \
    'prompt.user=How many digits are there?' 'generation.choices=["1","2","3","4","5","6"]'
python - <<'END'
import duckdb

print(duckdb.sql("select response, count(*) from 'outputs/choices/data/*.parquet' group by 1 order by 1"))
END
