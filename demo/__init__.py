"""A small rendered world of shapes that takes the whole toolkit from captions to a comparison without any download."""
