"""Documents of bytes, and the windows of them that a batch holds."""
