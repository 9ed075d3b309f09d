"""Distribution by DeepSpeed: expert parallelism, ZeRO and their settings."""
