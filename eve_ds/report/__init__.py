"""Pictures and tables from what a run wrote to disk: `metrics.jsonl`, an export, an evaluation."""
