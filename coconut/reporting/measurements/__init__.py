"""How single measurements of a run look: a module for each, with its chart, its sentences and its parts of the page."""
