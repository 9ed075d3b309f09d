"""The plain PyTorch model; start reading at `eve.py`."""
