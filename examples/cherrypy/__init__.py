"""The guest book in CherryPy."""
