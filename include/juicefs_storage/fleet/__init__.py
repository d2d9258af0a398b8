"""All volumes on a store, moved in waves. Pure."""
