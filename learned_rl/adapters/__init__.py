"""Learned parts in other people's libraries: one file each, imported by whoever has that library."""
