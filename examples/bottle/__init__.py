"""The guest book in Bottle."""
