"""Measure the project's own parts beside what others offer for the same work."""
