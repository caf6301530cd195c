"""Modules of tools.edit_files: examples of all files, edits, commands, and the processes that run the commands."""
