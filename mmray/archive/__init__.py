"""Archives of image-text pairs: list their shards, read them sample by sample, write new ones."""
