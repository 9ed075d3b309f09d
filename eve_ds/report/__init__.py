"""Reports: figures and tables from the files of a run: `metrics.jsonl`, an export, an evaluation."""
