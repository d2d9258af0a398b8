"""Programs that copy a whole partition in their own way."""
