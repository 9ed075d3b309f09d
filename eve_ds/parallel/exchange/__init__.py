"""Exchange of rows between the ranks that share one set of experts."""
