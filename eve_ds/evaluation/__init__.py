"""What a trained model can do: scenes, tasks, zero-shot retrieval, questions of a person."""
