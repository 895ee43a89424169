"""The guest book as a plain WSGI application."""
