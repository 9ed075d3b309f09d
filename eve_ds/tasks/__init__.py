"""Downstream tasks: one folder per task, and the parts that every task shares.

A task is a subclass of :class:`eve_ds.tasks.task.Task` in :mod:`eve_ds.tasks.registry`; training, evaluation and the
commands know tasks only by that class.
"""
