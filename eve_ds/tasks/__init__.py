"""Downstream tasks: visual question answering, statements about images, image-text retrieval."""
