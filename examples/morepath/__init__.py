"""The guest book in Morepath."""
