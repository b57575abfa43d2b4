"""Utilities: files, digests, parameter paths, progress lines, XLA options, graceful stops."""
