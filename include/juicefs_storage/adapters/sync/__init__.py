"""The two sides of a copy, the engines that move objects between them, and where the manifests lie."""
