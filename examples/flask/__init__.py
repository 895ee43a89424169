"""The guest book in Flask."""
