"""What pre-training predicts, and the losses of it."""
