"""What can be seen in a finished run: figures, sections, and the page that holds them."""
