"""Checkpoint folders: their files, the hub they come from, the memory they need, and writing them whole.

These modules know files and configs, not networks. This one imports nothing, so that each can be had alone.
"""
