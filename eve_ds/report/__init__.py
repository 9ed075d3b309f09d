"""Pictures and tables from what a run wrote to disk."""
