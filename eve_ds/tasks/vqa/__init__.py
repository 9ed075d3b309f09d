"""Visual question answering: one of a vocabulary of answers, soft targets, official accuracy by question type."""

from eve_ds.tasks.vqa.task import VQA

__all__ = ["VQA"]
