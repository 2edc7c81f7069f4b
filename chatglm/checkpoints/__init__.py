"""Checkpoint folders: their files, the hub they come from, the memory they need, and writing them whole.

These modules deal with files and configs, not networks. This one imports nothing, so each can be imported alone.
"""
