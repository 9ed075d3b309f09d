"""The plain PyTorch model: read `eve.py` from top to bottom."""
