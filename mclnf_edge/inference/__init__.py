"""Views of a map: a pose and the modules in memory become a picture."""
