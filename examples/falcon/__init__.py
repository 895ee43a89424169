"""The guest book in Falcon."""
