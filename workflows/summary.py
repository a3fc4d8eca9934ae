"""Print where the report of each preset is, and its main figures."""
