"""The engine that copies and compares objects between two stores."""

from include.juicefs_storage.adapters.s3.engine.native import NativeEngine

__all__ = ["NativeEngine"]
