"""Generated scenes, and questions, statements, retrieval sets and binding probes made of them."""
