"""A whole environment on one machine for the demo and the tests; the product does not know it."""
