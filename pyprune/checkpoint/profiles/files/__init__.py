"""Files that are copied into exported folders as they stand. They know torch and transformers, and not pyprune."""
