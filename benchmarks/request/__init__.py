"""One request beside stock: how much sooner it is answered, and what serving adds to it."""
