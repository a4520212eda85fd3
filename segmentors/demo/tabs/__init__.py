"""The tabs of the page, each with a function ``build``."""
