"""Small tools that know nothing of models: files, digests, parameter paths, progress, compiling,
stopping.
"""
