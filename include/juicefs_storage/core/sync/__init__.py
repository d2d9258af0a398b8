"""Copying and comparing the objects of two stores, partition by partition."""
