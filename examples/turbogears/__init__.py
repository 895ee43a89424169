"""The guest book in TurboGears."""
