"""The guest book in web.py."""
