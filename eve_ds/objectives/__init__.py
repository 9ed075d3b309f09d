"""Pre-training objectives: one class each, with its heads, masks, views, losses and cost; `registry.py` lists them."""
