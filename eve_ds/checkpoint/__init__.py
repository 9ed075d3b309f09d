"""Save a run and resume it.

- `saving.py` writes a checkpoint: `state.json` with step and counters, the ranks' files, all or nothing.
- `resuming.py` finds the newest good checkpoint and fills an engine from it.
- `engine_tensors.py` cuts weights and optimizer state of a DeepSpeed engine into pieces under plain names.
- `files.py` reads and writes pieces; `manifest.py` lists the files of a checkpoint folder and finds good folders.
- `universal.py` writes a checkpoint with whole tensors; `weights.py` reads weights without an engine.
"""
