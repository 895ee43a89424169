"""The guest book in Pyramid."""
