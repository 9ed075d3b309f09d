"""The DeepSpeed JSON: its file, its keys with what each may be here, and the blocks that repeat the YAML."""
