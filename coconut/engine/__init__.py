"""How updates are carried out: the only package that knows devices and processes."""
