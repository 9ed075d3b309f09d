"""Pre-training and fine-tuning on DeepSpeed's engine."""
