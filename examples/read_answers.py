"""The output of a run in pandas, DuckDB and datasets: python read_answers.py RUN. It is plain Parquet."""

from __future__ import annotations

import sys

import datasets
import duckdb
import pandas as pd

run = sys.argv[1]
files = f"{run}/data/*.parquet"

print(duckdb.sql(f"select status, finish_reason, count(*) as rows from '{files}' group by all order by all"))
answers = datasets.load_dataset("parquet", data_files=files, split="train")
print(answers)
table = pd.read_parquet(f"{run}/data")
print(table[["id", "prompt", *[name for name in ("response", "caption") if name in table]]].head())
