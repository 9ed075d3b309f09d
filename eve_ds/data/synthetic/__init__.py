"""Generated scenes, and questions, statements and probes about them."""
