"""The programs: each module has the `main` of a file at the top and of a `chatglm` command.

What takes long to import, torch above all, is imported inside the functions: --help waits for none of it.
"""
