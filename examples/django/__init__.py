"""The guest book in Django."""
