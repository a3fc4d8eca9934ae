"""Readers of people's files, shared by the pipeline and the command line."""
