"""What a switch refuses, and what it warns of."""
