"""The page in a real browser: its speed, and the pictures of the docs."""
