"""Evaluation of trained models: scenes, tasks, zero-shot retrieval, questions of a user."""
