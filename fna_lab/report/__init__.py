"""Results on disk, and how they are shown."""
